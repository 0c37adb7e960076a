"""What the trainable wholes share: teacher, student and EMA, the training step, and patchified latents."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lakonlab.models.architecture.roles import SharedNetwork
from lakonlab.models.section import at_least, read_section
from lakonlab.models.training_step import Around, GradientExchange, alone, training_step
from lakonlab.ops.patchify import patchify, unpatchify
from lakonlab.ops.random_source import RandomSource
from lakonlab.phases import phase
from lakonlab.registry import MODULES

ROLES = ('student', 'ema', 'teacher')


@dataclass(kw_only=True)
class BaseDiffusionTrainConfig:
    """Keys of ``train_cfg`` that every whole reads, besides ``<optimizer>_grad_clip`` and its like."""

    grad_accum_batch_size: int | None = None
    """Size of a micro-batch; None for the whole batch at once."""
    teacher_test_cfg: Mapping[str, Any] | None = None
    """Sampling section of the teacher during distillation (``guidance_scale``, ``guidance_interval``, ...)."""
    teacher_guidance_scale: float | None = None
    """Older place of ``teacher_test_cfg.guidance_scale``."""
    teacher_distilled_guidance_scale: float | None = None
    """Older place of ``teacher_test_cfg.distilled_guidance_scale``."""
    diffusion_grad_clip: float = 0.0
    """Largest L2 norm of the gradient; 0 for no clipping."""
    diffusion_grad_clip_begin_iter: int = 0
    """First iteration that is clipped."""
    diffusion_grad_clip_skip_ratio: float = 0.0
    """Skip the step if the norm exceeds ``diffusion_grad_clip`` times this; 0 for never."""

    def __post_init__(self):
        at_least(self, 1, 'grad_accum_batch_size')
        at_least(self, 0, 'diffusion_grad_clip', 'diffusion_grad_clip_begin_iter', 'diffusion_grad_clip_skip_ratio')

    def teacher_section(self) -> dict[str, Any]:
        """Sampling section of the teacher, from its present and its older place."""
        older = {
            'guidance_scale': self.teacher_guidance_scale,
            'distilled_guidance_scale': self.teacher_distilled_guidance_scale,
        }
        return {**{key: value for key, value in older.items() if value is not None}, **(self.teacher_test_cfg or {})}


class BaseDiffusion(nn.Module):
    """A student, optionally its frozen teacher and its moving average (EMA), and how one step trains it.

    Args:
        diffusion: Config of what is trained.
        diffusion_use_ema: Keep a moving average of it.
        tie_ema: Share the frozen parameters of student and EMA.
        teacher: Config of the teacher.
        tie_teacher: Let the student use the teacher's frozen tensors: one base for both.
        patch_size: Trade resolution of the latents for channels, see :func:`lakonlab.ops.patchify.patchify`.
        inference_only: Build no teacher, and let the EMA be the student itself.
        vae: Config of the autoencoder; None for pixel space.
        train_cfg: The shared training section.
        test_cfg: The shared sampling section.

    Raises:
        ValueError: ``tie_teacher`` without anything frozen to share.
    """

    train_cfg_class: type = BaseDiffusionTrainConfig

    def __init__(
        self,
        diffusion: dict,
        diffusion_use_ema: bool = False,
        tie_ema: bool = True,
        teacher: dict | None = None,
        tie_teacher: bool = False,
        patch_size: int = 1,
        inference_only: bool = False,
        vae: dict | None = None,
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.train_cfg, self.test_cfg = dict(train_cfg or {}), dict(test_cfg or {})
        sections = {'train_cfg': self.train_cfg, 'test_cfg': self.test_cfg}
        self.vae = MODULES.build(vae).requires_grad_(False) if vae is not None else None
        self.teacher = None
        if teacher is not None and not inference_only:
            self.teacher = MODULES.build({**teacher, **sections}).requires_grad_(False).eval()
        elif teacher is not None and tie_teacher:
            base = weights_of_base(teacher['denoising'], diffusion['denoising'])
            diffusion = {**diffusion, 'denoising': {**diffusion['denoising'], **base}}
        is_tied = tie_teacher and self.teacher is not None
        has_roles = is_tied and isinstance(self.teacher.denoising, SharedNetwork)
        if has_roles:
            diffusion = {**diffusion, 'denoising': {**diffusion['denoising'], 'share_with': self.teacher.denoising}}
        self.diffusion = MODULES.build({**diffusion, **sections})
        if is_tied and not has_roles:
            tie_frozen_modules(self.diffusion.denoising, self.teacher.denoising)
        self.diffusion_use_ema = diffusion_use_ema
        self.diffusion_ema = None
        if diffusion_use_ema:
            self.diffusion_ema = self.diffusion if inference_only else average_of_diffusion(self.diffusion, tie_ema)
        self.patch_size = patch_size
        self.train()

    @property
    def train_section(self) -> Any:
        """The training section as this class reads it."""
        return read_section(self.train_cfg_class, self.train_cfg, 'train_cfg')

    def train(self, mode: bool = True) -> BaseDiffusion:
        """Set the student's mode; teacher, EMA and autoencoder are always in evaluation mode.

        On a base that they share, teacher and EMA change the mode while they play (see
        :class:`~lakonlab.models.architecture.roles.Backbone`).
        """
        super().train(mode)
        for module in (self.teacher, self.diffusion_ema, self.vae):
            if module is not None and module is not self.diffusion:
                module.eval()
        return self

    def patchify(self, x: Tensor) -> Tensor:
        """Trade resolution for channels by ``patch_size``."""
        return patchify(x, self.patch_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`patchify`."""
        return unpatchify(x, self.patch_size)

    @property
    def device(self) -> torch.device:
        """Device of the student."""
        return next(self.diffusion.parameters()).device

    def role(self, name: str | None = None) -> nn.Module:
        """The module that plays a role.

        Args:
            name: ``'student'``, ``'ema'`` or ``'teacher'``; None for the EMA if there is one, else the student.

        Raises:
            ValueError: There is no such role in this model.
        """
        if name is None:
            name = 'ema' if self.diffusion_ema is not None else 'student'
        if name not in ROLES:
            raise ValueError(f'role={name!r}: expected one of {", ".join(ROLES)}')
        module = {'student': self.diffusion, 'ema': self.diffusion_ema, 'teacher': self.teacher}[name]
        if module is None:
            raise ValueError(f'role={name!r}: this model was built without it')
        return module

    def train_minibatch(
        self,
        data: dict[str, Any],
        running_status: Mapping[str, int],
        source: RandomSource,
        loss_factor: float,
        around: Around = alone,
    ) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch.

        Args:
            data: The micro-batch.
            running_status: ``iteration``, from 0, and ``epoch``.
            source: Source of random numbers.
            loss_factor: Factor of the loss.
            around: What surrounds every forward and backward pass.

        Returns:
            The values to log, detached.
        """
        raise NotImplementedError(f'{type(self).__name__} does not say how it is trained')

    def backward_losses(
        self, x_0: Tensor, source: RandomSource, loss_factor: float, around: Around = alone, **kwargs
    ) -> dict[str, Tensor]:
        """Train the diffusion on latents, going backward as soon as a loss is there.

        Args:
            x_0: Latents, (B, C, *).
            source: Source of random numbers.
            loss_factor: Factor of the loss.
            around: What surrounds every forward and backward pass.
            **kwargs: Further arguments of the diffusion's ``forward_train``.
        """
        if not getattr(self.diffusion, 'is_multistep', False):
            with around(True), phase('student'):
                loss, log_vars = self.diffusion(x_0, return_loss=True, source=source, **kwargs)
                (loss * loss_factor).backward()
            return log_vars
        log_vars: dict[str, Tensor] = {}
        state = self.diffusion.initial_segment_state(x_0, source)
        while state is not None:
            with around(self.diffusion.is_last_segment(state)), phase('student'):
                loss, logs, state = self.diffusion(x_0, return_loss=True, segment_state=state, source=source, **kwargs)
                (loss * loss_factor).backward()
            log_vars = {**log_vars, **{key: log_vars.get(key, 0) + value for key, value in logs.items()}}
        return log_vars

    def train_step(
        self,
        data: dict[str, Any],
        optimizer: Mapping[str, Optimizer],
        loss_scaler: torch.amp.GradScaler | None = None,
        running_status: Mapping[str, int] | None = None,
        source: RandomSource | None = None,
        exchange: GradientExchange | None = None,
    ) -> dict[str, Any]:
        """Take one optimiser step. See :func:`lakonlab.models.training_step.training_step`.

        Args:
            data: The batch.
            optimizer: The optimisers by the path of what they train, ``{'diffusion': ...}``.
            loss_scaler: Scaler of float16 training.
            running_status: ``iteration``, from 0, and ``epoch``.
            source: Source of every random number of the step.
            exchange: How processes share the step; None for one process.
        """
        status = dict(running_status or {'iteration': 0})

        def minibatch(part: dict[str, Any], part_source: RandomSource, factor: float, around: Around):
            scale = 1.0 if loss_scaler is None else float(loss_scaler.get_scale())
            return self.train_minibatch(part, status, part_source, factor * scale, around)

        iteration = status['iteration']
        return training_step(data, optimizer, minibatch, self.train_cfg, iteration, source, loss_scaler, exchange)

    def teacher_guidance(self) -> tuple[float | None, dict[str, Any]]:
        """Guidance scale of the teacher and the rest of its sampling section."""
        section = self.train_section.teacher_section()
        return section.pop('guidance_scale', None), section


def average_of_diffusion(diffusion: nn.Module, tie_frozen: bool) -> nn.Module:
    """A copy of a diffusion for its moving average.

    Args:
        diffusion: What is trained.
        tie_frozen: Share what is frozen.
    """
    memo: dict[int, Any] = {}
    if tie_frozen:
        memo = {id(parameter): parameter for parameter in diffusion.parameters() if not parameter.requires_grad}
        network = diffusion.denoising
        if memo and isinstance(network, SharedNetwork):
            memo[id(network)] = network.as_average()
    return copy.deepcopy(diffusion, memo).requires_grad_(False)


def needs_negative(guidance_scale: float | None) -> bool:
    """Whether guidance of this scale compares with a negative condition."""
    return guidance_scale not in (None, 0, 1)


def weights_of_base(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the weights that a tied student leaves to its teacher, for when there is no teacher.

    Args:
        teacher: Config of the teacher's network.
        student: Config of the student's.
    """
    left = ['pretrained'] if not student.get('pretrained') else []
    left += ['pretrained_lora', 'pretrained_lora_scale'] if not student.get('pretrained_lora') else []
    return {key: teacher[key] for key in left if key in teacher}


