import os
import signal
import sys
import threading
import time

import pytest

from lakonlab.ui.processes import InterruptedJobsError, Job, JobFailedError, JobRunner


def python(code):
    return (sys.executable, '-u', '-c', code)


def run(jobs, max_parallel=2):
    lines, ended = [], []
    runner = JobRunner(
        jobs, max_parallel, dict(os.environ), lines.append, lambda job, ok, s: ended.append((job.name, ok))
    )
    try:
        runner.run()
    finally:
        run.lines, run.ended = lines, ended
    return lines, ended


def test_output_is_prefixed_and_order_is_kept():
    lines, ended = run([Job('a', python('print(1); print(2)')), Job('long', python('print(3)'), ('a',))])
    assert lines == ['a    | 1', 'a    | 2', 'long | 3']
    assert ended == [('a', True), ('long', True)]


def test_jobs_run_side_by_side(tmp_path):
    wait = 'import os, time\nopen({mine!r}, "w").close()\nwhile not os.path.exists({other!r}): time.sleep(0.01)'
    files = [str(tmp_path / name) for name in 'xy']
    jobs = [
        Job(f'job{i}', python(wait.format(mine=files[i], other=files[1 - i]))) for i in (0, 1)
    ]  # each waits for the other
    _, ended = run(jobs)
    assert sorted(ended) == [('job0', True), ('job1', True)]


def test_failure_stops_the_others_and_is_told():
    forever = 'import time\nwhile True: time.sleep(0.1)'
    jobs = [
        Job('bad', python('import time; time.sleep(0.3); print("what went wrong"); raise SystemExit(3)')),
        Job('other', python(forever)),
        Job('later', python('print("never")'), ('bad',)),
    ]
    with pytest.raises(JobFailedError, match=r'bad failed with exit code 3(.|\n)*what went wrong'):
        run(jobs)
    assert run.ended[0] == ('bad', False)
    assert 'later' not in dict(run.ended)
    assert dict(run.ended)['other'] is False


def test_interrupt_asks_jobs_to_stop_and_waits_for_them():
    code = (
        'import signal, sys, time\n'
        'def stop(*_):\n'
        '    print("saved"); sys.exit(143)\n'
        'signal.signal(signal.SIGTERM, stop); print("ready")\n'
        'while True: time.sleep(0.05)'
    )
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(InterruptedJobsError) as interruption:
        run([Job('a', python(code)), Job('b', python('print("never")'), ('a',))])
    assert interruption.value.signum == signal.SIGINT
    assert 'a | saved' in run.lines
    assert run.ended == [('a', False)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the Linux kernel')
def test_jobs_do_not_outlive_a_killed_demo(tmp_path):
    pid_file = tmp_path / 'pid'
    child = f'import os, time; open({str(pid_file)!r}, "w").write(str(os.getpid())); time.sleep(60)'
    parent = (
        'import os, sys\n'
        'from lakonlab.ui.processes import Job, JobRunner\n'
        f'job = Job("a", (sys.executable, "-c", {child!r}))\n'
        'JobRunner([job], 1, dict(os.environ), print, lambda *_: None).run()'
    )
    import subprocess

    process = subprocess.Popen([sys.executable, '-c', parent])
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    pid = int(pid_file.read_text())
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f'/proc/{pid}/stat', encoding='utf-8') as stat:
            if stat.read().rsplit(')', 1)[1].split()[0] == 'Z':  # ended, not yet collected
                return
        time.sleep(0.05)
    pytest.fail('the job is still running')
