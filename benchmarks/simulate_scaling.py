"""What a step of a config would take on many GPUs: computed from stated assumptions, not measured.

    python benchmarks/simulate_scaling.py configs/piqwen/gmqwen_k8_piid_4step_32gpus.py --gpus 8 32 256 \\
        --global-batch 256 --micro-batch 1 --cfg-options optimizer.diffusion.type=AdamW

Memory is that of the planner behind `tools/train.py CONFIG --dry-run`. Operations are counted in passes of student and
teacher on the meta device. Traffic follows from what the strategies divide. Every assumption about the machine is an
option. docs/scaling.md explains the columns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lakonlab.config.check import check_config
from lakonlab.config.load import load_config
from lakonlab.config.options import parse_options
from lakonlab.parallel.units import repeated_blocks
from lakonlab.runner.dry_run import build_on_meta
from lakonlab.runner.memory_plan import Plan, Sizes, plan
from lakonlab.runner.memory_sizes import latent_size_of, sizes_of

GIGA = 1e9
DIVIDED = ('fsdp', 'fsdp2')


@dataclass(frozen=True)
class Machine:
    """GPUs, and what connects them; the defaults are a node of 8 H100 with 8 links of 400 Gbit/s."""

    flops: float = 990e12
    """Operations per second of a GPU in bfloat16."""
    utilisation: float = 0.4
    """Share of them that training reaches."""
    gpus_per_node: int = 8
    node_bandwidth: float = 300e9
    """Bytes per second that collectives bring to a GPU inside a node (NVLink)."""
    network_bandwidth: float = 320e9
    """Bytes per second that collectives bring to a node from others, over all its links (InfiniBand)."""
    latency: float = 5e-6
    """Seconds from a GPU to the next in a ring."""
    bucket: float = 25 * 2**20
    """Bytes of gradients that data parallelism reduces at a time."""
    host_bandwidth: float = 10e9
    """Bytes per second from a GPU to the memory of its node."""
    disk_bandwidth: float = 2e9
    """Bytes per second that a node writes."""


@dataclass(frozen=True)
class Work:
    """What a config does.

    Args:
        student: Operations of a sample's forward and backward pass, with recomputing where the config checkpoints.
        teacher: Operations of a sample's forward pass without gradient.
        rows: Forward passes of the teacher for a sample in one segment, guidance included.
        queries: Calls of the teacher in one segment.
        segments: Passes of a micro-batch.
        weights: Bytes that are divided and gathered.
        units: Number of units that they are gathered in.
        sizes: Sizes of the memory plan.
    """

    student: float
    teacher: float
    rows: int
    queries: int
    segments: int
    weights: int
    units: int
    sizes: Sizes


@dataclass(frozen=True)
class Step:
    """One optimiser step of one GPU: seconds, and bytes."""

    compute: float
    gather: float
    reduce: float
    gathered: float
    from_network: float

    @property
    def least(self) -> float:
        """Seconds if all traffic goes on while something is computed."""
        return max(self.compute, self.gather + self.reduce)

    @property
    def most(self) -> float:
        """Seconds if nothing goes on at the same time."""
        return self.compute + self.gather + self.reduce


def work_of(cfg, text_tokens: int) -> Work:
    """Count what a config does."""
    model = build_on_meta(cfg, locate=False)
    sizes, _ = sizes_of(model, cfg)
    network, teacher = model.diffusion.denoising, model.teacher.denoising
    inputs = network.example_inputs(1, latent_size_of(cfg), text_length=text_tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as of_teacher:
        teacher(**inputs)
    network.train()
    with FlopCounterMode(display=False) as of_student:
        outputs = [tensor for tensor in tree_leaves(network(**inputs)) if tensor.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    train_cfg = cfg.train_cfg
    states = train_cfg.get('num_intermediate_states', 2)
    guided = (train_cfg.get('teacher_test_cfg') or {}).get('guidance_scale') not in (None, 0, 1)
    return Work(
        student=of_student.get_total_flops(),
        teacher=of_teacher.get_total_flops(),
        rows=states * (2 if guided else 1),
        queries=1 if train_cfg.get('batch_teacher', True) else states,
        segments=train_cfg['nfe'] if getattr(model.diffusion, 'is_multistep', False) else 1,
        weights=sizes.frozen + sizes.trainable,
        units=len(repeated_blocks(_tree(network))) + 1,
        sizes=sizes,
    )


def _tree(network: nn.Module) -> nn.Module:
    backbone = getattr(network, 'backbone', None)
    return network if backbone is None else backbone.tree


def step_of(work: Work, machine: Machine, gpus: int, parts: int, samples: int, micro_batch: int) -> Step:
    """Seconds and traffic of a step.

    Weights are gathered for the student forward and backward and for each call of the teacher, in every pass. Gradients
    are exchanged once: reduced and divided among those that share a copy, and added up over the copies.

    Args:
        work: What the config does.
        machine: The assumptions.
        gpus: Number of GPUs.
        parts: Among how many of them the weights are divided; 1 for data parallelism.
        samples: Samples of a GPU in a step.
        micro_batch: Samples of a pass.
    """
    passes = -(-samples // micro_batch) * work.segments
    operations = samples * work.segments * (work.student + work.rows * work.teacher)
    compute = operations / (machine.flops * machine.utilisation)
    nodes = max(1, gpus // machine.gpus_per_node)
    gathers = passes * (2 + work.queries)
    gathered = gathers * work.weights * (parts - 1) / parts
    nodes_of_copy = max(1, parts // machine.gpus_per_node)
    from_network = gathers * work.weights * (nodes_of_copy - 1) / nodes_of_copy
    gather = max(gathered / machine.node_bandwidth, from_network / machine.network_bandwidth)
    gather += gathers * work.units * (parts - 1) * machine.latency

    gradients = work.sizes.gradients
    copies = gpus // parts
    inside = gradients * (parts - 1) / parts
    across = gradients * (nodes_of_copy - 1) / nodes_of_copy
    rings = work.units * (parts - 1)
    if copies > 1:
        inside += 2 * gradients / parts * (copies - 1) / copies
        node_copies = nodes // nodes_of_copy
        across += 2 * gradients * (node_copies - 1) / node_copies
        rings += 2 * (copies - 1) * (work.units if parts > 1 else -(-gradients // machine.bucket))
    reduce = max(inside / machine.node_bandwidth, across / machine.network_bandwidth) + rings * machine.latency
    return Step(compute, gather, reduce, gathered, from_network + across)


def plan_of(work: Work, strategy: str, gpus: int, parts: int, passes: int) -> Plan:
    """The memory plan, for another number of passes than the config's."""
    sizes = Sizes(**{**{f.name: getattr(work.sizes, f.name) for f in fields(Sizes)}, 'passes': passes})
    return plan(sizes, strategy, gpus, shard_size=parts if strategy in DIVIDED else None)