def tie_frozen_modules(student: nn.Module, teacher: nn.Module) -> None:
    """Let the student use the teacher's submodules wherever both are frozen and hold the same values.

    Raises:
        ValueError: Frozen submodules of the same name differ, or none is shared.
    """
    num_tied = 0

    def tie(student_module: nn.Module, teacher_module: nn.Module, path: str) -> None:
        nonlocal num_tied
        for name, child in list(student_module.named_children()):
            other = getattr(teacher_module, name, None)
            here = f'{path}.{name}' if path else name
            if not isinstance(other, nn.Module):
                continue
            parameters = list(child.parameters())
            if parameters and not any(p.requires_grad for p in [*parameters, *other.parameters()]):
                states = child.state_dict(), other.state_dict()
                same = states[0].keys() == states[1].keys() and all(
                    a.is_meta or torch.equal(a, states[1][key].to(a)) for key, a in states[0].items()
                )
                if not same:
                    raise ValueError(
                        f'tie_teacher=True, but the frozen {here} of student and teacher differ: load both from the'
                        ' same weights, or set tie_teacher=False'
                    )
                setattr(student_module, name, other)
                num_tied += 1
            else:
                tie(child, other, here)

    tie(student, teacher, '')
    if num_tied == 0:
        raise ValueError('tie_teacher=True, but student and teacher share no frozen submodule: set tie_teacher=False')
