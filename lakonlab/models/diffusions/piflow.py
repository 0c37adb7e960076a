"""pi-Flow: a few-step generator whose network predicts a policy (Chen et al., "pi-Flow", arXiv 2510.14974).

Sampling: for each segment, network -> policy -> rollout -> scheduler step. Training: imitation of a frozen teacher,
either from noised data (:class:`PiFlowImitation`) or along the student's own trajectory from pure noise
(:class:`PiFlowImitationDataFree`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lakonlab.models.diffusions.gaussian_flow import GaussianFlow, GaussianFlowTestConfig, num_latent_pixels
from lakonlab.models.diffusions.imitation import ImitationPairs, imitate_segment
from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES, Policy
from lakonlab.models.section import at_least, in_range, one_of
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.ops.shapes import expand_like, repeat_groups
from lakonlab.ops.time_shift import unwarp, warp
from lakonlab.phases import phase
from lakonlab.registry import MODULES


@dataclass(kw_only=True)
class PiFlowTrainConfig:
    """Keys of ``train_cfg`` that imitation distillation reads."""

    nfe: int
    """Number of segments, one network evaluation each."""
    final_step_size_scale: float = 1.0
    """Length of the last segment relative to the others."""
    total_substeps: int = 128
    """Substeps of the policy per unit of schedule time."""
    num_intermediate_states: int = 2
    """Teacher queries per segment."""
    window_substeps: int = 0
    """Window of the averaged velocity, in substeps."""
    policy_dropout: float = 0.0
    """Probability of dropping a component of the policy that explores."""
    num_decay_iters: int = 0
    """Iterations over which the share of the trajectory that follows the teacher decays from 1 to 0; 0 for none."""
    batch_teacher: bool = True
    """Ask the teacher at all states of a segment in one call where its answers do not move the state."""
    substep_rounding: str = 'round'
    """``'round'``, or ``'ceil'`` as published in 0.2.0."""
    eps: float = 1e-4
    """Floor of times, of the last segment's length and of intervals that divide."""

    def __post_init__(self):
        at_least(self, 1, 'nfe', 'total_substeps', 'num_intermediate_states')
        at_least(self, 0, 'final_step_size_scale', 'window_substeps', 'num_decay_iters', 'eps')
        in_range(self, 0, 1, 'policy_dropout')
        one_of(self, ('round', 'ceil'), 'substep_rounding')


