"""Takes the place of a pipeline's scheduler while it samples from a student.

To the loop of a pipeline, which calls the transformer and then ``scheduler.step``, a student is a transformer with a
wide output, and a segment is a step: the output is unpacked, becomes a policy, and is rolled out to where the segment
ends.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES
from lakonlab.models.diffusions.schedulers.flow_map_sde import FlowMapSDEScheduler
from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.ops.time_shift import unwarp
from lakonlab.pipelines.recipe import Recipe
from lakonlab.pipelines.student import Student

#: Timesteps from data to noise, by which pipelines divide.
TIMESTEPS = 1000
#: Settings of diffusers' flow scheduler whose grids no student was trained for.
REFUSED = {
    'shift_terminal': None,
    'use_karras_sigmas': False,
    'use_exponential_sigmas': False,
    'use_beta_sigmas': False,
    'invert_sigmas': False,
    'stochastic_sampling': False,
}
#: Settings for dynamic shifting: name in diffusers -> ours, and the default in its pipelines.
DYNAMIC = {
    'base_image_seq_len': ('base_seq_len', 256),
    'max_image_seq_len': ('max_seq_len', 4096),
    'base_shift': ('base_logshift', 0.5),
    'max_shift': ('max_logshift', 1.15),
}


def flow_map_of(scheduler: Any, final_step_size_scale: float | None) -> FlowMapSDEScheduler:
    """The grid of segments that a scheduler stands for.

    Args:
        scheduler: A :class:`FlowMapSDEScheduler`, or diffusers' ``FlowMatchEulerDiscreteScheduler``.
        final_step_size_scale: Length of the last segment relative to the others; None for what the scheduler says.

    Raises:
        ValueError: It is another scheduler, or has settings that no student is sampled with.
    """
    config = scheduler.config
    if config.get('num_train_timesteps', TIMESTEPS) != TIMESTEPS:
        raise ValueError(
            f'the scheduler has num_train_timesteps={config.num_train_timesteps}, but pipelines count {TIMESTEPS}: '
            f'pipe.scheduler = {type(scheduler).__name__}.from_config(pipe.scheduler.config, '
            f'num_train_timesteps={TIMESTEPS})'
        )
    own = {} if final_step_size_scale is None else {'final_step_size_scale': final_step_size_scale}
    if isinstance(scheduler, FlowMapSDEScheduler):
        if config.use_dynamic_shifting and config.dynamic_shifting_type != 'exp':
            raise ValueError(
                f"dynamic_shifting_type={config.dynamic_shifting_type!r} of the scheduler: pipelines know only 'exp'"
            )
        known = inspect.signature(type(scheduler).__init__).parameters
        fields = {name: value for name, value in config.items() if name in known and name not in ('self', 'kwargs')}
        return type(scheduler)(**{**fields, **own})
    kind = type(scheduler).__name__
    if kind != 'FlowMatchEulerDiscreteScheduler':
        raise ValueError(
            f'{kind} cannot follow a policy: use FlowMapSDEScheduler or FlowMatchEulerDiscreteScheduler, as in '
            'pipe.scheduler = FlowMapSDEScheduler.from_config(pipe.scheduler.config, shift=3.2, '
            'use_dynamic_shifting=False, final_step_size_scale=0.5)'
        )
    for name, value in REFUSED.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(
                f'the scheduler has {name}={config[name]!r}, with which no student was trained: '
                f'pipe.scheduler = {kind}.from_config(pipe.scheduler.config, {name}={value}, ...)'
            )
    if config.use_dynamic_shifting and config.get('time_shift_type', 'exponential') != 'exponential':
        raise ValueError("the scheduler has time_shift_type='linear': only 'exponential' is known, or a fixed shift")
    dynamic = {ours: config.get(theirs, default) for theirs, (ours, default) in DYNAMIC.items()}
    return FlowMapSDEScheduler(
        num_train_timesteps=config.num_train_timesteps,
        shift=getattr(scheduler, 'shift', config.shift),
        use_dynamic_shifting=config.use_dynamic_shifting,
        **dynamic,
        **own,
    )


def auto_temperature(num_steps: int) -> float:
    """Temperature of a mixture that ``'auto'`` stands for, as published: 0.3 for 4 steps, 0.7 for 8."""
    return min(max(0.1 * (num_steps - 1), 0.0), 1.0)


def chosen_temperature(
    policy_type: str, recipe: Recipe | None, temperature: str | float, num_steps: int
) -> float | None:
    """Temperature of a call.

    Args:
        policy_type: ``'GMFlow'``, or that of a policy which has none.
        recipe: Of the adapter; None if it says nothing.
        temperature: In [0, 1], or ``'auto'`` for the adapter's own at its own number of steps, else
            :func:`auto_temperature`.
        num_steps: Network evaluations.

    Returns:
        The temperature; None for policies without any.

    Raises:
        ValueError: The policy has none, and another than 1 was asked for.
    """
    if policy_type != 'GMFlow':
        if temperature not in ('auto', 1):
            raise ValueError(f'temperature={temperature}: the {policy_type} policy has none')
        return None
    if temperature != 'auto':
        return float(temperature)
    own = None if recipe is None else recipe.temperature
    return own if own is not None and num_steps == recipe.nfe else auto_temperature(num_steps)


class PolicyScheduler:
    """See the module.

    Args:
        grid: The segments.
        student: What the transformer's output is.
        total_substeps: Substeps of the policy per unit of schedule time.
        temperature: Of the policy on all but the last segment; None for none.
        sigmas: Schedule times at which the segments begin; None for the grid's own.
        generator: Of the noise of stochastic sampling; one, or one per sample.
        final_dtype: Of the last state, which an autoencoder takes; None for that of the states.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self,
        grid: FlowMapSDEScheduler,
        student: Student,
        total_substeps: int = 128,
        temperature: float | None = None,
        sigmas: Sequence[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        final_dtype: torch.dtype | None = None,
    ):
        self.grid, self.student, self.total_substeps, self.temperature = grid, student, total_substeps, temperature
        self.own_sigmas, self.generator, self.final_dtype = sigmas, generator, final_dtype
        self.policy_class = POLICY_CLASSES[student.policy_type]
        self.shift = float(grid.config.shift)
        self.index = 0
        self.timesteps, self.sigmas = grid.timesteps, grid.sigmas

    @property
    def config(self):
        """The grid's, with the names under which pipelines look for the settings of dynamic shifting."""
        config = self.grid.config
        aliases = {theirs: config[ours] for theirs, (ours, _) in DYNAMIC.items()}
        return type(config)({**config, **aliases})

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out the segments.

        Args:
            num_inference_steps: Their number; may be left out if ``sigmas`` is given.
            device: Of the timesteps.
            sigmas: What the pipeline proposes, of which only the length is of interest.
            mu: Logarithm of the shift under dynamic shifting.
        """
        self.index = 0
        count = len(sigmas) if num_inference_steps is None else num_inference_steps
        if self.own_sigmas is not None:
            count = len(self.own_sigmas)
        dynamic = self.grid.config.use_dynamic_shifting
        if dynamic and mu is None:
            raise ValueError('the scheduler has use_dynamic_shifting=True, for which this pipeline gives no length')
        self.grid.set_timesteps(count, device, sigmas=self.own_sigmas, mu=mu if dynamic else None)
        self.shift = math.exp(mu) if dynamic else float(self.grid.config.shift)
        self.timesteps, self.sigmas = self.grid.timesteps, self.grid.sigmas

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at another segment than the first."""
        self.index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the transformer is given: the state as it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = False, **unused: Any
    ) -> tuple[Tensor]:
        """Follow the policy of one output to the end of its segment.

        Args:
            model_output: Rows of the policy head, (B, L, rows) or (B, rows, *).
            timestep: Unused; the segments follow each other.
            sample: State at the start of the segment, as the pipeline holds it.
            return_dict: Unused.
            **unused: What pipelines pass to their own schedulers.

        Returns:
            The state at the start of the next segment.
        """
        index, grid = self.index, self.grid
        if index >= len(grid.timesteps):
            raise ValueError(f'all {len(grid.timesteps)} segments were followed')
        is_last = index == len(grid.timesteps) - 1
        x_src = unpack_state(sample.float(), self.student)
        output = unpack_output(model_output.float(), self.student)
        sigma_src, sigma_dst = (
            torch.full((len(x_src),), sigma, dtype=torch.float64)
            for sigma in (grid.levels[index], grid.destinations[index])
        )
        policy = self.policy_class(output, x_src, sigma_src, **self.student.policy_kwargs)
        if self.temperature is not None and self.temperature < 1 and not is_last:
            policy = policy.temperature(self.temperature)
        raw_src, raw_dst = unwarp(sigma_src, self.shift), unwarp(sigma_dst, self.shift)
        state = policy.rollout(x_src, rollout_schedule(raw_src, raw_dst, self.total_substeps, self.shift))
        state = pack_state(state, self.student)
        state = grid.step(state, grid.timesteps[index], generator=self.generator, return_dict=False)[0]
        self.index += 1
        return (state.to(self.final_dtype) if is_last and self.final_dtype is not None else state,)


