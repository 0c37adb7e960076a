"""Starts the real ``tools/train.py`` on the digit configs with few, small iterations, and compares what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lakonlab.phases import OTHER, PHASES
from lakonlab.storage.checkpoint import find_checkpoint, list_checkpoints, read_state, read_tensors, step_of
from lakonlab.storage.remote_path import AnyPath, as_path

ROOT = Path(__file__).parents[2]
TEACHER = 'dit_digits_teacher'
DATA_BASED = 'gmdit_k8_digits_piid_1step'
DATA_FREE = 'gmdit_k8_digits_datafree_piid_2step'
# The average starts, clipping starts and the warm-up ends within the few iterations of a test.
GLOBAL_BATCH = 8
SMALL = {
    'custom_hooks.0.start_iter': 5,
    'train_cfg.diffusion_grad_clip_begin_iter': 7,
    'lr_config.warmup_iters': 9,
    'log_config.interval': 3,
}
TIMING = {'time', 'data_time', 'it_per_s', 'samples_per_s', 'tokens_per_s', 'memory_mb', 'memory'}
TIMING |= {f'share_{name}' for name in (*PHASES, OTHER)}


def children(pid: int) -> list[int]:
    """Processes that a process has started; none if it is gone."""
    try:
        threads = list(Path(f'/proc/{pid}/task').iterdir())
        return [int(child) for thread in threads for child in (thread / 'children').read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have started."""
    return [other for child in children(pid) for other in (child, *descendants(child))]


def command_line(pid: int) -> str:
    """How a process was started; empty if it is gone."""
    try:
        return Path(f'/proc/{pid}/cmdline').read_bytes().replace(b'\0', b' ').decode()
    except OSError:
        return ''


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Wait for processes to end; returns those that have not."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if command_line(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@dataclass
class Training:
    """A training command in a directory of its own.

    Args:
        folder: Working directory; logs and checkpoints lie below it.
        config: Name of the run; the stem of a file in ``configs/digits``, unless ``file`` is given.
        options: ``--cfg-options`` beyond those that make iterations small.
        file: The config.
        validate: Whether to evaluate while training.
        processes: Number of processes, started by torchrun if there are several; the global batch stays the same.
        place: Where directories of checkpoints lie; None for ``checkpoints`` in the working directory.
    """

    folder: Path
    config: str
    options: dict
    file: Path | None = None
    validate: bool = False
    processes: int = 1
    place: str | None = None

    @property
    def command(self) -> list[str]:
        return self.command_of('train', *(() if self.validate else ('--no-validate',)))

    def command_of(self, tool: str, *arguments: str) -> list[str]:
        """Command line of ``tools/<tool>.py`` for this config."""
        options = {**SMALL, 'data.train_dataloader.samples_per_gpu': GLOBAL_BATCH // self.processes, **self.options}
        if self.place is not None:
            options['checkpoint_config.out_dir'] = self.place
        # the launcher chooses a free port itself
        torchrun = ('-m', 'torch.distributed.run', '--rdzv_backend', 'c10d', '--rdzv_endpoint', 'localhost:0')
        several = self.processes > 1
        return [
            sys.executable,
            *((*torchrun, '--nproc_per_node', str(self.processes)) if several else ()),
            str(ROOT / 'tools' / f'{tool}.py'),
            str(self.file or ROOT / 'configs' / 'digits' / f'{self.config}.py'),
            *arguments,
            *(('--launcher', 'pytorch') if several else ()),
            '--cfg-options',
            *(f'{key}={value}' for key, value in options.items()),
        ]

    def start(self, command: list[str] | None = None) -> subprocess.Popen:
        """Start it, or another command in its place; the output is added to ``output.txt``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
        with open(self.folder / 'output.txt', 'ab') as output:
            command = command or self.command
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output, stderr=output)

    def run(self, command: list[str] | None = None) -> str:
        """Run it, or another command in its place, to its end; returns what all its processes printed."""
        process = self.start(command)
        try:
            code = process.wait(timeout=120)
        finally:
            process.kill()
        assert code == 0, self.output
        return self.output

    def workers(self, process: subprocess.Popen) -> list[int]:
        """The processes that torchrun has started."""
        return [pid for pid in children(process.pid) if 'tools/train.py' in command_line(pid)]

    @property
    def output(self) -> str:
        return (self.folder / 'output.txt').read_text()

    @property
    def checkpoints(self) -> AnyPath:
        """Directory of the checkpoints."""
        return (self.folder / 'checkpoints' if self.place is None else as_path(self.place)) / self.config

    @property
    def newest_step(self) -> int:
        """Completed iterations of the newest checkpoint, 0 if there is none."""
        return max(map(step_of, list_checkpoints(self.checkpoints)), default=0)

    def wait_for(self, process: subprocess.Popen, condition) -> None:
        """Wait until a condition holds or the process has ended."""
        pause = 0.002 if self.place is None else 0.05  # a server has other things to do than to answer us
        while process.poll() is None and not condition():
            threading.Event().wait(pause)

    def result(self) -> dict:
        """Weights, averages, optimiser and counters of the newest checkpoint, bit for bit."""
        path = find_checkpoint(self.checkpoints)
        state = read_state(path)
        tensors = {
            f'{part}/{name}': (tensor.dtype, tensor.numpy().tobytes())
            for part in ('model', 'optimizer')
            for name, tensor in read_tensors(path, part).items()
        }
        window = {key: value for key, value in state['log_window'].items() if key.split('/')[1] not in TIMING}
        counters = {key: state[key] for key in ('iteration', 'guard', 'data', 'optimizers')}
        return {**tensors, **counters, 'log_window': window}

    def logged(self) -> dict[int, list[dict]]:
        """Iteration -> everything logged for it, without figures that depend on time; more than once after a crash."""
        lines = (self.folder / 'work_dirs' / self.config / 'scalars.json').read_text().splitlines()
        entries: dict[int, list[dict]] = {}
        for entry in map(json.loads, lines):
            entries.setdefault(entry['step'], []).append({k: v for k, v in entry.items() if k not in TIMING})
        return entries


def assert_same_run(training: Training, reference: Training) -> None:
    """Assert that two runs ended with the same bits and logged the same values at every iteration."""
    result, expected = training.result(), reference.result()
    assert set(result) == set(expected)
    different = [name for name, value in expected.items() if repr(value) != repr(result[name])]
    where = f'{training.folder} differs from {reference.folder} in {len(different)} of {len(expected)} entries'
    assert not different, f'{where}, among them {different[:4]}'
    logged, logged_by_reference = training.logged(), reference.logged()
    assert set(logged) == set(logged_by_reference)
    for step, entries in logged.items():
        for entry in entries:
            assert entry == logged_by_reference[step][0], f'iteration {step}'


def trained_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Model tensors of the newest checkpoint."""
    return read_tensors(find_checkpoint(training.checkpoints), 'model')
