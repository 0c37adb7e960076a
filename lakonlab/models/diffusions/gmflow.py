"""GMFlow: a network that predicts a Gaussian mixture over the velocity (Chen et al., arXiv 2504.05304).

Training maximises the likelihood of a less noisy state given a noisier one. Sampling knows the whole distribution of
``x_0`` at each step: GM-ODE follows its mean, with network-free substeps in between; GM-SDE draws from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lakonlab.models.diffusions.gaussian_flow import (
    GaussianFlow,
    GaussianFlowTestConfig,
    GaussianFlowTrainConfig,
    num_latent_pixels,
)
from lakonlab.models.diffusions.gmflow_spectrum import sample_with_spectrum, spectral_loss
from lakonlab.models.diffusions.gmflow_steps import (
    GuidedMixture,
    ReverseTransition,
    correct_second_order,
    guide,
    posterior_mixture,
    x_0_mixture,
)
from lakonlab.models.diffusions.guidance import check_guided_conditions
from lakonlab.models.section import at_least, in_range, one_of
from lakonlab.ops.isotropic_mixture import GaussianMixture, mixture_mean, sample_mixture
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.ops.shapes import expand_like, select_rows
from lakonlab.phases import phase
from lakonlab.registry import MODULES


@dataclass(kw_only=True)
class GMFlowTrainConfig(GaussianFlowTrainConfig):
    """Keys of ``train_cfg`` that GMFlow reads."""

    trans_ratio: float = 1.0
    """Length of the transition relative to the noisier time: ``t_low = t_high * (1 - trans_ratio)``."""
    eps: float = 1e-4
    """Shortest transition, in units of ``t``."""

    def __post_init__(self):
        super().__post_init__()
        in_range(self, 0, 1, 'trans_ratio')
        at_least(self, 0, 'eps')


@dataclass(kw_only=True)
class GMFlowTestConfig(GaussianFlowTestConfig):
    """Keys of ``test_cfg`` that GMFlow reads. ``guidance_scale`` is probabilistic: w in [0, 1); 0 and 1 mean none."""

    output_mode: str = 'mean'
    """What a step takes for ``x_0``: the ``'mean'`` of the mixture (GM-ODE) or a ``'sample'`` of it (GM-SDE)."""
    order: int = 1
    """Order of the solver, 1 or 2."""
    num_substeps: int = 1
    """Solver steps per network evaluation."""
    gm2_coefs: tuple[float, float] = (0.005, 1.0)
    """Share of the variance that order 2 takes for uncertainty, by itself and under guidance."""
    gm2_correction_steps: int = 0
    """Fixed-point iterations of order 2."""
    orthogonal_guidance: float = 1.0
    """Share of the guidance along the predicted ``x_0`` that is removed."""

    def __post_init__(self):
        super().__post_init__()
        one_of(self, ('mean', 'sample'), 'output_mode')
        one_of(self, (1, 2), 'order')
        at_least(self, 1, 'num_substeps')
        at_least(self, 0, 'gm2_correction_steps')
        in_range(self, 0, 1, 'guidance_scale')


@MODULES.register_module()
class GMFlow(GaussianFlow):
    """A mixture network, and how to train and sample it. See :class:`GaussianFlow` for the other arguments.

    Args:
        denoising: The network; it returns ``means`` (B, K, C, *), ``logweights`` (B, K, 1, *) and ``logstds``
            (B, 1, 1, *1) of a mixture over the velocity.
        spectrum_net: Network that predicts the power spectrum of the noise from which ``'sample'`` mode makes a sample
            of the mixture; without it pixels are drawn independently.
        spectral_loss_weight: Weight of its loss.
    """

    train_cfg_class = GMFlowTrainConfig
    test_cfg_class = GMFlowTestConfig
    guidance_is_probabilistic = True

    def __init__(
        self,
        denoising: nn.Module | dict,
        *args,
        spectrum_net: nn.Module | dict | None = None,
        spectral_loss_weight: float = 1.0,
        **kwargs,
    ):
        super().__init__(denoising, *args, **kwargs)
        if self.predicts_x_0:
            raise ValueError("denoising_mean_mode='X0': a mixture network predicts velocities, set 'U'")
        self.spectrum_net = MODULES.build(spectrum_net) if isinstance(spectrum_net, dict) else spectrum_net
        self.spectral_loss_weight = spectral_loss_weight

    def predict_mixture(self, x_t: Tensor, t: Tensor, source: RandomSource | None = None, **kwargs) -> GaussianMixture:
        """The mixture over the velocity at a state (B, C, *) and time (B,); frames of a video come before channels."""
        output = self.pred(x_t, t, source=source, **kwargs)
        mixture = (output[key] for key in ('means', 'logweights', 'logstds'))
        return GaussianMixture(*(_frames_first(tensor, channel_axis=2) for tensor in mixture))

    def forward_train(
        self,
        x_0: Tensor,
        *,
        running_status: Mapping[str, int] | None = None,
        source: RandomSource | None = None,
        **kwargs,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative log-likelihood of a transition, and the spectral loss if there is a ``spectrum_net``.

        Args:
            x_0: Clean latents, (B, C, *).
            running_status: Unused here; the iteration, for losses that follow a schedule.
            source: Source of the draws ``raw_t`` (B,) and ``noise`` (for ``x_low``, then for ``x_high``).
            **kwargs: Conditions of the network.

        Returns:
            The loss and the values to log.
        """
        source = source or TorchSource()
        cfg = self.train_section()
        times = dict(seq_len=num_latent_pixels(x_0), raw_t_range=(cfg.min_raw_t, cfg.max_raw_t), source=source)
        t_high = self.timestep_sampler(len(x_0), **times)
        t_low = torch.minimum(t_high * (1 - cfg.trans_ratio), t_high - cfg.eps).clamp(min=0)
        frames = _frames_first(x_0)
        noise_low, noise_high = (source.normal('noise', frames.shape, x_0.dtype, x_0.device) for _ in range(2))
        x_low, _, _ = self.sample_forward_diffusion(frames, t_low, noise_low)
        x_high, _, _ = self.sample_forward_transition(x_low, t_low, t_high, noise_high)
        mixture = self.predict_mixture(_frames_last(x_high, x_0.dim()), t_high, source=source, **kwargs)

        sigma_high, sigma_low = (expand_like(t / self.num_timesteps, frames) for t in (t_high, t_low))
        x_0_prediction = x_0_mixture(mixture, x_high, sigma_high)
        x_low_prediction = ReverseTransition.between(sigma_high, sigma_low).of_mixture(x_high, x_0_prediction)
        if self.flow_loss is None:
            raise ValueError('GMFlow was built without flow_loss and cannot be trained')
        loss = self.flow_loss({**x_low_prediction._asdict(), 'x_t_low': x_low, 'timesteps': t_high})
        log_vars = {'loss_transition': loss.detach(), **self.flow_loss.log_vars}
        if self.spectrum_net is not None:
            spectral = self.spectral_loss_weight * spectral_loss(self.spectrum_net, x_0_prediction, frames)
            log_vars['loss_spectral'] = spectral.detach()
            loss = loss + spectral
        return loss, log_vars

    def forward_u(
        self,
        x_t: Tensor,
        t: Tensor,
        guidance_scale: float | None = 0.0,
        test_cfg: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> Tensor:
        """Mean velocity under probabilistic guidance.

        Args:
            x_t: State, (B, C, *).
            t: Time in units of ``num_timesteps``, (B,).
            guidance_scale: w in [0, 1); None, 0 and 1 mean no guidance.
            test_cfg: Overrides of the sampling section.
            **kwargs: Conditions of the network; with guidance they are for 2 B samples, the negative ones first.

        Returns:
            Velocity, (B, C, *), float32 or the wider dtype of ``x_t``.

        Raises:
            ValueError: A scale outside this range, or conditions for the wrong number of samples.
        """
        cfg = self.test_section(test_cfg)
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        t = torch.as_tensor(t).reshape(-1).expand(len(x_t))
        weight = self._guidance_weights(t, guidance_scale, cfg)
        conditional, negative = self._predict_pair(x_t, t, weight, guidance_scale, **kwargs)
        frames = _frames_first(x_t)
        axis = frames - expand_like(t / self.num_timesteps, frames) * mixture_mean(conditional)
        guided = guide(conditional, negative, expand_like(weight, frames), float(cfg.orthogonal_guidance), axis)
        return _frames_last(mixture_mean(guided.mixture), x_t.dim())

    def _guidance_weights(self, t: Tensor, guidance_scale: float | None, cfg: GMFlowTestConfig) -> Tensor:
        """Guidance scale of each sample on the host, 0 where guidance does not act."""
        scale = 0.0 if guidance_scale is None or guidance_scale == 1 else float(guidance_scale)
        if not 0 <= scale < 1:
            raise ValueError(
                f'guidance_scale={guidance_scale}: the guidance of GMFlow is probabilistic; expected None, or 0 up to '
                '1 (exclusive)'
            )
        weight = torch.full(t.shape, scale, dtype=torch.float64)
        if cfg.guidance_interval is not None:
            low, high = cfg.guidance_interval
            weight = torch.where(((t >= low) & (t <= high)).cpu(), weight, 0.0)
        return weight

    def _predict_pair(
        self, x_t: Tensor, t: Tensor, weight: Tensor, guidance_scale: float | None, **kwargs
    ) -> tuple[GaussianMixture, GaussianMixture | None]:
        """The mixtures under the condition and, if any sample is guided, under the negative condition."""
        if guidance_scale is None or guidance_scale in (0, 1):
            return self.predict_mixture(x_t, t, **kwargs), None
        check_guided_conditions(kwargs, len(x_t), guidance_scale)
        if not weight.any():
            return self.predict_mixture(x_t, t, **select_rows(kwargs, slice(len(x_t), None))), None
        both = self.predict_mixture(torch.cat([x_t, x_t]), torch.cat([t, t]), **kwargs)
        negative, conditional = (GaussianMixture(*half) for half in zip(*(tensor.chunk(2) for tensor in both)))
        return conditional, negative

    def num_solver_steps(self, test_cfg_override: Mapping[str, Any] | None = None) -> int:
        cfg = self.test_section(test_cfg_override)
        return super().num_solver_steps(test_cfg_override) * (1 if cfg.sigmas is not None else cfg.num_substeps)

    def num_function_evaluations(self, test_cfg_override: Mapping[str, Any] | None = None) -> int:
        num_steps, num_substeps = (
            self.num_solver_steps(test_cfg_override),
            self.test_section(test_cfg_override).num_substeps,
        )
        if num_steps % num_substeps:
            raise ValueError(f'test_cfg.num_substeps={num_substeps} does not divide the {num_steps} entries of sigmas')
        return num_steps // num_substeps

    @torch.no_grad()
    def forward_test(
        self,
        noise: Tensor,
        guidance_scale: float | None = 0.0,
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
            show_pbar: Show a progress bar over the network evaluations.
            source: Source of the draws ``component`` and ``component_noise`` of ``'sample'`` mode, and ``step_noise``
                of stochastic solvers.
            clamp_denoised: Moves the ``x_0`` of every substep into the range of images.
            **kwargs: Conditions of the network, see :meth:`forward_u`.

        Returns:
            (B, C, *), float32 or the wider dtype of ``noise``.
        """
        source = source or TorchSource()
        cfg = self.test_section(test_cfg_override)
        num_evaluations = self.num_function_evaluations(test_cfg_override)
        x_t = noise.to(torch.promote_types(noise.dtype, torch.float32))
        scheduler = self.build_scheduler(cfg, self.num_solver_steps(test_cfg_override), x_t)
        if len(scheduler.timesteps) != len(scheduler.levels) - 1 or scheduler.order != 1:
            raise ValueError(f'test_cfg.sampler={cfg.sampler!r}: GMFlow needs a solver of order 1')
        levels = scheduler.levels[:: cfg.num_substeps]
        previous: tuple[GuidedMixture, Tensor, Tensor] | None = None
        for k in tqdm(range(num_evaluations), desc='sampling', disable=not show_pbar, leave=False):
            first = k * cfg.num_substeps
            t = scheduler.timesteps[first].expand(len(x_t))
            weight = self._guidance_weights(t, guidance_scale, cfg)
            with phase('network'):
                predictions = self._predict_pair(x_t, t, weight, guidance_scale, **kwargs)
            frames = _frames_first(x_t)
            sigma = _level(scheduler.levels[first], frames)
            conditional, negative = (
                None if mixture is None else x_0_mixture(mixture, frames, sigma) for mixture in predictions
            )
            guided = guide(conditional, negative, expand_like(weight, frames), float(cfg.orthogonal_guidance))
            mixture = guided.mixture
            if cfg.order == 2 and previous is not None:
                before, x_before, sigma_before = previous
                extrapolated = posterior_mixture(before.mixture, x_before, sigma_before, frames, sigma)
                mixture = correct_second_order(
                    guided,
                    mixture_mean(extrapolated),
                    levels[k] - levels[k + 1],
                    levels[k - 1] - levels[k],
                    cfg.gm2_coefs,
                    cfg.gm2_correction_steps,
                )
            previous = guided, frames, sigma
            for i in range(first, first + cfg.num_substeps):
                now = mixture
                if i > first:
                    state = _frames_first(x_t)
                    now = posterior_mixture(mixture, frames, sigma, state, _level(scheduler.levels[i], state))
                x_0 = mixture_mean(now) if cfg.output_mode == 'mean' else self._sample_x_0(now, source)
                x_0 = _frames_last(x_0, x_t.dim())
                if clamp_denoised is not None:
                    x_0 = clamp_denoised(x_0)
                randomness = scheduler.random_arguments(i, source, x_t)
                arguments = dict(prediction_type='x0', return_dict=False, **randomness)
                x_t = scheduler.step(x_0, scheduler.timesteps[i], x_t, **arguments)[0]
        return x_t

    def _sample_x_0(self, mixture: GaussianMixture, source: RandomSource) -> Tensor:
        if self.spectrum_net is None:
            return sample_mixture(mixture, 1, source).squeeze(-4)
        return sample_with_spectrum(self.spectrum_net, mixture, source)


def _level(sigma: float, like: Tensor) -> Tensor:
    """A noise level that all samples share, (B, 1, ...), filled on the device."""
    return like.new_full((len(like), *[1] * (like.dim() - 1)), sigma)


def _frames_first(tensor: Tensor, channel_axis: int = 1) -> Tensor:
    """(B, C, T, H, W) -> (B, T, C, H, W), and likewise (B, K, C, T, H, W) -> (B, T, K, C, H, W); images stay."""
    return tensor.movedim(-3, 1) if tensor.dim() == channel_axis + 4 else tensor


def _frames_last(tensor: Tensor, num_dims: int) -> Tensor:
    """The inverse for states: (B, T, C, H, W) -> (B, C, T, H, W)."""
    return tensor.movedim(1, 2) if num_dims == 5 else tensor