def ways(gpus: int, machine: Machine) -> list[tuple[str, int]]:
    """Strategies, and among how many GPUs they divide a copy of the weights."""
    node = min(gpus, machine.gpus_per_node)
    found = [('ddp', 1), ('fsdp', node), ('fsdp2', node)]
    return found + [('fsdp', gpus), ('fsdp2', gpus)] * (gpus > node)


def report(work: Work, machine: Machine, counts: Sequence[int], global_batch: int | None, micro_batch: int) -> None:
    """Print the numbers."""
    print(f'operations of a sample     {work.student / 1e12:,.1f} TFLOP student, forward and backward')
    print(f'                           {work.teacher / 1e12:,.1f} TFLOP teacher, asked {work.rows} times in a segment')
    print(f'weights that are gathered  {work.weights / GIGA:,.1f} GB in {work.units} units')
    print(f'gradients                  {work.sizes.gradients / GIGA:,.2f} GB')
    titles = ('passes', 'most', 'after', 'gathered', 'network', 'compute', 'gather', 'reduce', 'step', 'samples/s')
    print('of a step: GiB that a GPU holds at most and afterwards, GB that a GPU gathers and a node receives, seconds')
    print(f'{"GPUs":>5} {"strategy":<9}{"parts":>6}' + ''.join(f'{title:>13}' for title in titles))
    rows = []
    for gpus in counts:
        samples = micro_batch * 8 if global_batch is None else max(1, global_batch // gpus)
        micro = min(micro_batch, samples)
        passes = -(-samples // micro) * work.segments
        for strategy, parts in ways(gpus, machine):
            step = step_of(work, machine, gpus, parts, samples, micro)
            memory = plan_of(work, strategy, gpus, parts, passes)
            cells = (
                f'{passes}',
                f'{(memory.checkpointed or 0) / 2**30:.1f}',
                f'{memory.states / 2**30:.1f}',
                f'{step.gathered / GIGA:,.0f}',
                f'{step.from_network / GIGA:,.1f}',
                f'{step.compute:.2f}',
                f'{step.gather:.2f}',
                f'{step.reduce:.2f}',
                f'{step.least:.1f}-{step.most:.1f}',
                f'{gpus * samples / step.most:.0f}-{gpus * samples / step.least:.0f}',
            )
            print(f'{gpus:>5} {strategy:<9}{parts:>6}' + ''.join(f'{cell:>13}' for cell in cells), flush=True)
            rows.append((gpus, strategy, parts, memory))
    state = work.sizes.saved + work.sizes.optimizer
    print(f'checkpoint                 {state / GIGA:,.1f} GB; of a GPU, in GB, and seconds')
    titles = ('copied to host', 'written', 'copying', 'until written')
    print(f'{"GPUs":>5} {"strategy":<9}{"parts":>6}' + ''.join(f'{title:>16}' for title in titles))
    for gpus, strategy, parts, memory in rows:
        nodes = max(1, gpus // machine.gpus_per_node)
        cells = (
            f'{memory.host / GIGA:.2f}',
            f'{state / gpus / GIGA:.2f}',
            f'{memory.host / machine.host_bandwidth:.2f}',
            f'{state / nodes / machine.disk_bandwidth:.1f}',
        )
        print(f'{gpus:>5} {strategy:<9}{parts:>6}' + ''.join(f'{cell:>16}' for cell in cells))


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--gpus', type=int, nargs='+', default=[8, 32, 256])
    parser.add_argument('--global-batch', type=int, help='samples of a step; 8 micro-batches on every GPU by default')
    parser.add_argument('--micro-batch', type=int, default=1)
    parser.add_argument('--text-tokens', type=int, default=512)
    for entry in fields(Machine):
        parser.add_argument(f'--{entry.name.replace("_", "-")}', type=type(entry.default), default=entry.default)
    options = vars(parser.parse_args())
    machine = Machine(**{entry.name: options[entry.name] for entry in fields(Machine)})
    cfg = load_config(options['config'], parse_options(options['cfg_options']))
    check_config(cfg, planning=True)
    cfg.train_cfg.grad_accum_batch_size = options['micro_batch']
    cfg.model.diffusion.denoising.checkpointing = True
    work = work_of(cfg, options['text_tokens'])
    report(work, machine, options['gpus'], options['global_batch'], options['micro_batch'])


if __name__ == '__main__':
    main()
