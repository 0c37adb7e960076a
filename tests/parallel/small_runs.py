"""Small models of every kind, trained for some steps as one of several processes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.roles import named_state
from lakonlab.ops.random_source import SeededSource
from lakonlab.ops.shapes import select_rows
from lakonlab.ranks import Ranks
from lakonlab.registry import MODELS, STRATEGIES
from lakonlab.runner.hooks.ema import ExponentialMovingAverageHook
from lakonlab.runner.optimizer import build_optimizers
from lakonlab.storage.checkpoint import read_state, step_of, write_checkpoint
from lakonlab.storage.pieces import Pieces
from tests import tiny_text_image

GLOBAL_BATCH = 4
CLIP = 0.5
DIT = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=1,
    num_layers=3,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
    class_dropout_prob=0.0,
    checkpointing=False,
)
MIXTURE_LOSS = dict(
    type='GMFlowNLLLoss',
    data_info=dict(pred_means='means', target='x_t_low', pred_logstds='logstds', pred_logweights='logweights'),
    log_cfgs=dict(type='quartile', prefix_name='loss_trans', total_timesteps=1000),
)
STUDENTS = ('GM', 'DX', 'data-free')
SCRATCH = ('digits-GMFlow', 'points-GMFlow')
DIGITS = tuple(f'digits-{student}' for student in STUDENTS)
TEXT_IMAGE = tuple(f'{family}-{student}' for family in ('Flux', 'QwenImage') for student in STUDENTS)
KINDS = (*DIGITS, *TEXT_IMAGE, *SCRATCH)
"""Full fine-tuning, LoRA on a base that teacher, student and average share, and training from scratch."""


def distilled_digits(student: str) -> dict[str, Any]:
    """A student of class-conditional digits, in pixels, of which everything is trained."""
    head = dict(n_grid=3) if student == 'DX' else dict(num_gaussians=3, logstd_inner_dim=12)
    network = 'DXDiTTransformer2DModel' if student == 'DX' else 'GMDiTTransformer2DModelV2'
    return dict(
        type='LatentDiffusionClassImage',
        diffusion=dict(
            type='PiFlowImitationDataFree' if student == 'data-free' else 'PiFlowImitation',
            policy_type='DX' if student == 'DX' else 'GMFlow',
            policy_kwargs=dict(segment_size=1 / 2, shift=1.0) if student == 'DX' else None,
            denoising=dict(type=network, **head, **DIT),
            flow_loss=dict(
                type='DiffusionMSELoss',
                data_info=dict(pred='u_t_pred', target='u_t'),
                rescale_mode='constant',
                rescale_cfg=dict(scale=3.0),
            ),
            num_timesteps=1,
        ),
        diffusion_use_ema=True,
        teacher=dict(type='GaussianFlow', denoising=dict(type='DiTTransformer2DModelMod', **DIT), num_timesteps=1),
        train_cfg=dict(nfe=2, total_substeps=16, num_intermediate_states=2),
        test_cfg=dict(nfe=2, total_substeps=16, latent_size=(1, 8, 8)),
    )


def scratch(family: str) -> dict[str, Any]:
    """A mixture model of digits with a spectrum network, or of points in the plane; there is no teacher.

    Digits are in double precision: their spectral loss inverts distribution functions, which turns a last digit of the
    weights in single precision into 1e-2 of the loss and 1e-5 of the gradient.
    """
    double = dict(torch_dtype='float64')
    if family == 'digits':
        kind = 'LatentDiffusionClassImage'
        network = dict(type='GMDiTTransformer2DModel', num_gaussians=3, logstd_inner_dim=12, **DIT, **double)
        own = dict(spectrum_net=dict(type='SpectrumMLP', base_size=(1, 8, 8), layers=[8, 4], **double))
        train_cfg, test_cfg = dict(prob_class=0.8), dict(latent_size=(1, 8, 8))
    else:
        kind, own, train_cfg, test_cfg = 'Diffusion2D', {}, {}, {}
        network = dict(type='GMFlowMLP2DDenoiser', num_gaussians=4, embed_dim=16, hidden_dim=32, num_layers=2)
    return dict(
        type=kind,
        diffusion=dict(type='GMFlow', denoising=network, flow_loss=MIXTURE_LOSS, num_timesteps=1000, **own),
        diffusion_use_ema=True,
        train_cfg=dict(trans_ratio=0.5, **train_cfg),
        test_cfg=dict(output_mode='sample', num_timesteps=2, **test_cfg),
    )


def build(
    kind: str,
    weights: str | None = None,
    train_cfg: Mapping[str, Any] | None = None,
    networks: Mapping[str, Any] | None = None,
    parts: Mapping[str, Any] | None = None,
    **student: Any,
) -> nn.Module:
    """The model of a kind, the same weights in every process.

    Args:
        kind: One of :data:`KINDS`.
        weights: File of the teacher's weights, see :func:`tests.tiny_text_image.teacher_file`.
        train_cfg: Changes of the training section.
        networks: Changes of all networks.
        parts: Changes of the whole.
        **student: Changes of the student's network.
    """
    torch.manual_seed(0)
    family, _, student_kind = kind.partition('-')
    text_image = family in tiny_text_image.SIZES
    if text_image:
        config = tiny_text_image.config(family, 'DX' if student_kind == 'DX' else 'GM', weights)
        if student_kind == 'data-free':
            config['diffusion']['type'] = 'PiFlowImitationDataFree'
    else:
        config = scratch(family) if student_kind == 'GMFlow' else distilled_digits(student_kind)
    config.update(parts or {})
    config['diffusion']['denoising'].update({**(networks or {}), **student})
    if 'teacher' in config:
        config['teacher']['denoising'].update(networks or {})
    section = {'diffusion_grad_clip': CLIP, **(train_cfg or {})}
    if text_image:
        model = tiny_text_image.build(config, family, **section)
    else:
        config['train_cfg'].update(section)
        model = MODELS.build(config)
    fill_zeros(model)
    return model


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Draw what begins with zeros, such as heads, which would hide mistakes behind them."""
    generator = torch.Generator().manual_seed(5)
    for _, tensor in named_state(model):
        if isinstance(tensor, nn.Parameter) and not tensor.any():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
    student = dict(named_state(model.diffusion))
    for name, tensor in named_state(model.diffusion_ema):
        tensor.copy_(student[name])


