"""A static policy fitted to the trajectories of a teacher: what the toy experiments of pi-Flow do.

There is no network to speak of. For each of a few pairs of noise and condition one policy, made of plain parameters, is
trained by imitation (``PiFlowImitationDataFree`` with one segment) until following it leads where the teacher's own ODE
leads. The pictures show how well that can be done with this kind of policy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.models.diffusions.piflow_policies import Policy
from lakonlab.ops.random_source import RandomSource, SeededSource
from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.ops.shapes import batch_size_of, expand_like
from lakonlab.ops.time_shift import warp
from lakonlab.registry import MODELS
from lakonlab.runner.guard import SkipGuard
from lakonlab.ui.toy_trajectory import loss_picture, trajectory_picture

SEGMENTS, SHOWN_EVERY = 16, 4
LOG_INTERVAL = 100
MIXTURE_SPREAD = 0.5
SHOWN_PAIRS = 2
BEFORE, AFTER = 'policy before training', 'policy'


@dataclass(frozen=True)
class Subject:
    """What is imitated.

    Args:
        model_type: Kind of model that knows the conditions, such as ``'LatentDiffusionClassImage'``.
        teacher: Config of the frozen teacher.
        latent_size: Shape (C, H, W) of its latents.
        conditions: The batch without noise; as many policies are fitted as it has rows.
        names: What each of the rows shows.
        guidance: Sampling section of the teacher (``guidance_scale``, ``guidance_interval``, ...).
        vae: Config of the autoencoder; None for pixels.
    """

    model_type: str
    teacher: Mapping[str, Any]
    latent_size: tuple[int, int, int]
    conditions: Mapping[str, Any]
    names: Sequence[str]
    guidance: Mapping[str, Any]
    vae: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Settings:
    """How it is imitated.

    Args:
        out: The picture, a PNG file; the losses go to ``<stem>.loss.png`` beside it.
        policy_type: Name in :data:`~lakonlab.models.diffusions.piflow_policies.POLICY_CLASSES`.
        num_components: Components K of a mixture, or values N of ``x_0`` of a DX policy.
        num_iters: Iterations.
        lr: Learning rate of Adam.
        lr_schedule: ``'constant'``, or ``'cosine'`` down to zero.
        num_intermediates: States of an iteration at which the teacher is asked.
        window_substeps: Window of the averaged velocity that is compared; None for 3 for DX, whose velocity near the
            data is a difference divided by the noise level, and 0 for others.
        total_substeps: Euler steps with which policy and teacher are followed, a multiple of 16.
        seed: Seed of everything.
        picture_interval: Iterations between pictures of the present state, ``<stem>.iter<N>.png``; 0 for none.
    """

    out: Path
    policy_type: str = 'GMFlow'
    num_components: int = 32
    num_iters: int = 5000
    lr: float = 5e-3
    lr_schedule: str = 'constant'
    num_intermediates: int = 2
    window_substeps: int | None = None
    total_substeps: int = 128
    seed: int = 42
    picture_interval: int = 500


@dataclass(frozen=True)
class Fit:
    """How it went.

    Args:
        losses: Mean squared error of the velocity, per iteration.
        rmse_before: Root mean square distance of the first policy's samples to the teacher's.
        rmse_after: The same of the trained policy.
        rmse_one_step: The same of one Euler step of the teacher.
        files: What was written.
    """

    losses: list[float]
    rmse_before: float
    rmse_after: float
    rmse_one_step: float
    files: list[Path]


class PinnedSource(RandomSource):
    """Some draws are always the same tensors, the others come from another source.

    Args:
        pinned: Name -> the draw.
        others: Where the others come from.
    """

    def __init__(self, pinned: Mapping[str, Tensor], others: RandomSource):
        self.pinned, self.others = dict(pinned), others

    def uniform(self, name, shape, dtype=torch.float32, device='cpu'):
        return self._draw(self.others.uniform, name, shape, dtype, device)

    def normal(self, name, shape, dtype=torch.float32, device='cpu'):
        return self._draw(self.others.normal, name, shape, dtype, device)

    def _draw(self, draw, name, shape, dtype, device) -> Tensor:
        if name in self.pinned:
            return self.pinned[name].to(device=device, dtype=dtype).reshape(tuple(shape))
        return draw(name, shape, dtype, device)


class TeacherPolicy(Policy):
    """The teacher as a policy, which asks its network at every substep.

    Args:
        teacher: Called as ``teacher(return_u=True, x_t=..., t=..., **kwargs)``.
        x_t_src: Noise, (B, C, *).
        **kwargs: Conditions and guidance of the teacher.
    """

    def __init__(self, teacher: nn.Module, x_t_src: Tensor, **kwargs):
        super().__init__(x_t_src, torch.ones(len(x_t_src), dtype=torch.float64), eps=0.0)
        self.teacher, self.kwargs = teacher, kwargs

    @classmethod
    def output_shapes(cls, state_shape: tuple[int, ...], num_components: int) -> tuple[int, ...]:
        """It is made from no output."""
        raise TypeError('a teacher is no policy that a network could predict')

    @torch.no_grad()
    def pi(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        t = sigma_t.reshape(-1).cpu() * self.teacher.num_timesteps
        return self.teacher(return_u=True, x_t=x_t, t=t.to(x_t.dtype), **self.kwargs).to(x_t.dtype)

    def detach(self) -> TeacherPolicy:
        return self


@dataclass(frozen=True)
class Trajectory:
    """Where a policy leads.

    Args:
        states: States from noise to data, (T, B, C, *).
        denoised: What the policy expects ``x_0`` to be there, (T, B, C, *).
    """

    states: Tensor
    denoised: Tensor

    def distance(self, other: Trajectory) -> list[float]:
        """Root mean square difference of the states at each of the T times."""
        return (self.states - other.states).square().flatten(1).mean(dim=1).sqrt().tolist()


@torch.no_grad()
def follow(policy: Policy, noise: Tensor, total_substeps: int, shift: float) -> Trajectory:
    """Follow a policy from pure noise to data.

    Args:
        policy: The policy.
        noise: (B, C, *).
        total_substeps: Euler steps in all, a multiple of 16.
        shift: Shift of the schedule.

    Returns:
        The states at 17 equally spaced schedule times.
    """
    raw_times = torch.linspace(1, 0, SEGMENTS + 1, dtype=torch.float64)
    states, denoised = [noise], []
    for raw_src, raw_dst in zip(raw_times[:-1].tolist(), raw_times[1:].tolist()):
        src, dst = (torch.full((len(noise),), raw, dtype=torch.float64) for raw in (raw_src, raw_dst))
        x_t, sigma = states[-1], warp(src, shift)
        denoised.append(x_t - expand_like(sigma, x_t) * policy.pi(x_t, sigma))
        states.append(policy.rollout(x_t, rollout_schedule(src, dst, total_substeps, shift)))
    return Trajectory(torch.stack(states), torch.stack([*denoised, states[-1]]))


def build_model(subject: Subject, settings: Settings) -> nn.Module:
    """The model of an experiment: the teacher, and static policies as the student."""
    is_dx = settings.policy_type == 'DX'
    window = settings.window_substeps
    sampler = dict(subject.teacher.get('timestep_sampler') or {}, logit_normal_enable=False)
    pairs = batch_size_of(dict(subject.conditions))
    diffusion = dict(
        type='PiFlowImitationDataFree',
        policy_type=settings.policy_type,
        policy_kwargs=dict(shift=sampler.get('shift', 1.0)) if is_dx else None,
        denoising=dict(
            type='StaticPolicyNetwork',
            policy_type=settings.policy_type,
            state_shape=(pairs, *subject.latent_size),
            num_components=settings.num_components,
        ),
        # twice a half of the mean squared error
        flow_loss=dict(type='DiffusionMSELoss', rescale_mode='constant', rescale_cfg=dict(scale=2.0)),
        num_timesteps=subject.teacher['num_timesteps'],
        timestep_sampler=sampler,
    )
    model = dict(
        type=subject.model_type,
        diffusion=diffusion,
        teacher=dict(subject.teacher),
        vae=None if subject.vae is None else dict(subject.vae),
        train_cfg=dict(
            nfe=1,
            total_substeps=settings.total_substeps,
            num_intermediate_states=settings.num_intermediates,
            window_substeps=(3 if is_dx else 0) if window is None else window,
            teacher_test_cfg=dict(subject.guidance),
        ),
        test_cfg=dict(nfe=1, total_substeps=settings.total_substeps, latent_size=subject.latent_size),
    )
    return MODELS.build(model)


class Experiment:
    """Static policies, their teacher, and what they begin at.

    Args:
        subject: What is imitated.
        settings: How.
        device: Where.
    """

    def __init__(self, subject: Subject, settings: Settings, device: torch.device | str = 'cpu'):
        self.subject, self.settings = subject, settings
        self.model = build_model(subject, settings).to(device)
        self.batch = dict(subject.conditions)
        self.diffusion = self.model.diffusion
        source = SeededSource(settings.seed)
        shape = (batch_size_of(self.batch), *subject.latent_size)
        self.noise = self.model.patchify(source.normal('noise', shape, device=device))
        self.shift = self.diffusion.timestep_sampler.get_shift(self.noise[0, 0].numel())
        scale, section = self.model.teacher_guidance()
        conditions = self.model.conditions_of(self.batch, needs_negative=True)
        self.teacher = TeacherPolicy(
            self.model.teacher,
            self.noise,
            guidance_scale=scale,
            test_cfg=section,
            **self.model.with_guidance(conditions, scale),
        )
        is_mixture = self.diffusion.denoising.has_names
        u = self.teacher.pi(self.noise, self.teacher.sigma_t_src)
        self.diffusion.denoising.start_from(u, MIXTURE_SPREAD if is_mixture else 0.0, source)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=settings.lr)

    def learning_rate(self, iteration: int) -> float:
        """Learning rate of an iteration."""
        settings = self.settings
        if settings.lr_schedule == 'constant':
            return settings.lr
        return settings.lr * (1 + math.cos(math.pi * iteration / settings.num_iters)) / 2

    def policy(self) -> Policy:
        """The present policies."""
        sigma = torch.ones(len(self.noise), dtype=torch.float64)
        output = self.diffusion.pred(self.noise, sigma * self.diffusion.num_timesteps)
        return self.diffusion.build_policy(output, self.noise, sigma).detach()

    def follow(self, policy: Policy) -> Trajectory:
        """Where a policy leads from the noise."""
        return follow(policy, self.noise, self.settings.total_substeps, self.shift)

    def step(self, iteration: int) -> tuple[Tensor, Sequence[str]]:
        """One iteration; returns the loss, and what made no step because its gradient is no number."""
        source = PinnedSource({'noise': self.noise}, SeededSource(self.settings.seed, step=iteration))
        status = {'iteration': iteration}
        for group in self.optimizer.param_groups:
            group['lr'] = self.learning_rate(iteration)
        output = self.model.train_step(self.batch, {'diffusion': self.optimizer}, running_status=status, source=source)
        return torch.as_tensor(output['log_vars']['loss_diffusion']), output['skipped']

    def draw(self, teacher: Trajectory, before: Trajectory, now: Trajectory, path: Path) -> None:
        """Save the picture of the first pairs."""
        sigmas = warp(torch.linspace(1, 0, SEGMENTS + 1, dtype=torch.float64), self.shift).tolist()
        rows = {}
        for pair, name in enumerate(self.subject.names[:SHOWN_PAIRS]):
            for what, part in {'state': 'states', 'expected end': 'denoised'}.items():
                for label, trajectory in {'teacher': teacher, 'policy': now}.items():
                    latents = getattr(trajectory, part)[::SHOWN_EVERY, pair]
                    images = self.model.decode_latents(self.model.unpatchify(latents))
                    rows[f'{name}\n{label}, {what}'] = images / 2 + 0.5
        errors = {BEFORE: before.distance(teacher), AFTER: now.distance(teacher)}
        trajectory_picture(rows, sigmas[::SHOWN_EVERY], errors, sigmas, path)

    def run(self, say: Callable[[str], None]) -> Fit:
        """Train, and save the pictures.

        Args:
            say: Takes lines of progress.

        Raises:
            TrainingDivergedError: Many iterations in a row made no step.
        """
        settings, out = self.settings, self.settings.out
        teacher, before = self.follow(self.teacher), self.follow(self.policy())
        losses: list[Tensor] = []
        files: list[Path] = []
        guard = SkipGuard()
        begin = time.perf_counter()
        for i in range(settings.num_iters):
            loss, skipped = self.step(i)
            guard.update(i, skipped, {'loss': float(loss)} if skipped else {}, {'policy': self.learning_rate(i)})
            losses.append(loss)
            is_last = i + 1 == settings.num_iters
            if (i + 1) % LOG_INTERVAL == 0 or is_last:
                recent = torch.stack(losses[-LOG_INTERVAL:]).mean().item()
                say(f'iteration {i + 1}: loss {recent:.3e}, {time.perf_counter() - begin:.0f} s')
            if settings.picture_interval and (i + 1) % settings.picture_interval == 0 and not is_last:
                files.append(out.with_name(f'{out.stem}.iter{i + 1:04d}.png'))
                self.draw(teacher, before, self.follow(self.policy()), files[-1])
        after = self.follow(self.policy())
        files += [out, out.with_name(f'{out.stem}.loss.png')]
        self.draw(teacher, before, after, out)
        values = torch.stack(losses).tolist()
        loss_picture(values, files[-1])
        one_step = Trajectory(teacher.denoised[:1], teacher.denoised[:1])
        end = Trajectory(teacher.states[-1:], teacher.states[-1:])
        return Fit(values, before.distance(teacher)[-1], after.distance(teacher)[-1], one_step.distance(end)[0], files)
