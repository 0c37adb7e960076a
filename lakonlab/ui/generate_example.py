"""What the example scripts do: one prompt, one image, and how long that takes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lakonlab.ui.pipeline_options import PublishedPipeline, add_pipeline_arguments, build_pipeline, reported, steps_of

SEED = 42
TIMED_CALLS = 3


@dataclass(frozen=True)
class Timing:
    """Where the time of one image goes, in seconds."""

    image: float
    """From the prompt to the picture."""
    network: float
    """In the transformer."""
    rollout: float
    """In following policies."""
    num_steps: int
    """Network evaluations."""

    @property
    def rollout_share(self) -> float:
        """Share of a step that is spent on following its policy."""
        return self.rollout / (self.network + self.rollout)

    def __str__(self) -> str:
        rest = self.image - self.network - self.rollout
        return (
            f'{self.image:.3f} s per image, {(self.network + self.rollout) / self.num_steps:.3f} s per evaluation, of '
            f'which following the policy takes {self.rollout_share:.1%}; prompt and autoencoder {rest:.3f} s'
        )


def time_pipeline(pipe: Any, call: Mapping[str, Any], calls: int = TIMED_CALLS) -> Timing:
    """Time calls of a pipeline, after one that is not counted.

    Args:
        pipe: With an adapter.
        call: Arguments of the call, of one image.
        calls: How many are averaged.
    """
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        _wait(pipe)
        marks.append((name, time.perf_counter()))

    def after_step(pipe, index, t, values):
        mark('step')
        return {}

    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda *_: mark('begin')),
        pipe.transformer.register_forward_hook(lambda *_: mark('network')),
    ]
    try:
        pipe(**call)
        marks.clear()
        start = time.perf_counter()
        for _ in range(calls):
            pipe(**call, callback_on_step_end=after_step)
        _wait(pipe)
        total = time.perf_counter() - start
    finally:
        for hook in hooks:
            hook.remove()
    spent = {'network': 0.0, 'step': 0.0}
    for (_, before), (name, after) in pairwise(marks):
        if name in spent:
            spent[name] += after - before
    num_steps = sum(name == 'network' for name, _ in marks) // calls
    return Timing(total / calls, spent['network'] / calls, spent['step'] / calls, num_steps)


def _wait(pipe: Any) -> None:
    """Until the device has done what it was given."""
    import torch

    if pipe._execution_device.type != 'cpu':
        torch.accelerator.synchronize()


def run_example(published: PublishedPipeline, prompt: str, description: str) -> int:
    """The whole of an example script.

    Args:
        published: Base and adapter, unless the command line names others.
        prompt: Its prompt, unless the command line gives another.
        description: Of the script.
    """
    parser = argparse.ArgumentParser(description=description)
    add_pipeline_arguments(parser, published)
    parser.add_argument('--prompt', default=prompt)
    parser.add_argument('--width', type=int, default=published.width, help='in pixels, a multiple of 16')
    parser.add_argument('--height', type=int, default=published.height, help='in pixels, a multiple of 16')
    parser.add_argument(
        '--steps',
        type=int,
        help=f'network evaluations; by default what the adapter was trained for, {published.steps} if it does not say',
    )
    parser.add_argument('--seed', type=int, default=SEED)
    parser.add_argument('--out', type=Path, help=f'file to write; by default {published.name}_<steps>nfe.png')
    parser.add_argument('--benchmark', action='store_true', help='say how long an image takes, and where the time goes')
    args = parser.parse_args()
    return reported(parser, lambda: generate(args, published))


def generate(args: argparse.Namespace, published: PublishedPipeline, say: Callable[[str], None] = print) -> int:
    """Write an image, and time it if asked to; see :func:`run_example`."""
    import torch

    pipe = build_pipeline(args, published)
    steps = steps_of(pipe, published) if args.steps is None else args.steps
    size = dict(width=args.width, height=args.height)
    call = dict(prompt=args.prompt, num_inference_steps=steps, **size)
    image = pipe(**call, generator=torch.Generator().manual_seed(args.seed)).images[0]
    out = args.out or Path(f'{published.name}_{steps}nfe.png')
    image.save(out)
    say(f'wrote {out}')
    if args.benchmark:
        say(f'{args.width} x {args.height}, {steps} evaluations: {time_pipeline(pipe, call)}')
    return 0