def batch_of(kind: str, iteration: int) -> dict[str, Any]:
    """The global batch of an iteration."""
    family = kind.partition('-')[0]
    generator = torch.Generator().manual_seed(iteration)
    if family == 'digits':
        dtype = torch.float64 if kind in SCRATCH else torch.float32
        return {
            'latents': torch.randn(GLOBAL_BATCH, 1, 8, 8, generator=generator, dtype=dtype),
            'labels': torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator),
            'negative_labels': torch.full((GLOBAL_BATCH,), 10),
        }
    if family == 'points':
        return {'x': torch.randn(GLOBAL_BATCH, 2, generator=generator)}
    return tiny_text_image.batch(family, GLOBAL_BATCH, seed=iteration)


class SmallRun:
    """One process of a small run.

    Args:
        ranks: The processes.
        kind: One of :data:`KINDS`.
        strategy: Name of a strategy.
        options: Arguments of the strategy.
        optimizer: Section of the optimiser.
        rows: Rows of the global batch that this process trains on; None for its share.
        **model: See :func:`build`.
    """

    def __init__(
        self,
        ranks: Ranks,
        kind: str,
        strategy: str,
        options: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        rows: slice | None = None,
        **model: Any,
    ):
        share = GLOBAL_BATCH // ranks.world_size
        self.kind, self.iteration = kind, 0
        self.rows = rows or slice(ranks.rank * share, (ranks.rank + 1) * share)
        self.strategy = STRATEGIES.build({'type': strategy, 'ranks': ranks, 'device': 'cpu', **(options or {})})
        self.model = self.strategy.wrap(build(kind, **model)).train()
        section = {'type': 'AdamW', 'lr': 1e-3, 'betas': (0.9, 0.95), **(optimizer or {})}
        self.optimizers = build_optimizers(self.model, {'diffusion': section}, self.strategy.optimizer_class)
        self.average = ExponentialMovingAverageHook(momentum_policy='fixed', momentum_cfg=dict(momentum=0.7))
        self.average.before_train(self._as_runner())

    def _as_runner(self) -> SimpleNamespace:
        return SimpleNamespace(model=self.model, iter=self.iteration, strategy=self.strategy)

    def step(self) -> dict[str, float]:
        """Take one step of training and average; what was logged."""
        data = self.strategy.to_device(select_rows(batch_of(self.kind, self.iteration), self.rows))
        outputs = self.model.train_step(
            data,
            self.optimizers,
            running_status={'iteration': self.iteration, 'epoch': 0},
            source=SeededSource(3, self.iteration, first_row=self.rows.start),
            exchange=self.strategy,
        )
        assert not outputs['skipped']
        self.average.after_train_iter(self._as_runner(), self.iteration)
        self.iteration += 1
        return outputs['log_vars']

    def sample(self) -> dict[str, Tensor]:
        """Role -> samples for this process's rows of the first batch."""
        data = select_rows(batch_of(self.kind, 0), self.rows)
        content = data.pop('latents' if 'latents' in data else 'x')
        generator = torch.Generator().manual_seed(9)
        noise = torch.randn(GLOBAL_BATCH, *content.shape[1:], generator=generator, dtype=content.dtype)
        roles = ('student', 'ema', *(['teacher'] if getattr(self.model, 'teacher', None) is not None else []))
        samples = {}
        self.model.eval()
        for role in roles:
            outputs = self.model.val_step(
                self.strategy.to_device({**data, 'noise': noise[self.rows]}),
                role=role,
                test_cfg_override=dict(num_timesteps=2) if role == 'teacher' else {},
                source=SeededSource(4, first_row=self.rows.start),
            )
            samples[role] = outputs['pred_x' if 'pred_x' in outputs else 'pred_imgs']
        self.model.train()
        return samples

    def model_state(self) -> dict[str, Pieces]:
        """Copies of what this process holds of what a checkpoint holds of the model."""
        return {name: copied(pieces) for name, pieces in self.strategy.model_state(self.model).items()}

    def optimizer_state(self) -> dict[str, Pieces]:
        """Copies of what this process holds of the tensors of the optimiser."""
        tensors, _ = self.strategy.optimizer_state(self.model, self.optimizers)
        return {name: copied(pieces) for name, pieces in tensors.items()}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint."""
        tensors, plain = self.strategy.optimizer_state(self.model, self.optimizers)
        parts = {'model': self.strategy.model_state(self.model), 'optimizer': tensors}
        return write_checkpoint(folder, self.iteration, parts, {'optimizers': plain}, ranks=self.strategy.ranks)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        self.strategy.load_model_state(self.model, checkpoint)
        plain = read_state(checkpoint)['optimizers']
        self.strategy.load_optimizer_state(self.model, self.optimizers, checkpoint, plain)
        self.iteration = step_of(checkpoint)


def train(
    ranks: Ranks, kind: str, strategy: str, num_steps: int = 20, sample_at: Collection[int] = (), **run: Any
) -> dict[str, Any]:
    """Train as one of several processes.

    Args:
        ranks: The processes.
        kind: See :class:`SmallRun`.
        strategy: See :class:`SmallRun`.
        num_steps: Number of steps.
        sample_at: Numbers of steps after which to sample.
        **run: See :class:`SmallRun`.

    Returns:
        ``logs`` of every step, ``samples`` as often as asked for, and what this process holds in the end: ``model``.
    """
    small_run = SmallRun(ranks, kind, strategy, **run)
    logs, samples = [], []
    for step in range(1, num_steps + 1):
        logs.append(small_run.step())
        if step in sample_at:
            samples.append(small_run.sample())
    return {'logs': logs, 'samples': samples, 'model': small_run.model_state()}


def copied(pieces: Pieces) -> Pieces:
    """The same pieces in memory of their own."""
    return replace(pieces, tensors=tuple(tensor.clone() for tensor in pieces.tensors))


def assembled(held: Sequence[Mapping[str, Pieces]]) -> dict[str, Tensor]:
    """Whole tensors of what the processes hold, on the host.

    Raises:
        AssertionError: Processes hold different values of an element, or nobody holds it.
    """
    tensors = {}
    for name in {name: None for part in held for name in part}:
        all_pieces = [part[name] for part in held if name in part]
        whole = torch.zeros(all_pieces[0].shape, dtype=all_pieces[0].dtype)
        known = torch.zeros(whole.shape, dtype=torch.bool)
        for pieces in all_pieces:
            for (offsets, sizes), tensor in zip(pieces.boxes, pieces.tensors):
                tensor = tensor.cpu()
                box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes))
                assert torch.equal(whole[box][known[box]], tensor[known[box]]), name
                whole[box], known[box] = tensor, True
        assert known.all(), name
        tensors[name] = whole
    return tensors


def is_compared(key: str) -> bool:
    """Whether a logged value is the same however a batch is split; running averages by noise level are not."""
    return 'quartile' not in key


def worst_difference(logs: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> float:
    """Largest relative difference of logged losses and gradient norms of two runs."""
    assert len(logs) == len(others)
    worst = 0.0
    for values, expected in zip(logs, others):
        assert values.keys() == expected.keys()
        assert all(map(math.isfinite, values.values()))
        worst = max(
            worst, *(abs(values[key] - expected[key]) / abs(expected[key]) for key in values if is_compared(key))
        )
    return worst
