"""What saving a checkpoint costs training: the time that it stands still, and the time that it is slower.

    python benchmarks/checkpoint_stall.py [--cases single ddp fsdp2] [--rounds N]

A run of the digits student, widened until weights, average and moments are about 100 MB, saves every 50 iterations;
processes beside it write, or (the baseline) it writes itself. Blocking is the time of the call that saves. A step is
one while saving if it began before the checkpoint was published. Medians over all saves of all rounds, which alternate
between both ways of writing, with the lowest and the highest value. How busy the cores were is told by the load average
and by the processor time of this benchmark.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from groups import Group  # noqa: E402
from small_models import digits  # noqa: E402

from lakonlab.mmengine_parts import Hook  # noqa: E402
from lakonlab.ranks import Ranks  # noqa: E402
from lakonlab.runner.hooks.checkpoint import CheckpointHook  # noqa: E402
from lakonlab.runner.runner import Runner  # noqa: E402

INTERVAL = 50
CASES = {'single': 1, 'ddp': 2, 'fsdp2': 2}
WIDTH, LAYERS = 288, 4
BATCH = 32
WARM_UP = 10


class Stopwatch(Hook):
    """Notes when iterations begin and end, by the clock of files."""

    priority = 'LOWEST'

    def __init__(self):
        self.begun: list[float] = []
        self.ended: list[float] = []

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """An iteration begins."""
        self.begun.append(time.time())

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """An iteration is over, saving included."""
        self.ended.append(time.time())


class TimedCheckpoints(CheckpointHook):
    """Notes how long each save keeps training waiting. See the base class for the arguments."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.called: list[float] = []
        self.blocked: list[float] = []

    def save(self, runner, step: int, wait: bool = False, for_itself: bool = True) -> None:
        """See the base class."""
        self.called.append(time.time())
        start = time.perf_counter()
        super().save(runner, step, wait, for_itself)
        self.blocked.append(time.perf_counter() - start)


class Runs:
    """Runs of the digits student, as one of several processes.

    Args:
        ranks: The processes.
        strategy: Name of the strategy; ``single`` for one process.
        folder: Where to write, the same for all processes.
    """

    def __init__(self, ranks: Ranks, strategy: str, folder: str):
        self.ranks, self.strategy, self.folder = ranks, strategy, Path(folder)
        logging.disable(logging.WARNING)

    def run(self, asynchronous: bool, saves: int) -> dict[str, Any]:
        """Train, saving some times, and an interval longer.

        Args:
            asynchronous: Whether processes beside the run write.
            saves: Number of checkpoints.
        """
        cfg = digits(BATCH // self.ranks.world_size, WIDTH, num_layers=LAYERS)
        cfg.module_wrapper = None if self.strategy == 'single' else self.strategy
        cfg.total_iters = INTERVAL * (saves + 1) - 1
        cfg.checkpoint_config = None
        cfg.log_config = dict(interval=10**6, hooks=[dict(type='TextLoggerHook')])
        runner = Runner.from_cfg(cfg, work_dir=self.folder / 'logs', validate=False, ranks=self.ranks, device='cpu')
        watch = Stopwatch()
        hook = TimedCheckpoints(interval=INTERVAL, asynchronous=asynchronous, save_last=False)
        runner.hooks = [*runner.hooks, hook, watch]
        runner.checkpoint_hook, runner.checkpoint_dir = hook, self.folder / 'checkpoints'
        before = processor_seconds()
        runner.train()
        processor = processor_seconds() - before
        self.ranks.barrier()
        paths = [runner.checkpoint_dir / f'iter_{INTERVAL * (number + 1)}' for number in range(saves)]
        published = [(path / 'manifest.json').stat().st_mtime for path in paths]
        written = sum(path.stat().st_size for path in paths[-1].rglob('*') if path.is_file())
        parts = [runner.strategy.model_state(runner.model)]
        parts.append(runner.strategy.optimizer_state(runner.model, runner.optimizers)[0])
        pieces = [piece for part in parts for piece in part.values()]
        self.ranks.barrier()
        if self.ranks.is_main:
            shutil.rmtree(self.folder)
        self.ranks.barrier()
        steps: dict[bool, list[float]] = {True: [], False: []}
        for number, (begin, end) in enumerate(zip(watch.begun, watch.ended)):
            if (number + 1) % INTERVAL and number >= WARM_UP:
                during = any(called <= begin < done for called, done in zip(hook.called, published))
                steps[during].append(end - begin)
        return {
            'blocking': hook.blocked,
            'writing': [done - called for called, done in zip(hook.called, published)],
            'saving': steps[True],
            'calm': steps[False],
            'state': sum(piece.dtype.itemsize * piece.size().numel() for piece in pieces),
            'own': sum(piece.num_bytes for piece in pieces),
            'written': written,
            'processor': processor,
        }


def processor_seconds() -> float:
    """Of this process, and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def described(values: list[float]) -> str:
    """Median, lowest and highest value."""
    if not values:
        return 'none'
    low, middle, high = min(values), statistics.median(values), max(values)
    return f'{middle:.3f} s ({low:.3f} to {high:.3f}, {len(values)} values)'


def measure(case: str, rounds: int, saves: int) -> None:
    """Measure one strategy and print what was found."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    processor = 0.0
    load, begin = os.getloadavg()[0], time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        Group(CASES[case], Runs, case, f'{folder}/run', alone=case == 'single') as group,
    ):
        for _ in range(rounds):
            for asynchronous in (True, False):
                results = group.call('run', asynchronous, saves)
                found[asynchronous].append(results[0])
                processor += sum(result['processor'] for result in results)
    busy = processor / (time.perf_counter() - begin) / os.cpu_count()

    def all_of(asynchronous: bool, key: str) -> list[float]:
        return [value for result in found[asynchronous] for value in result[key]]

    calm, saving = statistics.median(all_of(True, 'calm')), all_of(True, 'saving')
    interval = INTERVAL * calm
    one = found[True][0]
    print(f'\n{case}, {CASES[case]} process{"es" if CASES[case] > 1 else ""}: state of {one["state"] / 1e6:.1f} MB')
    print(f'  copied by each process            {one["own"] / 1e6:.1f} MB')
    print(
        f'  written                           {one["written"] / 1e6:.1f} MB, {one["written"] / one["state"]:.4f} of it'
    )
    print(f'  step while nothing is saved       {described(all_of(True, "calm"))}')
    print(f'  step while saving                 {described(saving)}')
    if saving:
        share = len(saving) / len(all_of(True, 'blocking')) / INTERVAL
        print(
            f'  slower while saving               {statistics.median(saving) / calm - 1:+.1%}, {share:.0%} of the steps'
        )
    for title, asynchronous in (('asynchronous', True), ('synchronous', False)):
        blocking = all_of(asynchronous, 'blocking')
        share = statistics.median(blocking) / interval
        print(f'  blocking, {title:<24}{described(blocking)}, {share:.2%} of {interval:.1f} s')
    print(f'  until published, asynchronous     {described(all_of(True, "writing"))}')
    print(
        f'  cores                             {os.cpu_count()}, of which this took {busy:.0%}; '
        f'load before {load:.1f}, after {os.getloadavg()[0]:.1f}',
        flush=True,
    )


def main() -> None:
    """Print what was found for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', choices=list(CASES), default=list(CASES))
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--saves', type=int, default=2, help='checkpoints of a run')
    options = parser.parse_args()
    for case in options.cases:
        measure(case, options.rounds, options.saves)


if __name__ == '__main__':
    main()
