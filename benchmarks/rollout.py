"""Rollouts against the published way and against what the machine could do; and their share of a training step.

    python benchmarks/rollout.py [--json FILE] [--repeats N]

One thread. Times are medians of processor time, the candidates taking turns; memory is the peak of torch's allocator.
The bound is the larger of two times: reading the inputs and writing the results once at the measured memory bandwidth,
and the multiplications and additions of the formula at the speed of this machine's matrix product.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from measuring import cpu_seconds, keep_freed_memory, peak_bytes
from published_rollout import PublishedGrid, PublishedMixture
from published_rollout import rollout as published_rollout
from torch import nn

from lakonlab.config.load import load_config
from lakonlab.models.diffusions.gaussian_flow import GaussianFlow
from lakonlab.models.diffusions.piflow import PiFlowImitation
from lakonlab.models.diffusions.piflow_policies import DXPolicy, GMFlowPolicy
from lakonlab.ops.mixture_rollout import PREFERRED, backend_module
from lakonlab.ops.patchify import patchify, unpatchify
from lakonlab.ops.random_source import SeededSource
from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.registry import MODELS, MODULES

SHAPES = {
    'B8 K32 C4 32x32, 128 substeps': dict(batch=8, components=32, channels=4, size=32, substeps=128),
    'B1 K8 C16 128x128, 32 substeps': dict(batch=1, components=8, channels=16, size=128, substeps=32),
}
CPU = torch.device('cpu')
EXP_OPERATIONS = 12  # of an exponential and its share of the softmax


class Machine:
    """What the machine can do on one thread, in bytes and operations per second."""

    def __init__(self):
        block = torch.ones(32 * 1024 * 1024)
        target = torch.empty_like(block)
        seconds = cpu_seconds({'copy': lambda: target.copy_(block)}, 5)['copy']
        self.bandwidth = 2 * block.numel() * block.element_size() / seconds
        matrix = torch.randn(768, 768)
        seconds = cpu_seconds({'product': lambda: matrix @ matrix}, 9)['product']
        self.operations = 2 * 768**3 / seconds

    def bound(self, num_bytes: float, num_operations: float) -> float:
        return max(num_bytes / self.bandwidth, num_operations / self.operations)


def mixture_case(batch: int, components: int, channels: int, size: int, **_):
    generator = torch.Generator().manual_seed(0)
    output = {
        'means': torch.randn(batch, components, channels, size, size, generator=generator),
        'logweights': torch.randn(batch, components, 1, size, size, generator=generator).log_softmax(dim=1),
        'logstds': torch.full((batch, 1, 1, 1, 1), math.log(0.2)),
    }
    return output, torch.randn(batch, channels, size, size, generator=generator), torch.ones(batch)


def backends() -> list[str]:
    fastest = PREFERRED['cpu']
    is_missing = backend_module('auto', CPU) is backend_module('torch', CPU)
    return ['torch'] if is_missing else ['torch', fastest]


def forward_rows(machine: Machine, repeats: int) -> list[dict]:
    rows = []
    for title, case in SHAPES.items():
        output, x, sigma = mixture_case(**case)
        counts = torch.full((case['batch'],), case['substeps'])
        schedule = rollout_schedule(sigma, torch.zeros(case['batch']), case['substeps'], 1.0)

        def plain():
            published_rollout(PublishedMixture(output, x, sigma), x, 1.0, 0.0, counts, checkpointing=False)

        def ours(backend):
            GMFlowPolicy(output, x, sigma, rollout_backend=backend).rollout(x, schedule)

        functions = {'published': plain, **{name: lambda name=name: ours(name) for name in backends()}}
        pixels = case['batch'] * case['size'] ** 2
        operations = pixels * case['substeps'] * case['components'] * (4 * case['channels'] + EXP_OPERATIONS)
        num_bytes = 4 * (output['means'].numel() + output['logweights'].numel() + 3 * x.numel())
        with torch.no_grad():
            rows += table_rows(f'GM forward, {title}', functions, repeats, machine.bound(num_bytes, operations))
    return rows


def average_rows(machine: Machine, repeats: int) -> list[dict]:
    rows = []
    for title, case in SHAPES.items():
        substeps = 32
        output, x, sigma = mixture_case(**case)
        leaves = {key: value.requires_grad_() for key, value in output.items()}
        counts = torch.full((case['batch'],), substeps)
        raw_end = torch.full((case['batch'],), 0.5)

        def plain():
            x_end = published_rollout(PublishedMixture(leaves, x, sigma), x, 1.0, 0.5, counts, checkpointing=True)
            return torch.autograd.grad(((x - x_end) / 0.5).square().mean(), tuple(leaves.values()))

        def ours(backend):
            policy = GMFlowPolicy(leaves, x, sigma, rollout_backend=backend)
            u = policy.average_velocity(x, sigma, raw_end, 2 * substeps, 1.0)
            return torch.autograd.grad(u.square().mean(), tuple(leaves.values()))

        functions = {'published': plain, **{name: lambda name=name: ours(name) for name in backends()}}
        pixels = case['batch'] * case['size'] ** 2
        # forward twice, then five passes over the means and one over the weights per substep
        per_component = 14 * case['channels'] + 2 * EXP_OPERATIONS
        operations = pixels * substeps * case['components'] * per_component
        num_bytes = 4 * (3 * output['means'].numel() + 2 * output['logweights'].numel() + 5 * x.numel())
        title = f'GM mean velocity, 32 substeps, fwd + bwd, {title.split(",")[0]}'
        rows += table_rows(title, functions, repeats, machine.bound(num_bytes, operations))
    return rows


def dx_rows(machine: Machine, repeats: int) -> list[dict]:
    rows = []
    num_points = 10
    for title, case in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        shape = (case['batch'], case['channels'], case['size'], case['size'])
        x, sigma = torch.randn(shape, generator=generator), torch.ones(case['batch'])
        output = torch.randn(shape[0], num_points, *shape[1:], generator=generator)
        counts = torch.full((case['batch'],), case['substeps'])
        schedule = rollout_schedule(sigma, torch.zeros(case['batch']), case['substeps'], 1.0)
        functions = {
            'published': lambda: published_rollout(PublishedGrid(output, x, sigma), x, 1.0, 0.0, counts, False),
            'ours': lambda: DXPolicy(output, x, sigma).rollout(x, schedule),
        }
        num_bytes = 4 * (output.numel() + 2 * x.numel())
        title = title.replace(f'K{case["components"]}', f'N{num_points}')
        with torch.no_grad():
            bound = machine.bound(num_bytes, 2 * output.numel())
            rows += table_rows(f'DX forward, {title}', functions, 3 * repeats, bound)
    return rows


def table_rows(title: str, functions: dict, repeats: int, bound: float) -> list[dict]:
    seconds = cpu_seconds(functions, repeats)
    memory = {name: peak_bytes(function) for name, function in functions.items()}
    rows = [
        dict(
            case=title,
            name=name,
            seconds=seconds[name],
            speedup=seconds['published'] / seconds[name],
            peak_mb=memory[name] / 1e6,
        )
        for name in functions
    ]
    return [*rows, dict(case=title, name='bound of this machine', seconds=bound)]


class TinyFlux(nn.Module):
    """diffusers' FLUX transformer at a small size on unpatchified latents; with ``components``, a mixture head."""

    def __init__(self, channels: int, components: int | None = None):
        super().__init__()
        from diffusers import FluxTransformer2DModel

        self.components, self.channels = components, channels
        tokens = 4 * channels
        self.transformer = FluxTransformer2DModel(
            in_channels=tokens,
            out_channels=tokens if components is None else components * (tokens + 4),
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(16, 24, 24),
        )
        self.logstds = nn.Parameter(torch.tensor(math.log(0.2)))
        self.register_buffer('text', torch.randn(1, 64, 64))

    def forward(self, x, t):
        batch, _, height, width = x.shape
        height, width = height // 2, width // 2
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        image_ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).to(x)
        text = self.text.expand(batch, -1, -1)
        packed = self.transformer(
            hidden_states=patchify(x, 2).flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=text[:, 0],
            timestep=t,
            img_ids=image_ids,
            txt_ids=image_ids.new_zeros(text.shape[1], 3),
            return_dict=False,
        )[0].mT.unflatten(2, (height, width))
        if self.components is None:
            return unpatchify(packed, 2)
        means, logits = packed.split([self.components * 4 * self.channels, self.components * 4], dim=1)
        split = (unpatchify(part, 2).unflatten(1, (self.components, -1)) for part in (means, logits))
        means, logits = split
        logstds = self.logstds.expand(batch, 1, 1, 1, 1)
        return {'means': means, 'logweights': logits.log_softmax(dim=1), 'logstds': logstds}


