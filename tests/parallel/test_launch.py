"""Processes that a launcher has started join one group, each with a device of its own."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lakonlab.parallel.environment import LaunchError
from lakonlab.parallel.launch import (
    _refuse_shared_devices,
    _share_cpus,
    choose_backend,
    choose_device,
    joined_processes,
    start_processes,
    stop_processes,
)
from lakonlab.ranks import ALONE, Ranks

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device('cpu'), torch.device('cuda', 0)
SCRIPT = """
import json, logging, sys
from pathlib import Path
import torch
import torch.distributed as dist
from lakonlab.parallel.launch import joined_processes

logging.basicConfig(level='INFO', format='%(message)s')
launcher, dist_params, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
with joined_processes(launcher, dist_params) as (ranks, device):
    total = torch.tensor([ranks.rank + 1.0], device=device)
    dist.all_reduce(total)
    result = {
        'ranks': [ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size],
        'device': device.type,
        'total': total.item(),
        'backends': [dist.get_backend(), dist.get_backend(ranks.group)],
        'own_group': ranks.group is not dist.group.WORLD,
        'gathered': ranks.all_gather('x' * (ranks.rank + 1)),
        'threads': torch.get_num_threads(),
    }
result['left'] = not dist.is_initialized()
(folder / f'{ranks.rank}.json').write_text(json.dumps(result))
"""


@pytest.fixture
def script(tmp_path):
    """The script, and the environment of a machine without GPUs and launchers."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    launchers = ('SLURM', 'OMPI', 'PMI', 'OMP_', 'RANK', 'WORLD_SIZE', 'LOCAL_', 'MASTER_')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return str(path), {**environment, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}


