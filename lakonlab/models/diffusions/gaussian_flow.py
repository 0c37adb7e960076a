"""Flow matching with a Gaussian source: training, guided velocity and sampling of a velocity network.

``x_t = (1 - sigma) * x_0 + sigma * noise`` and ``u = noise - x_0`` (Lipman et al., "Flow Matching for Generative
Modeling", 2023; Liu et al., "Flow Straight and Fast", 2023). The network is given ``t = sigma * num_timesteps``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lakonlab.models.diffusions.guidance import check_guided_conditions, classifier_free_guidance
from lakonlab.models.diffusions.schedulers import scheduler_class
from lakonlab.models.section import at_least, in_range, one_of, read_section
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.ops.shapes import concatenate_rows, expand_like, select_rows
from lakonlab.phases import phase
from lakonlab.registry import MODULES


@dataclass(kw_only=True)
class GaussianFlowTrainConfig:
    """Keys of ``train_cfg`` that flow matching reads."""

    max_raw_t: float = 1.0
    """Largest schedule time that is trained on."""
    min_raw_t: float = 0.0
    """Smallest schedule time that is trained on."""

    def __post_init__(self):
        in_range(self, 0, 1, 'max_raw_t', 'min_raw_t')


@dataclass(kw_only=True)
class GaussianFlowTestConfig:
    """Keys of ``test_cfg`` that sampling from a velocity network reads."""

    sampler: str = 'FlowEulerODE'
    """Name of the solver: a class of ``schedulers`` without the ending ``Scheduler``."""
    sampler_kwargs: Mapping[str, Any] | None = None
    """Further arguments of the solver."""
    num_timesteps: int | None = None
    """Number of solver steps; by default the model's ``num_timesteps`` if that is larger than 1."""
    sigmas: list[float] | None = None
    """Schedule times at which the steps begin, instead of a uniform grid."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; the wrapper passes it on."""
    guidance_interval: tuple[float, float] | None = None
    """Range of ``t`` (in units of the model's ``num_timesteps``, both ends included) in which guidance acts."""
    orthogonal_guidance: float = 0.0
    """Share of the guidance along the axis that is removed."""
    orthogonal_guidance_axis: str = 'x_0'
    """``'x_0'``, or ``'velocity'`` as published up to 0.1.1."""
    distilled_guidance_scale: float | None = None
    """Guidance given to networks that take it as an input."""
    shift: float | None = None
    """Overrides the shift of the timestep sampler, as the next five override theirs."""
    use_dynamic_shifting: bool | None = None
    base_seq_len: int | None = None
    max_seq_len: int | None = None
    base_logshift: float | None = None
    max_logshift: float | None = None
    latent_size: tuple[int, ...] | None = None
    """Shape of a latent without the batch dimension, where the data brings no noise."""
    max_raw_t: float = 1.0
    """Schedule time at which sampling begins."""
    min_raw_t: float = 0.0
    """Lower end of the uniform grid of schedule times; the last step goes on to clean data."""
    clamp_denoised: bool = False
    """Clamp the predicted ``x_0`` of every step to the range of images."""

    def __post_init__(self):
        at_least(self, 1, 'num_timesteps', 'base_seq_len', 'max_seq_len')
        in_range(self, 0, 1, 'max_raw_t', 'min_raw_t')
        at_least(self, 0, 'guidance_scale', 'distilled_guidance_scale')
        one_of(self, ('x_0', 'velocity'), 'orthogonal_guidance_axis')
        if self.shift is not None and self.shift <= 0:
            raise ValueError(f'shift={self.shift!r}: expected a positive number')

    def shift_overrides(self) -> dict[str, Any]:
        """The shift settings that are given here."""
        names = ('shift', 'use_dynamic_shifting', 'base_seq_len', 'max_seq_len', 'base_logshift', 'max_logshift')
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def num_latent_pixels(x: Tensor) -> int:
    """Product of the spatial (and temporal) sizes of a latent (B, C, *)."""
    return math.prod(x.shape[2:])


