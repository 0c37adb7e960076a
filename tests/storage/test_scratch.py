"""Room on a disk."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from lakonlab.storage import scratch
from lakonlab.storage.errors import StorageError
from lakonlab.storage.shared_memory import SharedMemory

HOLD = """
import sys
from lakonlab.storage.scratch import scratch_directory
with scratch_directory(0, 'test') as folder:
    (folder / 'content').touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('LAKONLAB_TMPDIR', str(tmp_path / 'scratch'))
    monkeypatch.setattr(scratch, 'YOUNG_SECONDS', -1)
    return tmp_path / 'scratch'


def test_directory_is_removed(root):
    with scratch.scratch_directory(10, 'a test') as folder, scratch.scratch_directory(10, 'another') as other:
        assert folder.parent == root
        assert folder != other
        (folder / 'a').touch()
    assert list(root.iterdir()) == []


def test_too_little_space(root, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 95, 5))
    with (
        pytest.raises(StorageError, match=rf'an export needs 6 bytes in {root}, where 5 are free.*LAKONLAB_TMPDIR'),
        scratch.scratch_directory(6, 'an export'),
    ):
        pass
    assert list(root.iterdir()) == []


def test_what_killed_processes_leave_is_removed_and_what_others_use_is_not(root):
    processes = [
        subprocess.Popen([sys.executable, '-c', HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, alive = (process.stdout.readline().strip() for process in processes)
    processes[0].kill()
    processes[0].wait()
    assert os.path.exists(killed)
    with scratch.scratch_directory(0, 'a test'):
        assert not os.path.exists(killed)
        assert os.path.exists(f'{alive}/content')
    processes[1].communicate('')
    processes[0].stdin.close()
    processes[0].stdout.close()
    assert list(root.iterdir()) == []


def test_copies_of_systems_without_anonymous_memory_lie_there(root, monkeypatch):
    monkeypatch.delattr(os, 'memfd_create')
    memory = SharedMemory(100)
    memory.tensor(0, (3,), torch.int64).fill_(7)
    other = SharedMemory(100, os.dup(memory.descriptor))
    assert other.tensor(8, (1,), torch.int64).item() == 7
    assert list(root.iterdir()) == []  # the file has no name
    assert os.fstat(memory.descriptor).st_dev == root.stat().st_dev
    memory.close()
    other.close()
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 95, 5))
    with pytest.raises(StorageError, match=rf'needs 100 bytes in {root}, where 5 are free.*LAKONLAB_TMPDIR'):
        SharedMemory(100)