def unpack_state(state: Tensor, student: Student) -> Tensor:
    """Tokens (B, L, C A) as (B, C, L, A), where a policy is found for each pixel; images as they are."""
    if student.layout == 'images':
        return state
    return state.unflatten(-1, (-1, student.area)).transpose(1, 2)


def pack_state(state: Tensor, student: Student) -> Tensor:
    """The inverse of :func:`unpack_state`."""
    if student.layout == 'images':
        return state
    return state.transpose(1, 2).flatten(-2)


def unpack_output(output: Tensor, student: Student) -> dict[str, Tensor] | Tensor:
    """What a policy is made of, from the rows of its head in the order of :mod:`lakonlab.models.architecture.heads`.

    Args:
        output: (B, L, rows) or (B, rows, *).
        student: Its layout and sizes.

    Returns:
        Of a mixture ``means (B, K, C, *)``, ``logweights (B, K, 1, *)`` and ``logstds (B, 1, 1, *1)``; else
        ``(B, N, C, *)``. ``*`` is (L, A) for tokens.
    """
    count, area = student.num_points, student.area
    if student.policy_type != 'GMFlow':
        if student.layout == 'images':
            return output.unflatten(1, (count, -1))
        return output.unflatten(-1, (count, -1, area)).permute(0, 2, 3, 1, 4)
    if student.layout == 'images':
        means, logits, logstds = output.split([output.shape[1] - count - 1, count, 1], dim=1)
        means, logits = means.unflatten(1, (count, -1)), logits.unsqueeze(2)
        size = [1] * (output.dim() - 2)
    else:
        weights = count * area
        means, logits, logstds = output.split([output.shape[-1] - weights - area, weights, area], dim=-1)
        means = means.unflatten(-1, (count, -1, area)).permute(0, 2, 3, 1, 4)
        logits = logits.unflatten(-1, (count, 1, area)).permute(0, 2, 3, 1, 4)
        size = [1, 1]
    logstds = logstds.flatten(1)[:, :1].reshape(-1, 1, 1, *size)  # the same for all pixels
    return {'means': means, 'logweights': logits.log_softmax(dim=1), 'logstds': logstds}
