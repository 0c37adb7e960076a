#!/usr/bin/env python
"""How long training waits for a checkpoint that is written beside it.

python benchmarks/checkpoint_stall.py

A network with 100 MB of weights, averages and moments is trained in steps of some tens of milliseconds. Runs that save
nothing, runs that save every 50 steps beside training, and runs that wait for each save take turns; medians of several.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lakonlab.parallel.checkpoint_writer import CheckpointWriter, SaveJob
from lakonlab.parallel.single import SingleProcess

STATE_BYTES = 100 * 10**6
SAVE_INTERVAL = 50
KINDS = ('no save', 'beside training', 'waiting')


class Whole(nn.Module):
    """A network and its moving average; with two moments a number of it takes 16 bytes."""

    def __init__(self, width: int):
        super().__init__()
        self.diffusion = nn.Linear(width, width, bias=False)
        self.diffusion_ema = nn.Linear(width, width, bias=False).requires_grad_(False)


class Training:
    """Training that saves into a directory.

    Args:
        folder: The directory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.strategy = SingleProcess(device='cpu')
        width = round((STATE_BYTES / 16) ** 0.5)
        self.model = self.strategy.wrap(Whole(width))
        self.optimizers = {'diffusion': torch.optim.AdamW(self.model.diffusion.parameters(), lr=1e-4, fused=True)}
        self.batch = torch.randn(64, width)
        self.count = 0

    def step(self) -> None:
        """One step of training."""
        self.optimizers['diffusion'].zero_grad()
        self.model.diffusion(self.batch).square().mean().backward()
        self.optimizers['diffusion'].step()
        self.model.diffusion_ema.weight.lerp_(self.model.diffusion.weight.detach(), 0.01)

    def save(self, writer: CheckpointWriter) -> float:
        """Save; returns the seconds that training waits."""
        start = time.perf_counter()
        self.count += 1
        tensors, plain = self.strategy.optimizer_state(self.model, self.optimizers)
        parts = {'model': self.strategy.model_state(self.model), 'optimizer': tensors}
        writer.submit(SaveJob(self.folder, self.count, {'optimizers': plain}), parts)
        return time.perf_counter() - start

    def interval(self, writer: CheckpointWriter | None) -> tuple[float, float]:
        """Steps of a save interval, the first right after a save; seconds of all, and of waiting for the save."""
        start = time.perf_counter()
        blocked = self.save(writer) if writer is not None else 0.0
        for _ in range(SAVE_INTERVAL):
            self.step()
        return time.perf_counter() - start, blocked


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Path(folder))
        beside, waiting = CheckpointWriter(), CheckpointWriter(asynchronous=False)
        training.step()
        training.save(beside)  # starts the process and makes the memory
        first = beside.wait()
        written = sum(path.stat().st_size for path in first.rglob('*') if path.is_file())
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        blocked: dict[str, list[float]] = {kind: [] for kind in KINDS}
        cpu = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        start = time.perf_counter()
        for _ in range(repeats):
            for kind, writer in zip(KINDS, (None, beside, waiting)):
                seconds, stall = training.interval(writer)
                beside.wait()
                times[kind].append(seconds)
                blocked[kind].append(stall)
        cores = (resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu) / (time.perf_counter() - start)
        beside.close()
    base = statistics.median(times['no save'])
    state = 16 * training.model.diffusion.weight.numel()
    print(f'state {state / 1e6:.0f} MB, written {written / 1e6:.0f} MB ({written / state:.3f} of it)')
    print(
        f'{os.cpu_count()} cores; training used {cores:.2f} of them with {torch.get_num_threads()} threads, load '
        f'{os.getloadavg()[0]:.1f}'
    )
    print(f'{"":<16}{"50 steps, s":>14}{"spread, s":>12}{"of no save":>12}{"blocked, s":>12}{"step, ms":>10}')
    for kind in KINDS:
        values = times[kind]
        median, stall = statistics.median(values), statistics.median(blocked[kind])
        print(
            f'{kind:<16}{median:>14.2f}{max(values) - min(values):>12.2f}{median / base:>12.3f}{stall:>12.3f}'
            f'{1000 * (median - stall) / SAVE_INTERVAL:>10.1f}'
        )


if __name__ == '__main__':
    main()
