"""The commands ``train.py`` and ``test.py``: one tool, in this process or in several."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lakonlab.parallel.start_workers import SECONDS_TO_SAVE, run_tool

ROOT = Path(__file__).parents[2]
STUB = """
import argparse, json, os, signal, sys, time
from pathlib import Path

HERE = Path(__file__).parent

def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    parser.add_argument('--launcher', default='none')
    parser.add_argument('--diff_seed', action='store_true')
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--cfg-options', nargs='+')
    return parser.parse_args()

if __name__ == '__main__':
    args = parse_args()
    rank = os.environ.get('RANK', 'none')
    names = ('WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_PORT', 'CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')
    report = {**vars(args), **{name: os.environ.get(name) for name in names}, 'pid': os.getpid(), 'signals': []}
    def stop(number, frame):
        report['signals'].append(number)
    signal.signal(signal.SIGINT, stop)
    if args.config == 'wait':
        (HERE / f'ready{rank}').touch()
        while not report['signals']:
            time.sleep(0.01)
        time.sleep(0.5)  # a second signal would come while this one saves
    (HERE / f'{rank}.json').write_text(json.dumps(report))
    sys.exit(3 if args.config == 'fail' and rank in ('1', 'none') else 0)
"""


@pytest.fixture
def command(tmp_path):
    """Starts the command for a stub of a tool."""
    stub = tmp_path / 'stub.py'
    stub.write_text(STUB)
    code = (
        'import sys; from pathlib import Path; from lakonlab.parallel.start_workers import run_tool; '
        f'sys.exit(run_tool(Path({str(stub)!r})))'
    )
    environment = {name: value for name, value in os.environ.items() if name not in ('WORLD_SIZE', 'RANK')}
    environment |= {'PYTHONPATH': str(ROOT)}
    environment.pop('OMP_NUM_THREADS', None)
    environment.pop('CUDA_VISIBLE_DEVICES', None)
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, '-c', code, *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def report(folder: Path, rank: int | str) -> dict:
    return json.loads((folder / f'{rank}.json').read_text())


def test_one_gpu_needs_no_other_process(command, tmp_path):
    process = command('fail', '--gpu-ids', '5', '--cfg-options', 'a=1', 'b=2')
    assert finish(process)[0] == 3
    found = report(tmp_path, 'none')
    assert found['pid'] == process.pid
    assert found['CUDA_VISIBLE_DEVICES'] == '5'
    assert (found['launcher'], found['cfg_options']) == ('none', ['a=1', 'b=2'])


def test_a_process_for_each_gpu(command, tmp_path):
    code, errors = finish(command('fail', '--gpu-ids', '2', '0', '--cfg-options', 'a=$x', 'b=$$', 'c=${local_rank}'))
    assert code == 3
    assert 'error: process 1 of 2 ended with exit status 3' in errors
    assert 'Traceback' not in errors
    both = [report(tmp_path, rank) for rank in range(2)]
    for found in both:
        assert (found['WORLD_SIZE'], found['LOCAL_WORLD_SIZE']) == ('2', '2')
        assert (found['launcher'], found['diff_seed']) == ('pytorch', True)
        assert found['CUDA_VISIBLE_DEVICES'] == '2,0'
        assert found['cfg_options'] == ['a=$x', 'b=$$', 'c=${local_rank}']
        assert int(found['OMP_NUM_THREADS']) >= 1
    assert both[0]['MASTER_PORT'] == both[1]['MASTER_PORT']
    assert both[0]['pid'] != both[1]['pid']


def test_a_signal_reaches_every_process_once(command, tmp_path):
    process = command('wait', '--processes', '2')
    deadline = time.monotonic() + 60
    while not all((tmp_path / f'ready{rank}').exists() for rank in range(2)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert code == 128 + signal.SIGINT
    assert 'Traceback' not in errors
    assert [report(tmp_path, rank)['signals'] for rank in range(2)] == [[signal.SIGINT]] * 2


@pytest.mark.parametrize(('failure', 'status'), [(None, 0), (5, 5), (-signal.SIGKILL, 137)])
def test_a_group_of_one(tmp_path, monkeypatch, failure, status):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    (tmp_path / 'stub.py').write_text(STUB)
    for name in ('OMP_NUM_THREADS', 'TORCH_ELASTIC_SHUTDOWN_TIMEOUT'):
        monkeypatch.setenv(name, '')  # restored after the test
        monkeypatch.delenv(name)
    started = []

    def elastic_launch(config, program):
        def call(*arguments):
            started.append((config, program, arguments))
            if failure is not None:
                raise ChildFailedError('stub', {0: ProcessFailure(0, 1, failure, '')})

        return call

    monkeypatch.setattr(api, 'elastic_launch', elastic_launch)
    assert run_tool(tmp_path / 'stub.py', ['pass', '--force-ddp']) == status
    ((config, program, arguments),) = started
    assert (config.nproc_per_node, config.max_nodes, config.max_restarts) == (1, 1, 0)
    assert config.shutdown_timeout == SECONDS_TO_SAVE
    assert program == sys.executable
    assert arguments == ('-u', str(tmp_path / 'stub.py'), 'pass', '--launcher', 'pytorch', '--diff_seed')


def test_a_plan_needs_one_process(command, tmp_path):
    process = command('pass', '--processes', '8', '--dry-run')
    assert finish(process)[0] == 0
    assert report(tmp_path, 'none')['pid'] == process.pid


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['CONFIG', '--gpu-ids', '0', '0'], 'expected every GPU once'),
        (['--gpu-ids', '0', 'CONFIG'], "found 'CONFIG', expected the number of a GPU; the config comes first"),
        (['CONFIG', '--gpu-ids', '-1'], 'gpu-ids'),
        (['CONFIG', '--processes', '0'], "found '0', expected a positive number"),
        (['CONFIG', '--processes', '2', '--gpu-ids', '0'], 'not allowed with'),
        (['CONFIG', '--processes', '2', '--launcher', 'slurm'], 'this command is a launcher itself'),
        (['CONFIG', '--processes', '2', '--unknown'], 'unrecognized arguments: --unknown'),
        (['--processes', '2'], 'the following arguments are required: config'),
    ],
)
@pytest.mark.parametrize('name', ['train', 'test'])
def test_wrong_arguments_start_nothing(name, arguments, message):
    done = subprocess.run([sys.executable, ROOT / f'{name}.py', *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize('name', ['train', 'test'])
def test_help_is_instant(name):
    code = (
        f"import runpy, sys; sys.argv = ['{name}.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / f'{name}.py')!r}, run_name='__main__')\n"
        'except SystemExit: pass\n'
        "sys.exit(any(module in sys.modules for module in ('torch', 'mmengine', 'numpy')))"
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'tools/{name}.py' in done.stdout