@MODULES.register_module()
class GaussianFlow(nn.Module):
    """A velocity network and how to train and sample it.

    Args:
        denoising: The network or its config. It is called as ``denoising(x_t, t, **conditions)``.
        flow_loss: Config of the loss (needed for training).
        num_timesteps: Unit of the time that the network is given, 1000 or 1.
        timestep_sampler: Config of the sampler of training times, which also holds the shift of the schedule.
        flip_model_timesteps: Give the network ``num_timesteps - t``.
        denoising_mean_mode: What the network predicts: ``'U'``, the velocity, or ``'X0'``.
        sigma_min: Floor of the noise level that divides in ``'X0'`` mode.
        train_cfg: The shared training section.
        test_cfg: The shared sampling section.

    Raises:
        ValueError: ``denoising_mean_mode`` is unknown.
    """

    train_cfg_class: type = GaussianFlowTrainConfig
    test_cfg_class: type = GaussianFlowTestConfig
    train_cfg_aliases: Mapping[str, str] = {}

    def __init__(
        self,
        denoising: nn.Module | dict,
        flow_loss: nn.Module | dict | None = None,
        num_timesteps: float = 1000,
        timestep_sampler: dict | None = None,
        flip_model_timesteps: bool = False,
        denoising_mean_mode: str = 'U',
        sigma_min: float = 1e-4,
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if denoising_mean_mode.upper() not in ('U', 'X0'):
            raise ValueError(f"denoising_mean_mode={denoising_mean_mode!r}: expected 'U' or 'X0'")
        self.denoising = MODULES.build(denoising) if isinstance(denoising, dict) else denoising
        self.flow_loss = MODULES.build(flow_loss) if isinstance(flow_loss, dict) else flow_loss
        self.num_timesteps = num_timesteps
        sampler = {'type': 'ContinuousTimeStepSampler', **(timestep_sampler or {})}
        self.timestep_sampler = MODULES.build({**sampler, 'num_timesteps': num_timesteps})
        self.flip_model_timesteps = flip_model_timesteps
        self.predicts_x_0 = denoising_mean_mode.upper() == 'X0'
        self.sigma_min = sigma_min
        self.train_cfg = dict(train_cfg or {})
        self.test_cfg = dict(test_cfg or {})
        self._network_draws = 'source' in inspect.signature(self.denoising.forward).parameters

    def test_section(self, override: Mapping[str, Any] | None = None) -> Any:
        """The sampling section as this class reads it, with overrides."""
        return read_section(self.test_cfg_class, {**self.test_cfg, **(override or {})}, 'test_cfg')

    def train_section(self) -> Any:
        """The training section as this class reads it."""
        return read_section(self.train_cfg_class, self.train_cfg, 'train_cfg', self.train_cfg_aliases)

    def forward(
        self,
        x_0: Tensor | None = None,
        *,
        return_loss: bool = False,
        return_u: bool = False,
        noise: Tensor | None = None,
        **kwargs,
    ):
        """Train, evaluate the velocity, or sample.

        ``model(x_0, return_loss=True, ...)`` is :meth:`forward_train`, ``model(return_u=True, x_t=..., t=...)`` is
        :meth:`forward_u`, ``model(noise=...)`` is :meth:`forward_test`.
        """
        if return_loss:
            return self.forward_train(x_0, **kwargs)
        if return_u:
            return self.forward_u(**kwargs)
        with phase('policy'):
            return self.forward_test(x_0 if noise is None else noise, **kwargs)

    def pred(self, x_t: Tensor, t: Tensor, source: RandomSource | None = None, **kwargs) -> Any:
        """Call the network in its own dtype and return its output in the dtype of ``x_t``.

        Args:
            x_t: State, (B, C, *).
            t: Time in units of ``num_timesteps``, (B,), on any device.
            source: Source of what the network draws while it is trained, if it draws anything.
            **kwargs: Conditions of the network.
        """
        if source is not None and self._network_draws:
            kwargs['source'] = source
        t = t.to(device=x_t.device, dtype=x_t.dtype)
        if self.flip_model_timesteps:
            t = self.num_timesteps - t
        dtype = getattr(self.denoising, 'dtype', None) or next(self.denoising.parameters()).dtype
        output = self.denoising(x_t.to(dtype), t, **kwargs)
        if isinstance(output, dict):
            return {key: value.to(x_t.dtype) for key, value in output.items()}
        output = output.to(x_t.dtype)
        if self.predicts_x_0:
            sigma = expand_like(t if not self.flip_model_timesteps else self.num_timesteps - t, x_t)
            output = (x_t - output) / (sigma / self.num_timesteps).clamp(min=self.sigma_min)
        return output

    def sample_forward_diffusion(self, x_0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x_t = (1 - sigma) * x_0 + sigma * noise``.

        Args:
            x_0: Clean latents, (B, C, *).
            t: Time in units of ``num_timesteps``, (B,).
            noise: Standard normal, same shape as ``x_0``.

        Returns:
            ``x_t``, and the factors of ``x_0`` and ``noise``, (B, 1, *1).
        """
        std = expand_like(t.to(x_0.dtype) / self.num_timesteps, x_0)
        mean = 1 - std
        return mean * x_0 + std * noise, mean, std

    def sample_forward_transition(
        self, x_src: Tensor, t_src: Tensor, t_tgt: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Diffuse a noisy state further, to a later time of the same forward process.

        Args:
            x_src: State, (B, C, *).
            t_src: Its time in units of ``num_timesteps``, (B,), below ``num_timesteps``: pure noise has no later time.
            t_tgt: The later time, (B,).
            noise: Standard normal, same shape as ``x_src``.

        Returns:
            A sample of ``x_tgt`` given ``x_src``, its mean (B, C, *) and its variance (B, 1, *1).
        """
        sigma_src, sigma_tgt = (expand_like(t.to(x_src.dtype) / self.num_timesteps, x_src) for t in (t_src, t_tgt))
        scale = (1 - sigma_tgt) / (1 - sigma_src)
        mean = scale * x_src
        variance = (sigma_tgt.square() - (scale * sigma_src).square()).clamp(min=0)
        return mean + variance.sqrt() * noise, mean, variance

    def forward_train(
        self,
        x_0: Tensor,
        *,
        running_status: Mapping[str, int] | None = None,
        source: RandomSource | None = None,
        **kwargs,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of a batch.

        Args:
            x_0: Clean latents, (B, C, *).
            running_status: Unused here; the iteration, for losses that follow a schedule.
            source: Source of the draws ``raw_t`` (B,) and ``noise`` (shape of ``x_0``).
            **kwargs: Conditions of the network.

        Returns:
            The loss and the values to log.
        """
        source = source or TorchSource()
        cfg = self.train_section()
        t = self.timestep_sampler(
            len(x_0),
            seq_len=num_latent_pixels(x_0),
            raw_t_range=(cfg.min_raw_t, cfg.max_raw_t),
            source=source,
        )
        noise = source.normal('noise', x_0.shape, x_0.dtype, x_0.device)
        x_t, _, _ = self.sample_forward_diffusion(x_0, t, noise)
        u_t_pred = self.pred(x_t, t, source=source, **kwargs)
        loss = self.compute_loss(u_t_pred, noise - x_0, t)
        return loss, {'loss_diffusion': loss.detach(), **self.flow_loss.log_vars}

    def compute_loss(self, u_t_pred: Tensor, u_t: Tensor, timesteps: Tensor) -> Tensor:
        """Loss between predicted and target velocities (B, C, *) at times (B,).

        Raises:
            ValueError: There is no ``flow_loss``.
        """
        if self.flow_loss is None:
            raise ValueError(f'{type(self).__name__} was built without flow_loss and cannot be trained')
        return self.flow_loss({'u_t_pred': u_t_pred, 'u_t': u_t, 'timesteps': timesteps})

    def forward_u(
        self,
        x_t: Tensor,
        t: Tensor,
        guidance_scale: float | None = 1.0,
        test_cfg: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> Tensor:
        """Velocity with classifier-free guidance.

        Args:
            x_t: State, (B, C, *).
            t: Time in units of ``num_timesteps``, (B,). On the host, samples outside the guidance interval are
                evaluated once instead of twice.
            guidance_scale: None, 0 and 1 mean no guidance.
            test_cfg: Overrides of the sampling section (``guidance_interval``, ``orthogonal_guidance``, ...).
            **kwargs: Conditions of the network; with guidance they are for 2 B samples, the negative ones first.

        Returns:
            Velocity, (B, C, *), float32 or the wider dtype of ``x_t``.

        Raises:
            ValueError: A scale strictly between 0 and 1, or conditions for the wrong number of samples.
        """
        cfg = self.test_section(test_cfg)
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        t = torch.as_tensor(t).reshape(-1).expand(len(x_t))
        if guidance_scale is None or guidance_scale in (0, 1):
            return self.pred(x_t, t, **kwargs)
        if 0 < guidance_scale < 1 or guidance_scale < 0:
            raise ValueError(f'guidance_scale={guidance_scale}: expected None, 0 or 1 (no guidance), or more than 1')
        check_guided_conditions(kwargs, len(x_t), guidance_scale)
        negative, positive = (select_rows(kwargs, rows) for rows in (slice(0, len(x_t)), slice(len(x_t), None)))
        active = torch.ones(len(x_t), dtype=torch.bool)
        if cfg.guidance_interval is not None:
            low, high = cfg.guidance_interval
            active = ((t >= low) & (t <= high)).cpu()
        rows = active.nonzero().squeeze(1)
        if len(rows) == 0:
            return self.pred(x_t, t, **positive)
        everyone = len(rows) == len(x_t)
        rows = slice(None) if everyone else rows.to(x_t.device)
        x_active, t_active = x_t[rows], t[rows if everyone else rows.to(t.device)]
        kwargs = concatenate_rows(select_rows(negative, rows), positive)
        output = self.pred(torch.cat([x_active, x_t]), torch.cat([t_active, t]), **kwargs)
        u_negative, u = output[: len(x_active)], output[len(x_active) :]
        guided = self._guide(u[rows], u_negative, guidance_scale, x_active, t_active, cfg)
        if everyone:
            return guided
        return u.index_copy(0, rows, guided)

    def _guide(self, u_positive, u_negative, scale, x_t, t, cfg) -> Tensor:
        axis = None
        if cfg.orthogonal_guidance:
            axis = u_positive
            if cfg.orthogonal_guidance_axis == 'x_0':
                axis = x_t - expand_like(t / self.num_timesteps, x_t) * u_positive
        return classifier_free_guidance(u_positive, u_negative, scale, float(cfg.orthogonal_guidance), axis)

    def num_solver_steps(self, test_cfg_override: Mapping[str, Any] | None = None) -> int:
        """Number of steps of the solver that samples.

        Raises:
            ValueError: It is not configured.
        """
        cfg = self.test_section(test_cfg_override)
        if cfg.sigmas is not None:
            return len(cfg.sigmas)
        if cfg.num_timesteps is not None:
            return cfg.num_timesteps
        if self.num_timesteps <= 1:
            raise ValueError('test_cfg.num_timesteps, the number of solver steps, is needed for num_timesteps=1 models')
        return int(self.num_timesteps)

    def num_function_evaluations(self, test_cfg_override: Mapping[str, Any] | None = None) -> int:
        """Number of network evaluations (NFE) of one sample; guidance counts as part of an evaluation.

        Raises:
            ValueError: The number of solver steps is not configured.
        """
        solver = scheduler_class(self.test_section(test_cfg_override).sampler)
        return solver.num_function_evaluations(self.num_solver_steps(test_cfg_override))

    def build_scheduler(self, cfg: Any, num_steps: int, x: Tensor, **kwargs):
        """The solver that a sampling section asks for, with its grid laid out for latents like ``x``."""
        shift_settings = {**self.timestep_sampler.shift_settings, **cfg.shift_overrides()}
        time_range = {'max_raw_t': cfg.max_raw_t, 'min_raw_t': cfg.min_raw_t}
        arguments = {**kwargs, **shift_settings, **time_range, **(cfg.sampler_kwargs or {})}
        scheduler = scheduler_class(cfg.sampler)(num_train_timesteps=self.num_timesteps, **arguments)
        scheduler.set_timesteps(num_steps, sigmas=cfg.sigmas, seq_len=num_latent_pixels(x))
        return scheduler

    @torch.no_grad()
    def forward_test(
        self,
        noise: Tensor,
        guidance_scale: float | None = 1.0,
        test_cfg_override: Mapping[str, Any] | None = None,
        show_pbar: bool = False,
        source: RandomSource | None = None,
        clamp_denoised: Callable[[Tensor], Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        """Sample clean latents.

        Args:
            noise: Standard normal, (B, C, *).
            guidance_scale: See :meth:`forward_u`.
            test_cfg_override: Overrides of the sampling section.
            show_pbar: Show a progress bar over the steps.
            source: Source of the draws ``step_noise`` of stochastic solvers.
            clamp_denoised: Moves the predicted ``x_0`` of every step into the range of images.
            **kwargs: Conditions of the network, see :meth:`forward_u`.

        Returns:
            (B, C, *), float32 or the wider dtype of ``noise``.
        """
        source = source or TorchSource()
        cfg = self.test_section(test_cfg_override)
        x_t = noise.to(torch.promote_types(noise.dtype, torch.float32))
        scheduler = self.build_scheduler(cfg, self.num_solver_steps(test_cfg_override), x_t)
        for i, t in enumerate(tqdm(scheduler.timesteps, desc='sampling', disable=not show_pbar, leave=False)):
            time = t.expand(len(x_t))
            with phase('network'):
                u = self.forward_u(x_t, time, guidance_scale, test_cfg=test_cfg_override, **kwargs)
            if clamp_denoised is not None:
                u = (x_t - clamp_denoised(x_t - scheduler.levels[i] * u)) / scheduler.levels[i]
            randomness = scheduler.random_arguments(i, source, x_t)
            x_t = scheduler.step(u, t, x_t, return_dict=False, **randomness)[0]
        return x_t
