"""Processes that write checkpoints: what happens when one of them, or one that they belong to, is gone."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from lakonlab.parallel.checkpoint_writer import CheckpointWriter, SaveJob, WriterEndedError
from lakonlab.ranks import is_reported_by_main
from lakonlab.storage.checkpoint import CheckpointError, find_checkpoint, read_tensors
from lakonlab.storage.pieces import Pieces
from tests import processes
from tests.processes import ProcessFailedError, ProcessPool, workers  # noqa: F401


def parts(ranks, step):
    rows = torch.arange(8.0).view(2, 4) + step
    return {'model': {'weight': Pieces.stretch((2, 4), 4 * ranks.rank, rows[ranks.rank])}}


def job(folder, step):
    return SaveJob(folder, step, {'iteration': step})


def is_gone(pid, seconds):
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z':
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def save_three_times(ranks, folder):
    writer = CheckpointWriter(ranks)
    memory = parts(ranks, 1)
    for step in (1, 2, 3):
        writer.submit(job(folder, step), memory)
        memory['model']['weight'].tensors[0].add_(1)  # free to change
    writer.wait()
    assert writer.wait() is None
    writer.close()


def test_what_is_saved_is_the_state_when_it_was_handed_over(workers, tmp_path):  # noqa: F811
    workers.run(save_three_times, tmp_path)
    for step in (1, 2, 3):
        expected = torch.arange(8.0).view(2, 4) + step
        assert torch.equal(read_tensors(tmp_path / f'iter_{step}', 'model')['weight'], expected)


def start_writer(ranks, signum=None):
    """Start a writer that stays when this returns; its process id. A signal hits the whole group meanwhile."""
    before = signal.signal(signum, lambda *_: None) if signum else None
    writer = CheckpointWriter()
    writer.start()
    if signum:
        os.killpg(0, signum)
    while not writer._is_ready and writer._outcome is None:
        writer._listen(1)
    if signum:
        signal.signal(signum, before)
    start_writer.kept = writer
    return writer._process.pid, writer._process.poll()


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_leaves_the_writer_alone_from_its_start(signum):
    with ProcessPool(1) as pool:
        ((pid, status),) = pool.run(start_writer, signum)
        assert status is None
        assert not is_gone(pid, 0.2)
        pool.kill()
    assert is_gone(pid, 5)


def test_a_writer_ends_with_its_process_whatever_it_is_doing():
    """Even stopped, so nothing that it does itself can be the reason."""
    with ProcessPool(1) as pool:
        ((pid, _),) = pool.run(start_writer)
        os.kill(pid, signal.SIGSTOP)
        os.kill(pool.pids[0], signal.SIGKILL)
        assert is_gone(pid, 2)
        pool.kill()


def lose_a_writer(ranks, folder, when):
    """The writer of the second process is killed; returns what each process is told, and how long that took."""
    writer = CheckpointWriter(ranks)
    if when == 'idle':
        writer.submit(job(folder, 1), parts(ranks, 1))
        writer.wait()
    writer.submit(job(folder, 2), parts(ranks, 2))
    if ranks.rank == 1:
        writer._process.kill()
    begin = time.monotonic()
    try:
        writer.wait()
    except CheckpointError as error:
        told = type(error), str(error), is_reported_by_main(error)
    took = time.monotonic() - begin
    writer.close()
    return told, took, time.monotonic() - begin - took


@pytest.mark.parametrize('when', ['at once', 'idle'])
def test_a_writer_that_is_killed_fails_all_processes(workers, tmp_path, when):  # noqa: F811
    for rank, ((kind, message, reported), took, closing) in enumerate(workers.run(lose_a_writer, tmp_path, when)):
        assert kind is WriterEndedError
        assert message.startswith('the process of rank 1 that writes checkpoints has ended with exit code -9')
        assert reported == (rank == 1)
        assert took < 20
        assert closing < 10
    found = find_checkpoint(tmp_path)
    assert found is None if when == 'at once' else found.name == 'iter_1'


def fail_in_one(ranks, folder):
    """The second process cannot write below a directory that is a file for it."""
    writer = CheckpointWriter(ranks)
    own = folder if ranks.is_main else folder / 'elsewhere'
    if not ranks.is_main:
        own.mkdir()
    (own / 'run').mkdir()
    os.chdir(own)
    for step in (1, 2):
        try:
            writer.submit(job(Path('run'), step), parts(ranks, step))
            writer.wait()
        except CheckpointError as error:
            return str(error), is_reported_by_main(error)
        finally:
            writer.close()


def test_a_failure_in_one_process_is_one_in_all(workers, tmp_path):  # noqa: F811
    (first, told_first), (second, told_second) = workers.run(fail_in_one, tmp_path)
    assert first == second
    assert 'saving run/iter_1 failed' in first
    assert 'was made by the main process and is not seen by this one' in first
    assert (told_first, told_second) == (False, True)
    assert find_checkpoint(tmp_path / 'run') is None


def leave_after_handing_over(ranks, folder):
    """The second process dies before its writer has found the other one."""
    writer = CheckpointWriter(ranks)
    writer.submit(job(folder, 1), parts(ranks, 1))
    if ranks.rank == 1:
        os._exit(3)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=r'have not found each other|saving .* failed'):
        writer.close()
    raise KeyError(f'left after {time.monotonic() - begin:.0f} s')


@pytest.mark.slow
def test_who_leaves_does_not_wait_for_a_writer_that_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, 'GRACE_SECONDS', 40.0)
    with pytest.raises(ProcessFailedError, match=r"KeyError: 'left after 1?\d s'"), ProcessPool(2) as pool:
        pool.run(leave_after_handing_over, tmp_path)


def test_who_leaves_while_its_writer_starts_has_the_last_word(capfd, monkeypatch):
    """A run that fails at once shows its own error, and none of a writer that finds it gone."""
    monkeypatch.setattr('lakonlab.parallel.checkpoint_writer.GRACE_SECONDS', 60)
    writer = CheckpointWriter()
    writer.start()
    process = writer._process
    writer.close()
    assert process.returncode == 0
    assert capfd.readouterr().err == ''
