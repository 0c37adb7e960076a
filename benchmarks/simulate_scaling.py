#!/usr/bin/env python
"""What a step of a config would take on many GPUs: computed from stated assumptions, not measured.

python benchmarks/simulate_scaling.py configs/piqwen/gmqwen_k8_piid_4step_32gpus.py --gpus 8 32 256

Operations are counted by running the student once on the meta device; memory is that of
`tools/train.py CONFIG --dry-run --plan-world-size 8,32,256`. docs/scaling.md explains the columns.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lakonlab.config.check import check_config
from lakonlab.config.load import load_config
from lakonlab.config.options import parse_options
from lakonlab.models.architecture.roles import named_state
from lakonlab.parallel.state import training_state
from lakonlab.runner.dry_run import build_on_meta
from lakonlab.runner.memory_sizes import bytes_of, latent_size_of


@dataclass
class Machine:
    """GPUs, and what connects them."""

    flops: float = 990e12
    """Operations per second of a GPU in bfloat16 (H100, dense)."""
    utilisation: float = 0.4
    """Share of them that training reaches."""
    node_bandwidth: float = 300e9
    """Bytes per second and GPU of collectives inside a node (NVLink)."""
    network_bandwidth: float = 40e9
    """Bytes per second and GPU of collectives between nodes (InfiniBand, 400 Gbit/s)."""
    gpus_per_node: int = 8
    text_tokens: int = 512
    """Tokens of a prompt."""


@dataclass
class Work:
    """What one process does in a step.

    Args:
        flops: Operations of a forward pass of one sample.
        samples: Samples of one process.
        micro_batches: Micro-batches of a step.
        segments: Segments of a step with a pass of their own.
        queries: Calls of the teacher per segment and micro-batch.
        teacher_rows: Forward passes of the teacher per sample and segment, guidance included.
        frozen: Bytes of the divided weights.
        gradients: Bytes of all gradients.
        saved: Bytes of a checkpoint.
    """

    flops: float
    samples: int
    micro_batches: int
    segments: int
    queries: int
    teacher_rows: int
    frozen: int
    gradients: int
    saved: int

    @property
    def operations(self) -> float:
        """Of a step: the student forward, again for its checkpoints, backward through frozen layers; the teacher."""
        return self.flops * self.samples * self.segments * (3 + self.teacher_rows)

    @property
    def gathers(self) -> int:
        """How often all weights are gathered: the student forward and backward, and each call of the teacher."""
        return self.micro_batches * self.segments * (2 + self.queries)


def work_of(path: str, machine: Machine, options: list[str]) -> Work:
    """Count what a config does."""
    cfg = load_config(path, parse_options(options))
    check_config(cfg, planning=True)
    model = build_on_meta(cfg, locate=False)
    network = model.diffusion.denoising
    inputs = network.example_inputs(1, latent_size_of(cfg), text_length=machine.text_tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**inputs)
    train_cfg, loader = cfg.train_cfg, {**cfg.data, **(cfg.data.get('train_dataloader') or {})}
    samples = loader['samples_per_gpu']
    micro = min(train_cfg.get('grad_accum_batch_size') or samples, samples)
    states = train_cfg.get('num_intermediate_states', 2)
    guided = (train_cfg.get('teacher_test_cfg') or {}).get('guidance_scale') not in (None, 0, 1)
    trained = [p for _, p in named_state(model.diffusion) if p.requires_grad]
    gradients = sum(map(bytes_of, trained))
    state = sum(map(bytes_of, training_state(model).values()))
    return Work(
        flops=counter.get_total_flops(),
        samples=samples,
        micro_batches=samples // micro,
        segments=train_cfg['nfe'] if getattr(model.diffusion, 'is_multistep', False) else 1,
        queries=1 if train_cfg.get('batch_teacher', True) else states,
        teacher_rows=states * (2 if guided else 1),
        frozen=sum(bytes_of(p) for p in network.parameters() if not p.requires_grad),
        gradients=gradients,
        saved=state + 2 * gradients,
    )


def seconds_of(work: Work, machine: Machine, gpus: int, parts: int) -> tuple[float, float, float]:
    """Seconds of a step for computing, for gathering weights, and for exchanging gradients.

    Args:
        work: Of one process.
        machine: The assumptions.
        gpus: Number of GPUs.
        parts: Among how many of them the weights are divided; 1 for data parallelism.
    """

    def bandwidth(count: int) -> float:
        return machine.node_bandwidth if count <= machine.gpus_per_node else machine.network_bandwidth

    compute = work.operations / (machine.flops * machine.utilisation)
    gather = work.gathers * work.frozen * (parts - 1) / parts / bandwidth(parts)
    copies = gpus // parts
    # a reduce-scatter among those that divide the weights, an all-reduce of a part among the copies
    exchange = work.gradients * (parts - 1) / parts / bandwidth(parts)
    exchange += 2 * work.gradients / parts * (copies - 1) / copies / bandwidth(gpus)
    return compute, gather, exchange


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--gpus', type=int, nargs='+', default=[8, 32, 256])
    for name, value in vars(Machine()).items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=type(value), default=value)
    args = vars(parser.parse_args())
    path, options, counts = args.pop('config'), args.pop('cfg_options'), args.pop('gpus')
    machine = Machine(**args)
    work = work_of(path, machine, options)
    print(f'forward pass of a sample   {work.flops / 1e12:,.0f} TFLOP')
    print(f'step of a process          {work.operations / 1e15:,.2f} PFLOP for {work.samples} samples')
    print(f'weights that are divided   {work.frozen / 1e9:,.1f} GB, gathered {work.gathers} times a step')
    print(f'gradients                  {work.gradients / 1e9:,.2f} GB')
    print(f'checkpoint                 {work.saved / 1e9:,.1f} GB')
    print(
        f'{"GPUs":>5} {"weights":<26}{"compute, s":>11}{"gather, s":>11}{"exchange, s":>12}{"overlapped, s":>14}'
        f'{"in turn, s":>12}{"samples/s":>11}{"saved per GPU, GB":>19}'
    )
    for gpus in counts:
        node = min(gpus, machine.gpus_per_node)
        choices = {'whole (ddp)': 1, f'divided by {node}': node, f'divided by {gpus}': gpus}
        for name, parts in choices.items():
            compute, gather, exchange = seconds_of(work, machine, gpus, parts)
            best, worst = max(compute, gather + exchange), compute + gather + exchange
            print(
                f'{gpus:>5} {name:<26}{compute:>11.1f}{gather:>11.1f}{exchange:>12.2f}{best:>14.1f}{worst:>12.1f}'
                f'{gpus * work.samples / best:>11.1f}{work.saved / gpus / 1e9:>19.2f}'
            )


if __name__ == '__main__':
    main()