def tiny_dit(components: int | None) -> nn.Module:
    head = dict(type='DiTTransformer2DModelMod')
    if components is not None:
        head = dict(type='GMDiTTransformer2DModelV2', num_gaussians=components, logstd_inner_dim=64)
        head['gm_num_logstd_layers'] = 2
    return MODULES.build(
        dict(
            **head,
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=4,
            num_layers=4,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    )


class NetworkClock:
    """Processor time of a step spent in forward calls of networks, and when the backward pass reached the student's."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self.seconds = self.backward_start = self._start = 0.0
        for network in (student, teacher):
            network.register_forward_pre_hook(self._before)
            network.register_forward_hook(self._after)

    def _before(self, network, arguments):
        self._start = time.process_time()

    def _after(self, network, arguments, output):
        self.seconds += time.process_time() - self._start
        for value in output.values() if isinstance(output, dict) else ():
            value.register_hook(self._gradient_arrived)

    def _gradient_arrived(self, gradient):
        self.backward_start = time.process_time()


def step_rows(repeats: int) -> list[dict]:
    """Share of forward and backward of pi-ID that is not spent in the networks."""
    rows = []
    train_cfg = dict(nfe=4, num_intermediate_states=2, window_substeps=3, policy_dropout=0.1)
    flow_loss = dict(type='DiffusionMSELoss')
    cases = {
        'tiny DiT, B8 K32 C4 32x32': (tiny_dit(32), tiny_dit(None), (8, 4, 32, 32)),
        'tiny FLUX, B1 K8 C16 64x64': (TinyFlux(16, 8), TinyFlux(16), (1, 16, 64, 64)),
    }
    for title, (student_net, teacher_net, shape) in cases.items():
        student = PiFlowImitation(
            student_net, policy_type='GMFlow', flow_loss=flow_loss, num_timesteps=1, train_cfg=train_cfg
        )
        teacher = GaussianFlow(teacher_net.requires_grad_(False), num_timesteps=1)
        x_0 = torch.randn(shape)
        with_labels = title.startswith('tiny DiT')
        conditions = {'class_labels': torch.zeros(len(x_0), dtype=torch.long)} if with_labels else {}

        clock = NetworkClock(student_net, teacher_net)
        shares, totals = [], []
        for _ in range(repeats + 1):
            student.zero_grad()
            clock.seconds = 0.0
            start = time.process_time()
            loss, _ = student.forward_train(
                x_0, teacher=teacher, teacher_kwargs=conditions, source=SeededSource(0), **conditions
            )
            loss.backward()
            end = time.process_time()
            totals.append(end - start)
            shares.append(1 - (clock.seconds + end - clock.backward_start) / totals[-1])
        seconds, share = statistics.median(totals[1:]), statistics.median(shares[1:])
        rows.append(dict(case=f'pi-ID step, {title}', name='outside the networks', seconds=seconds, share=share))
    return rows


def batched_teacher_row(repeats: int) -> dict:
    """A data-free digits step with 4 states and micro-batches of 2: the teacher asked once, or state by state."""
    config = Path(__file__).parents[1] / 'configs/digits/gmdit_k8_digits_datafree_piid_2step.py'
    cfg = load_config(config)
    model_cfg = cfg.model.to_dict()
    for part in ('diffusion', 'teacher'):
        model_cfg[part]['denoising'].pop('pretrained')
    data = {
        'latents': torch.zeros(4, 1, 8, 8),
        'labels': torch.arange(4),
        'negative_labels': torch.full((4,), 10),
    }
    steps = {}
    for name, batched in (('published', False), ('ours', True)):
        train_cfg = {
            **cfg.train_cfg.to_dict(),
            'num_intermediate_states': 4,
            'grad_accum_batch_size': 2,
            'batch_teacher': batched,
        }
        model = MODELS.build(dict(**model_cfg, train_cfg=train_cfg, test_cfg=cfg.test_cfg.to_dict()))
        optimizer = torch.optim.AdamW(model.diffusion.parameters(), lr=1e-5)

        def step(model=model, optimizer=optimizer):
            model.train_step(data, {'diffusion': optimizer}, source=SeededSource(0))

        steps[name] = step
    seconds = cpu_seconds(steps, 3 * repeats)
    return dict(
        case='data-free digits step, 4 states, micro-batch 2',
        name='teacher asked once per segment',
        seconds=seconds['ours'],
        speedup=seconds['published'] / seconds['ours'],
    )


def show(rows: list[dict]) -> None:
    print(f'{"case":<64}{"what":<32}{"ms":>9}{"speed-up":>10}{"peak MB":>9}{"share":>8}')
    for row in rows:
        cells = [f'{row["case"]:<64}{row["name"]:<32}{row["seconds"] * 1e3:>9.2f}']
        cells.append(f'{row["speedup"]:>10.2f}' if 'speedup' in row else ' ' * 10)
        cells.append(f'{row["peak_mb"]:>9.1f}' if 'peak_mb' in row else ' ' * 9)
        cells.append(f'{row["share"]:>8.1%}' if 'share' in row else '')
        print(''.join(cells).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--json', type=Path, help='write the figures, which are printed as JSON below the table, to this file too'
    )
    parser.add_argument('--repeats', type=int, default=5, help='repetitions of each measurement')
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    machine = Machine()
    rows = [
        *forward_rows(machine, arguments.repeats),
        *average_rows(machine, arguments.repeats),
        *dx_rows(machine, arguments.repeats),
        *step_rows(arguments.repeats),
        batched_teacher_row(arguments.repeats),
    ]
    show(rows)
    print(
        f'one thread of {torch.backends.cpu.get_cpu_capability()}, {machine.bandwidth / 1e9:.1f} GB/s copied, '
        f'{machine.operations / 1e9:.0f} GFLOP/s in a matrix product, {time.perf_counter() - start:.0f} s in all'
    )
    print(json.dumps(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
    main()