def check_both(folder: Path, threads: int) -> None:
    results = [json.loads((folder / f'{rank}.json').read_text()) for rank in range(2)]
    assert [result.pop('ranks') for result in results] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    expected = {
        'device': 'cpu',
        'total': 3.0,
        'backends': ['gloo', 'gloo'],
        'own_group': True,
        'gathered': ['x', 'xx'],
        'threads': threads,
        'left': True,
    }
    assert results == [expected, expected]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def test_torchrun(script, tmp_path):
    path, environment = script
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2']
    done = subprocess.run(
        [*torchrun, path, 'pytorch', '{"backend": "nccl", "timeout": 60}', str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    check_both(tmp_path, threads=1)
    assert done.stderr.count('needs GPUs, there are none; gloo instead') == 1
    assert done.stderr.count('2 processes, 2 on the first node; gradients by gloo') == 1


def test_slurm(script, tmp_path):
    path, environment = script
    environment |= {
        'SLURM_NTASKS': '2',
        'SLURM_NTASKS_PER_NODE': '2',
        'SLURM_JOB_NODELIST': 'localhost',
        'SLURM_JOB_ID': '1',
        'SLURM_CPUS_PER_TASK': '3',
    }
    settings = json.dumps({'port': free_port(), 'timeout': 60})
    processes = [
        subprocess.Popen(
            [sys.executable, path, 'slurm', settings, str(tmp_path)],
            env={**environment, 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    check_both(tmp_path, threads=3)


@pytest.fixture
def group_of_one(monkeypatch):
    """What ``torchrun --nproc_per_node 1`` sets."""
    sizes = {'RANK': 0, 'WORLD_SIZE': 1, 'LOCAL_RANK': 0, 'LOCAL_WORLD_SIZE': 1}
    for name, value in {**sizes, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port()}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_group_of_one(group_of_one):
    ranks, device = start_processes('pytorch', {'timeout': 60}, 'cpu')
    assert (ranks.world_size, device) == (1, CPU)
    assert dist.get_world_size() == dist.get_world_size(ranks.group) == 1
    with pytest.raises(LaunchError, match='belongs to a group already'):
        start_processes('pytorch', device='cpu')
    stop_processes(ranks)
    assert not dist.is_initialized()


def test_a_process_that_fails_does_not_wait(group_of_one):
    with pytest.raises(KeyError), joined_processes('pytorch', {'timeout': 60}, 'cpu'):
        raise KeyError
    assert dist.is_initialized()


def test_no_launcher_starts_no_group(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with joined_processes('none', {'backend': 'nccl'}, 'cpu') as (ranks, device):
        assert (ranks, device) == (ALONE, CPU)
        assert not dist.is_initialized()


def test_processes_that_do_not_find_each_other(group_of_one, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    port = os.environ['MASTER_PORT']
    with pytest.raises(LaunchError, match=rf'process 1 of 2 .* MASTER_ADDR:MASTER_PORT=127\.0\.0\.1:{port}'):
        start_processes('pytorch', {'timeout': 0.5}, 'cpu')


@pytest.mark.parametrize(
    ('dist_params', 'message'),
    [
        ({'init_method': 'env://'}, r'dist_params\.init_method: no such key; expected backend, timeout, port'),
        ({'timeout': 0}, r'dist_params\.timeout: found 0'),
        ({'timeout': '60'}, r"dist_params\.timeout: found '60'"),
        ({'backend': 3}, r'dist_params\.backend: found 3'),
        ({'backend': 'glue'}, r"dist_params\.backend: found 'glue', expected one of .*gloo"),
        ({'port': -1}, r'dist_params\.port: found -1'),
    ],
)
def test_settings_are_checked(group_of_one, dist_params, message):
    with pytest.raises(LaunchError, match=message):
        start_processes('pytorch', dist_params, 'cpu')
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ('wanted', 'device', 'backend'),
    [
        (None, CPU, 'gloo'),
        (None, GPU, 'nccl'),
        ('gloo', CPU, 'gloo'),
        ('nccl', CPU, 'gloo'),
        ('cpu:gloo,cuda:nccl', CPU, 'gloo'),
        ('nccl', GPU, 'nccl'),
        ('cpu:gloo,cuda:nccl', GPU, 'cpu:gloo,cuda:nccl'),
        ('gloo', GPU, 'gloo'),
    ],
)
def test_backend(monkeypatch, wanted, device, backend):
    monkeypatch.setattr(dist, 'is_backend_available', lambda name: True)
    assert choose_backend(wanted, device) == backend


def test_a_backend_that_torch_lacks(monkeypatch):
    monkeypatch.setattr(dist, 'is_backend_available', lambda name: name != 'nccl')
    with pytest.raises(LaunchError, match='built without nccl'):
        choose_backend('nccl', GPU)


def set_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)


@pytest.mark.parametrize(
    ('count', 'wanted', 'local_rank', 'local_world_size', 'device'),
    [
        (0, None, 3, 4, 'cpu'),
        (4, None, 3, 4, 'cuda:3'),
        (8, None, 3, 4, 'cuda:3'),
        (1, None, 3, 4, 'cuda:0'),  # each process sees its own
        (4, 'cuda', 2, 4, 'cuda:2'),
        (4, 'cpu', 2, 4, 'cpu'),
        (4, 'cuda:1', 2, 8, 'cuda:1'),
    ],
)
def test_device(monkeypatch, count, wanted, local_rank, local_world_size, device):
    set_gpus(monkeypatch, count)
    assert choose_device(wanted, local_rank, local_world_size) == torch.device(device)


def test_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5')
    set_gpus(monkeypatch, 2)
    with pytest.raises(LaunchError, match=r'found 2 GPUs \(CUDA_VISIBLE_DEVICES=4,5\) for 4 processes'):
        choose_device(None, 1, 4)
    set_gpus(monkeypatch, 0)
    with pytest.raises(LaunchError, match='found 0 GPUs'):
        choose_device('cuda', 0, 1)


@pytest.mark.parametrize(('others', 'sharing'), [(['a', 'b'], None), (['b', 'c', 'b'], '0, 2')])
def test_processes_that_see_the_same_single_gpu(monkeypatch, others, sharing):
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(uuid='b'))
    monkeypatch.setattr(Ranks, 'all_gather', lambda self, value: others)
    if sharing is None:
        _refuse_shared_devices(Ranks(1, 2), GPU)
    else:
        with pytest.raises(LaunchError, match=f'processes {sharing} have the same GPU'):
            _refuse_shared_devices(Ranks(0, 3), GPU)


@pytest.mark.parametrize(
    ('variables', 'threads'), [({}, 3), ({'SLURM_CPUS_PER_TASK': '5'}, 5), ({'OMP_NUM_THREADS': '9'}, None)]
)
def test_cores_are_divided(monkeypatch, variables, threads):
    for name in ('OMP_NUM_THREADS', 'SLURM_CPUS_PER_TASK'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    monkeypatch.setattr('lakonlab.parallel.launch.num_cpus', lambda: 13)
    _share_cpus(local_world_size=4)
    assert chosen == ([] if threads is None else [threads])


def test_only_one_process_reports(caplog):
    with caplog.at_level(logging.INFO):
        choose_backend('nccl', CPU, log=False)
        assert not caplog.text
        choose_backend('nccl', CPU)
        assert "dist_params.backend='nccl'" in caplog.text
