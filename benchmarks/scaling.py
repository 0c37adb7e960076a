"""Step time and peak memory of every strategy with one process and with two, against one process alone.

    python benchmarks/scaling.py [--models digits flux] [--rounds N] [--steps N]

The global batch is the same everywhere, so that two processes do the work of one. All groups of processes are alive at
once and take turns, so that whatever else the machine does falls on all of them alike. Wall time is that of process 0;
processor time is the sum over the processes, which waiting for each other is not charged to. Medians over the rounds,
and the lowest and the highest round as shares of the median. Memory is the most that process 0 held at once, by torch's
allocator, in further processes that are recorded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from groups import Group  # noqa: E402
from small_models import Training  # noqa: E402

CASES = [('single', 1), ('ddp', 1), ('fsdp', 1), ('fsdp2', 1), ('ddp', 2), ('fsdp', 2), ('fsdp2', 2)]
BATCH = {'digits': 64, 'flux': 4}


class TimedTraining(Training):
    """A small model in training, with a clock. See the base class for the arguments."""

    def timed_steps(self, count: int) -> tuple[float, float]:
        """Take steps.

        Returns:
            Wall seconds and processor seconds of this process for one step.
        """
        self.ranks.barrier()
        wall, processor = time.perf_counter(), time.process_time()
        self.steps(count)
        self.ranks.barrier()
        return (time.perf_counter() - wall) / count, (time.process_time() - processor) / count


def spread(values: list[float]) -> str:
    """How far the lowest and the highest value are from the median."""
    middle = statistics.median(values)
    return f'{min(values) / middle - 1:+.0%} {max(values) / middle - 1:+.0%}'


def measure(name: str, rounds: int, steps: int) -> None:
    """Measure one model and print its rows."""
    times: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in CASES}
    with ExitStack() as stack:
        groups = {}
        for strategy, world_size in CASES:
            arguments: dict[str, Any] = dict(alone=strategy == 'single')
            group = Group(world_size, TimedTraining, name, strategy, BATCH[name], **arguments)
            groups[strategy, world_size] = stack.enter_context(group)
            group.call('steps', 3)
        for _ in range(rounds):
            for case, group in groups.items():
                results = group.call('timed_steps', steps)
                times[case].append((results[0][0], sum(processor for _, processor in results)))
    reference = [statistics.median(values) for values in zip(*times['single', 1])]
    held = 0
    for (strategy, world_size), measured in times.items():
        with Group(
            world_size, TimedTraining, name, strategy, BATCH[name], alone=strategy == 'single', record=True
        ) as group:
            peak = group.call('peaks')[0]['planned']
        held = held or peak
        walls, processors = zip(*measured)
        wall, processor = statistics.median(walls), statistics.median(processors)
        print(
            f'{name:<8}{strategy:<8}{world_size:>10}{wall * 1e3:>11.0f}{wall / reference[0]:>9.2f}{spread(walls):>14}'
            f'{processor * 1e3:>11.0f}{processor / reference[1]:>9.2f}{spread(processors):>14}'
            f'{peak / 2**20:>10.1f}{peak / held:>9.2f}',
            flush=True,
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=list(BATCH), default=list(BATCH))
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--steps', type=int, default=5, help='steps of a group in a round')
    options = parser.parse_args()
    print(f'{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}; ratios are to one process alone', flush=True)
    print(
        f'{"model":<8}{"strategy":<8}{"processes":>10}{"wall, ms":>11}{"ratio":>9}{"spread":>14}'
        f'{"CPU, ms":>11}{"ratio":>9}{"spread":>14}{"peak, MB":>10}{"ratio":>9}',
        flush=True,
    )
    for name in options.models:
        measure(name, options.rounds, options.steps)
    print(f'load after {os.getloadavg()[0]:.1f}')


if __name__ == '__main__':
    main()