@dataclass(kw_only=True)
class PiFlowTestConfig(GaussianFlowTestConfig):
    """Keys of ``test_cfg`` that sampling from a policy network reads."""

    sampler: str = 'FlowMapSDE'
    nfe: int | None = None
    """Number of segments; may be left out if ``sigmas`` is given."""
    final_step_size_scale: float = 1.0
    """Length of the last segment relative to the others."""
    total_substeps: int = 128
    """Substeps of the policy per unit of schedule time."""
    temperature: float = 1.0
    """Temperature of the policy on all but the last segment; 1 for none."""
    substep_rounding: str = 'round'
    """``'round'``, or ``'ceil'`` as published in 0.2.0."""
    eps: float = 1e-4
    """Floor of noise levels in the policy."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, 'nfe', 'total_substeps')
        at_least(self, 0, 'final_step_size_scale', 'temperature', 'eps')
        one_of(self, ('round', 'ceil'), 'substep_rounding')


class PiFlow(GaussianFlow):
    """A network that predicts a policy, and how to sample it. See :class:`GaussianFlow` for the other arguments.

    Args:
        denoising: The network; its output is what the policy is made from.
        policy_type: Name in :data:`POLICY_CLASSES`.
        policy_kwargs: Further arguments of the policy.

    Raises:
        ValueError: The policy is unknown.
    """

    train_cfg_class = PiFlowTrainConfig
    test_cfg_class = PiFlowTestConfig
    train_cfg_aliases = {'gm_dropout': 'policy_dropout'}

    def __init__(
        self, denoising: nn.Module | dict, *args, policy_type: str, policy_kwargs: Mapping | None = None, **kwargs
    ):
        if policy_type not in POLICY_CLASSES:
            raise ValueError(f'policy_type={policy_type!r}: expected one of {", ".join(POLICY_CLASSES)}')
        super().__init__(denoising, *args, **kwargs)
        if self.predicts_x_0:
            raise ValueError("denoising_mean_mode='X0': a policy network predicts velocities, set 'U'")
        self.policy_class = POLICY_CLASSES[policy_type]
        self.policy_kwargs = dict(policy_kwargs or {})

    def build_policy(self, output: Any, x_src: Tensor, sigma_src: Tensor, **kwargs) -> Policy:
        """The policy of a network output at a state (B, C, *) and noise level (B,)."""
        return self.policy_class(output, x_src, sigma_src, **{**kwargs, **self.policy_kwargs})

    def policy_rollout(
        self,
        x_t_start: Tensor,
        raw_t_start: Tensor,
        raw_t_end: Tensor,
        total_substeps: int,
        policy: Policy,
        seq_len: int | None = None,
        rounding: str = 'round',
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Follow a policy from one schedule time to another.

        Args:
            x_t_start: State, (B, C, *).
            raw_t_start: Its schedule time in [0, 1], (B,).
            raw_t_end: The later (smaller) schedule time, (B,).
            total_substeps: Substeps per unit of schedule time.
            policy: The policy.
            seq_len: Latent pixels, for dynamic shifting; by default those of ``x_t_start``.
            rounding: See :func:`rollout_schedule`.

        Returns:
            The state at the end (B, C, *), its noise level (B, 1, *1) and its time ``t`` (B,).
        """
        seq_len = num_latent_pixels(x_t_start) if seq_len is None else seq_len
        shift = self.timestep_sampler.get_shift(seq_len)
        schedule = rollout_schedule(raw_t_start, raw_t_end, total_substeps, shift, rounding)
        sigma_end = schedule.sigmas[:, -1].to(device=x_t_start.device, dtype=x_t_start.dtype)
        x_t_end = policy.rollout(x_t_start, schedule)
        return x_t_end, expand_like(sigma_end, x_t_start), sigma_end * self.num_timesteps

    def policy_average_u(
        self,
        x_t_start: Tensor,
        raw_t_start: Tensor,
        raw_t_end: Tensor,
        total_substeps: int,
        policy: Policy,
        seq_len: int | None = None,
        eps: float = 1e-4,
        rounding: str = 'round',
    ) -> Tensor:
        """Mean velocity (B, C, *) of :meth:`policy_rollout`, or the local one where less than two substeps fit."""
        seq_len = num_latent_pixels(x_t_start) if seq_len is None else seq_len
        shift = self.timestep_sampler.get_shift(seq_len)
        return policy.average_velocity(x_t_start, raw_t_start, raw_t_end, total_substeps, shift, rounding, eps)

    def num_function_evaluations(self, test_cfg_override: Mapping[str, Any] | None = None) -> int:
        cfg = self.test_section(test_cfg_override)
        if cfg.nfe is None and cfg.sigmas is None:
            raise ValueError(
                'test_cfg.nfe, the number of network evaluations, is needed to sample from a policy network'
            )
        if cfg.nfe is not None and cfg.sigmas is not None and cfg.nfe != len(cfg.sigmas):
            raise ValueError(f'test_cfg.nfe={cfg.nfe}, but test_cfg.sigmas has {len(cfg.sigmas)} entries')
        return int(cfg.nfe or len(cfg.sigmas))

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
        """Sample clean latents with one network evaluation per segment.

        Args:
            noise: Standard normal, (B, C, *).
            guidance_scale: Must mean no guidance: the teacher's is distilled into the student.
            test_cfg_override: Overrides of the sampling section.
            show_pbar: Show a progress bar over the segments.
            source: Source of the draws ``step_noise`` of stochastic sampling.
            clamp_denoised: Must be None: a policy has no single ``x_0`` per step.
            **kwargs: Conditions of the network.

        Returns:
            (B, C, *), float32 or the wider dtype of ``noise``.

        Raises:
            ValueError: A guidance scale other than None, 0 or 1.
        """
        if guidance_scale not in (None, 0, 1):
            raise ValueError(f'test_cfg.guidance_scale={guidance_scale}: a policy network is sampled without guidance')
        if clamp_denoised is not None:
            raise ValueError('test_cfg.clamp_denoised=True: a policy network has no single x_0 per step to clamp')
        source = source or TorchSource()
        cfg = self.test_section(test_cfg_override)
        num_steps = self.num_function_evaluations(test_cfg_override)
        x_t = noise.to(torch.promote_types(noise.dtype, torch.float32))
        grid = {'final_step_size_scale': cfg.final_step_size_scale}
        scheduler = self.build_scheduler(cfg, num_steps, x_t, **grid)
        shift = scheduler.get_shift(num_latent_pixels(x_t))
        for i, t in enumerate(tqdm(scheduler.timesteps, desc='sampling', disable=not show_pbar, leave=False)):
            sigma_src, sigma_dst = (
                torch.full((len(x_t),), sigma, dtype=torch.float64)
                for sigma in (scheduler.levels[i], scheduler.destinations[i])
            )
            with phase('network'):
                output = self.pred(x_t, t.expand(len(x_t)), **kwargs)
            policy = self.build_policy(output, x_t, sigma_src, eps=cfg.eps)
            if cfg.temperature < 1 and i < num_steps - 1:
                policy = policy.temperature(cfg.temperature)
            raw_src, raw_dst = unwarp(sigma_src, shift), unwarp(sigma_dst, shift)
            schedule = rollout_schedule(raw_src, raw_dst, cfg.total_substeps, shift, cfg.substep_rounding)
            x_t = policy.rollout(x_t, schedule)
            step_kwargs = {}
            if scheduler.noise_scale(i) > 0:
                step_kwargs['noise'] = source.normal('step_noise', x_t.shape, x_t.dtype, x_t.device)
            x_t = scheduler.step(x_t, t, return_dict=False, **step_kwargs)[0]
        return x_t

    def _teacher_velocity(self, teacher: nn.Module, teacher_kwargs: Mapping[str, Any], batch_size: int):
        """The teacher as a function of states and noise levels, without gradient and in evaluation mode."""
        settings = {key: value for key, value in teacher_kwargs.items() if key in ('guidance_scale', 'test_cfg')}
        conditions = {key: value for key, value in teacher_kwargs.items() if key not in settings}

        @torch.no_grad()
        def velocity(x_t: Tensor, sigma_t: Tensor) -> Tensor:
            was_training = teacher.training
            teacher.eval()
            t = (sigma_t * self.num_timesteps).to(x_t.dtype)
            repeated = repeat_groups(conditions, batch_size, len(x_t) // batch_size)
            with phase('teacher'):
                u = teacher(return_u=True, x_t=x_t, t=t, **repeated, **settings)
            teacher.train(was_training)
            return u.to(x_t.dtype)

        return velocity

    def teacher_ratio(self, iteration: int) -> float:
        """Share of the trajectory that follows the teacher: ``1 - min(iteration, N) / N`` for N decay iterations."""
        num_decay_iters = self.train_section().num_decay_iters
        return 1 - min(iteration, num_decay_iters) / num_decay_iters if num_decay_iters > 0 else 0.0

    def segment_sizes(self) -> tuple[float, float]:
        """Length in schedule time of the segments, and of the last one."""
        cfg = self.train_section()
        scale = max(cfg.final_step_size_scale, cfg.eps)
        base = 1 / (cfg.nfe - 1 + scale)
        return base, scale * base

    def piid_segment(
        self,
        teacher: nn.Module,
        policy: Policy,
        x_t_src: Tensor,
        raw_t_src: Tensor,
        segment_size: Tensor,
        teacher_ratio: float = 0.0,
        teacher_kwargs: Mapping[str, Any] | None = None,
        seq_len: int | None = None,
        source: RandomSource | None = None,
    ) -> tuple[Tensor, ImitationPairs, Policy]:
        """Imitation loss of one segment.

        Args:
            teacher: Module called as ``teacher(return_u=True, x_t=..., t=..., **teacher_kwargs)``.
            policy: The live policy of the segment.
            x_t_src: State at its start, (B, C, *).
            raw_t_src: Schedule time of its start, (B,).
            segment_size: Its length in schedule time, (B,).
            teacher_ratio: Share of the segment that follows the teacher.
            teacher_kwargs: Conditions and guidance of the teacher.
            seq_len: Latent pixels, for dynamic shifting; by default those of ``x_t_src``.
            source: Source of the draws ``dropout``, ``student_intervals`` and ``teacher_intervals``.

        Returns:
            The loss, the pairs it was made from, and the detached policy that moved the state.
        """
        cfg = self.train_section()
        source = source or TorchSource()
        explorer = policy.detach()
        if cfg.policy_dropout > 0:
            explorer = explorer.dropout(cfg.policy_dropout, source)
        pairs = imitate_segment(
            policy,
            explorer,
            self._teacher_velocity(teacher, teacher_kwargs or {}, len(x_t_src)),
            x_t_src,
            raw_t_src,
            segment_size,
            num_intermediate_states=cfg.num_intermediate_states,
            total_substeps=cfg.total_substeps,
            shift=self.timestep_sampler.get_shift(num_latent_pixels(x_t_src) if seq_len is None else seq_len),
            window_substeps=cfg.window_substeps,
            teacher_ratio=teacher_ratio,
            batch_teacher=cfg.batch_teacher,
            rounding=cfg.substep_rounding,
            eps=cfg.eps,
            source=source,
        )
        timesteps = (pairs.sigmas * self.num_timesteps).to(x_t_src.dtype)
        return self.compute_loss(pairs.u_pred, pairs.u_teacher, timesteps), pairs, explorer

    def _predict_policy(self, x_src: Tensor, raw_src: Tensor, source: RandomSource, **kwargs) -> Policy:
        shift = self.timestep_sampler.get_shift(num_latent_pixels(x_src))
        sigma_src = warp(raw_src, shift)
        output = self.pred(x_src, sigma_src * self.num_timesteps, source=source, **kwargs)
        return self.build_policy(output, x_src, sigma_src)

    def _check_trainable(self, teacher: nn.Module | None) -> None:
        if teacher is None:
            raise ValueError(f'{type(self).__name__} is trained by a teacher: set model.teacher in the config')
        if self.timestep_sampler.logit_normal_enable:
            raise ValueError('pi-ID draws its segments uniformly: set timestep_sampler.logit_normal_enable=False')
        unit = getattr(teacher, 'num_timesteps', self.num_timesteps)
        if unit != self.num_timesteps:
            raise ValueError(
                f'model.teacher.num_timesteps={unit} differs from model.diffusion.num_timesteps={self.num_timesteps}; '
                'the time given to both networks must have the same unit'
            )


@MODULES.register_module()
class PiFlowImitation(PiFlow):
    """pi-ID from data: the segment begins at noised clean latents, in a segment drawn in proportion to its length."""

    def sample_t(self, batch_size: int, source: RandomSource | None = None) -> tuple[Tensor, Tensor]:
        """Draw a segment for each sample.

        Args:
            batch_size: Number of samples B.
            source: Source of the draw ``raw_t``.

        Returns:
            Schedule time of the start of the segment and its length, (B,) each, float64.
        """
        cfg = self.train_section()
        base, last = self.segment_sizes()
        raw_t = self.timestep_sampler(batch_size, warp_t=False, scale_t=False, source=source).double()
        raw_t = raw_t.clamp(min=cfg.eps)
        index = (raw_t / base + (1 - last / base)).ceil().clamp(1, cfg.nfe)
        raw_t_src = ((index - 1) * base + last).clamp(cfg.eps, 1)
        return raw_t_src, torch.where(index == 1, last, base).double()

    def forward_train(
        self,
        x_0: Tensor,
        *,
        teacher: nn.Module | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
        running_status: Mapping[str, int] | None = None,
        source: RandomSource | None = None,
        **kwargs,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Imitation loss of a batch.

        Args:
            x_0: Clean latents, (B, C, *).
            teacher: The frozen teacher.
            teacher_kwargs: Its conditions and guidance.
            running_status: ``iteration``, for the decay of the teacher's share.
            source: Source of the draws ``raw_t``, ``noise``, ``dropout``, ``student_intervals``, ``teacher_intervals``.
            **kwargs: Conditions of the student.

        Returns:
            The loss and the values to log.
        """
        self._check_trainable(teacher)
        source = source or TorchSource()
        raw_src, segment_size = self.sample_t(len(x_0), source)
        noise = source.normal('noise', x_0.shape, x_0.dtype, x_0.device)
        sigma_src = self.timestep_sampler.warp_t(raw_src, num_latent_pixels(x_0))
        x_src, _, _ = self.sample_forward_diffusion(x_0, sigma_src * self.num_timesteps, noise)
        policy = self._predict_policy(x_src, raw_src, source, **kwargs)
        ratio = self.teacher_ratio((running_status or {}).get('iteration', 0))
        loss, _, _ = self.piid_segment(
            teacher, policy, x_src, raw_src, segment_size, ratio, teacher_kwargs, source=source
        )
        log_vars = {'loss_diffusion': loss.detach(), **self.flow_loss.log_vars}
        if self.train_section().num_decay_iters > 0:
            log_vars['teacher_ratio'] = torch.tensor(ratio)
        return loss, log_vars


class SegmentState(NamedTuple):
    """Where a data-free trainer stands between two segments."""

    x_src: Tensor
    """State at the start of the next segment, (B, C, *)."""
    index: int
    """Number of the next segment, from 0 (pure noise) to ``nfe - 1``."""


@MODULES.register_module()
class PiFlowImitationDataFree(PiFlow):
    """pi-ID without data: from pure noise through all segments, each beginning where the explorer ended the last one.

    The trainer goes backward after every segment: call with ``segment_state=initial_segment_state(...)`` and then with
    the returned state until it is None. Without a ``segment_state`` all segments are taken in one call, at the cost of
    holding all their graphs.
    """

    is_multistep = True

    def initial_segment_state(self, x_0: Tensor, source: RandomSource | None = None) -> SegmentState:
        """Pure noise of the shape of ``x_0``, whose values do not matter."""
        dtype = torch.promote_types(x_0.dtype, torch.float32)
        noise = (source or TorchSource()).normal('noise', x_0.shape, dtype, x_0.device)
        return SegmentState(noise, 0)

    def is_last_segment(self, state: SegmentState) -> bool:
        """Whether the trajectory ends with the segment that begins at a state."""
        return state.index == self.train_section().nfe - 1

    def forward_train(
        self,
        x_0: Tensor,
        *,
        teacher: nn.Module | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
        running_status: Mapping[str, int] | None = None,
        source: RandomSource | None = None,
        segment_state: SegmentState | None = None,
        **kwargs,
    ):
        """Imitation loss of the next segment, or of all of them.

        Args:
            x_0: Gives the shape (B, C, *) of the noise.
            teacher: The frozen teacher.
            teacher_kwargs: Its conditions and guidance.
            running_status: ``iteration``, for the decay of the teacher's share.
            source: Source of the draws ``noise``, ``dropout``, ``student_intervals``, ``teacher_intervals``.
            segment_state: State before the segment.
            **kwargs: Conditions of the student.

        Returns:
            The loss weighted by the length of the segment, the values to log (to be summed over segments), and, if
            ``segment_state`` was given, the state before the next segment or None after the last.
        """
        self._check_trainable(teacher)
        source = source or TorchSource()
        arguments = {'teacher': teacher, 'teacher_kwargs': teacher_kwargs, 'running_status': running_status}
        if segment_state is None:
            total, log_vars, state = 0.0, {}, self.initial_segment_state(x_0, source)
            while state is not None:
                loss, logs, state = self.forward_train(x_0, segment_state=state, source=source, **arguments, **kwargs)
                total = total + loss
                log_vars = {**log_vars, **{key: log_vars.get(key, 0) + value for key, value in logs.items()}}
            return total, log_vars

        cfg = self.train_section()
        base, last = self.segment_sizes()
        x_src, index = segment_state
        is_last = self.is_last_segment(segment_state)
        raw_src = torch.full((len(x_src),), 1 - index * base if not is_last else last, dtype=torch.float64)
        length = last if is_last else base
        policy = self._predict_policy(x_src, raw_src, source, **kwargs)
        ratio = self.teacher_ratio((running_status or {}).get('iteration', 0))
        segment_size = torch.full_like(raw_src, length)
        loss, pairs, explorer = self.piid_segment(
            teacher, policy, x_src, raw_src, segment_size, ratio, teacher_kwargs, source=source
        )
        log_vars = {'loss_diffusion': loss.detach() * length, f'loss_diffusion_step{index}': loss.detach()}
        if cfg.num_decay_iters > 0 and index == 0:
            log_vars['teacher_ratio'] = torch.tensor(ratio)
        if is_last:
            return loss * length, log_vars, None
        with torch.no_grad(), phase('rollout'):
            raw_dst = (raw_src - length).clamp(min=0)
            x_dst, _, _ = self.policy_rollout(
                pairs.x_last, pairs.raw_last, raw_dst, cfg.total_substeps, explorer, rounding=cfg.substep_rounding
            )
        return loss * length, log_vars, SegmentState(x_dst, index + 1)
