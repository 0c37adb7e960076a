"""The lock on a directory of an object store."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from lakonlab.storage import files, lease
from lakonlab.storage.lease import confirm_lease
from lakonlab.storage.local import DirectoryInUseError
from lakonlab.storage.remote_path import as_path
from lakonlab.storage.s3 import S3Files


@pytest.fixture
def directory(bucket, monkeypatch):
    for name, seconds in dict(RENEW=0.2, STALE=1.5, WAIT=0.5, SETTLE=0.3, POLL=0.05).items():
        monkeypatch.setattr(lease, f'{name}_SECONDS', seconds)
    return as_path(f'{bucket}/run')


def lock_of(directory):
    return json.loads(files.read_text(f'{directory}/.lock'))


def write(directory, **values):
    files.write_json(f'{directory}/.lock', values)


ELSEWHERE = dict(holder='other', process=1, host='elsewhere', started='1', machine='another')


def test_one_holder_at_a_time(directory):
    with lease.lease(directory) as holder:
        confirm_lease(directory, holder)
        with pytest.raises(DirectoryInUseError, match=rf'is in use by another run \(process {os.getpid()} on '):
            lease._acquire(directory, directory / '.lock', 'second')
        confirm_lease(directory, holder)
    assert not files.exists(f'{directory}/.lock')
    with lease.lease(directory):
        pass


def test_it_is_renewed(directory):
    with lease.lease(directory):
        first = lock_of(directory)
        deadline = time.monotonic() + 20
        while (second := lock_of(directory)) == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert second['holder'] == first['holder']
        assert second['nonce'] != first['nonce']


def hold_for_ever(url, ready):
    with lease.lease(as_path(url)):
        ready.set()
        time.sleep(600)


def test_a_killed_process_of_this_machine_is_noticed_at_once(directory, monkeypatch):
    monkeypatch.setattr(lease, 'STALE_SECONDS', 600)
    context = multiprocessing.get_context('spawn')
    ready = context.Event()
    process = context.Process(target=hold_for_ever, args=(str(directory), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(DirectoryInUseError, match=f'process {process.pid} on '):
        lease._acquire(directory, directory / '.lock', 'second')
    os.kill(process.pid, signal.SIGKILL)
    while process.is_alive():  # not joined: it may well be a zombie while the next run starts
        time.sleep(0.01)
    with lease.lease(directory) as holder:
        confirm_lease(directory, holder)
    process.join()


def test_a_holder_of_another_machine_is_gone_when_it_gives_no_sign_of_life(directory, caplog):
    write(directory, **ELSEWHERE)
    began = time.monotonic()
    with lease.lease(directory) as holder:
        assert time.monotonic() - began > lease.STALE_SECONDS
        confirm_lease(directory, holder)
    assert 'was left by a run that is gone (process 1 on elsewhere' in caplog.text


def test_a_holder_of_another_machine_that_renews_is_left_alone(directory, monkeypatch):
    read = lease._read
    monkeypatch.setattr(lease, '_read', lambda path: {**read(path), 'renewed': time.monotonic()})
    write(directory, **ELSEWHERE)
    with pytest.raises(DirectoryInUseError, match='process 1 on elsewhere'), lease.lease(directory):
        pass
    assert lock_of(directory)['holder'] == 'other'


def test_who_was_taken_for_dead_learns_of_it(directory):
    with lease.lease(directory) as holder:
        write(directory, **ELSEWHERE)
        with pytest.raises(DirectoryInUseError, match=r'is held by another run now \(process 1 on elsewhere'):
            confirm_lease(directory, holder)
    assert lock_of(directory)['holder'] == 'other'  # it is not ours to remove


def test_of_two_that_take_over_one_wins(directory, monkeypatch):
    """The other one writes while the first waits for what may come."""
    write(directory, **{**ELSEWHERE, 'machine': lease._machine(), 'process': 2**22 + 1})
    sleep = time.sleep

    def meanwhile(seconds):
        if seconds == lease.SETTLE_SECONDS:
            write(directory, **{**ELSEWHERE, 'machine': lease._machine(), 'process': os.getpid(), 'holder': 'winner'})
            found = lock_of(directory)
            write(directory, **{**found, 'started': lease._start_of(os.getpid())})
        sleep(seconds)

    monkeypatch.setattr(time, 'sleep', meanwhile)
    with pytest.raises(DirectoryInUseError), lease.lease(directory):
        pass
    assert lock_of(directory)['holder'] == 'winner'


def test_a_lock_that_is_there_and_cannot_be_seen(directory, monkeypatch):
    """An error after a while, and few questions until then."""
    attempts = []
    monkeypatch.setattr(files, 'create', lambda path, content: attempts.append(path) or False)
    with pytest.raises(files.StorageError, match=r'\.lock cannot be created: the store says that it exists'):
        lease._acquire(directory, directory / '.lock', 'first')
    assert 1 < len(attempts) <= 1 + lease.WAIT_SECONDS / lease.POLL_SECONDS + 1


def test_a_lock_that_goes_while_it_is_made(directory, s3_server, monkeypatch):
    """Its holder removes it between the refusal and the question whose it is."""
    if s3_server.kind == 'rclone':
        pytest.skip('rclone serve s3 creates a file whether it exists or not')
    write(directory, **ELSEWHERE)
    read = S3Files.read_bytes

    def gone(self, path, *args):
        files.remove_file(path)
        return read(self, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(S3Files, 'read_bytes', gone)
        assert not files.create(f'{directory}/.lock', b'ours')
    assert files.create(f'{directory}/.lock', b'ours')
