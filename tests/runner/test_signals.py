"""Requests to stop."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lakonlab.runner.signals import StopRequest


@pytest.mark.parametrize(('signum', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_is_remembered(signum, code, capfd):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert (stop.signal, stop.exit_code) == (None, 0)
        os.kill(os.getpid(), signum)
        assert (stop.signal, stop.exit_code) == (signum, code)
    assert signal.getsignal(signum) is before
    assert f'{signal.Signals(signum).name}: stopping after this iteration' in capfd.readouterr().err


def test_second_signal_ends_the_process_at_once():
    script = (
        'import time\n'
        'from lakonlab.runner.signals import StopRequest\n'
        'with StopRequest():\n'
        '    print("ready", flush=True)\n'
        '    while True: time.sleep(0.01)\n'
    )
    process = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b'ready\n'
        process.send_signal(signal.SIGINT)
        assert b'stopping' in process.stderr.readline() + process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
    finally:
        process.kill()


@pytest.mark.parametrize(('signum', 'ends'), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_worker_processes_leave_ctrl_c_to_their_parent(signum, ends):
    with StopRequest():
        child = os.fork()
        if child == 0:
            time.sleep(0.3)
            os._exit(0)
    time.sleep(0.05)
    os.kill(child, signum)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (143 if ends else 0)


def test_other_threads_are_left_alone():
    entered = []

    def use():
        with StopRequest() as stop:
            entered.append(stop.signal)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert entered == [None]
