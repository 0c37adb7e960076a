"""What makes few-step generators of the pipelines of diffusers."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch

from lakonlab.models.diffusions.schedulers.flow_map_sde import FlowMapSDEScheduler
from lakonlab.pipelines.contradictions import contradictions
from lakonlab.pipelines.piflow_loader import PiFlowLoaderMixin
from lakonlab.pipelines.policy_scheduler import PolicyScheduler, chosen_temperature, flow_map_of
from lakonlab.pipelines.recipe import PUBLISHED
from lakonlab.pipelines.student import Student
from lakonlab.pipelines.student_lora import shortfall

logger = logging.getLogger(__name__)

DEFAULT_STEPS, DEFAULT_SUBSTEPS = 4, 128


class PiFlowPipelineMixin(PiFlowLoaderMixin):
    """Lets a text-to-image pipeline of diffusers sample from students of pi-Flow, through its own code.

    ``class PiXPipeline(PiFlowPipelineMixin, XPipeline)`` is all that another pipeline needs, with ``latent_layout``
    and ``unguided`` if they differ. Until an adapter is loaded, only what is not a call works as in the base class.

    Args:
        *args: Of the pipeline.
        policy_type: Of adapters whose file does not tell, ``'GMFlow'`` or ``'DX'``; None to tell by their head.
        policy_kwargs: Further arguments of the policy, which take precedence over those that the file states.
        **kwargs: Of the pipeline.
    """

    unguided: Mapping[str, Any] = {}
    """Arguments with which the pipeline evaluates the transformer once per step."""

    def __init__(self, *args, policy_type: str | None = None, policy_kwargs: Mapping | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.policy_type, self.policy_kwargs = policy_type, dict(policy_kwargs or {})
        self._reported: set[str] = set()
        self._shortfall: str | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        calls = (vars(base)['__call__'] for base in cls.__mro__ if '__call__' in vars(base))
        if any('strength' in inspect.signature(call).parameters for call in calls):
            raise TypeError(
                f'{cls.__name__}: its base begins in the middle of the schedule, with a noisy image (strength); '
                'adapters of pi-Flow generate from noise: use a pipeline from text, or one that conditions on images'
            )
        if '__init__' not in vars(cls):  # diffusers learns from its signature what a pipeline consists of
            cls.__init__ = _constructor_like(super().__init__)

    def __call__(
        self,
        *args,
        num_inference_steps: int | None = None,
        total_substeps: int | None = None,
        temperature: str | float = 'auto',
        final_step_size_scale: float | None = None,
        **kwargs,
    ):
        """Generate images.

        Args:
            *args: Of the base pipeline, such as the prompt.
            num_inference_steps: Network evaluations; None for the number that the adapter was trained for, or 4.
            total_substeps: Substeps of the policy over the whole schedule; None for the adapter's, or 128.
            temperature: Of a mixture, on all but the last step; smaller is more conservative. ``'auto'`` is the
                adapter's own at its own number of steps, else ``(num_inference_steps - 1) / 10``, at most 1.
            final_step_size_scale: Length of the last step relative to the others; None for the scheduler's own, where
                it has one, else the adapter's, or 0.5.
            **kwargs: Of the base pipeline, such as ``height``, ``width``, ``generator``, ``latents``, ``sigmas``
                (schedule times, before the shift, at which the steps begin), ``callback_on_step_end`` (called once per
                network evaluation).

        Returns:
            What the base pipeline returns. Latents are in float32, arranged as there.

        Raises:
            ValueError: No adapter is loaded, guidance was asked for, or a setting is not one that can be sampled with.
        """
        student = self._student_of('transformer')
        parent = super().__call__
        call = dict(num_inference_steps=num_inference_steps, total_substeps=total_substeps, temperature=temperature)
        with self._alone():
            return self._sample(student, parent, args, kwargs, **call, final_step_size_scale=final_step_size_scale)

    @contextlib.contextmanager
    def _alone(self):
        mine = object()
        if self.__dict__.setdefault('_sampling', mine) is not mine:  # atomic, unlike a look before it
            raise RuntimeError(
                f'this {type(self).__name__} is sampling already: use one pipeline per thread; they can share a base'
            )
        try:
            yield
        finally:
            del self.__dict__['_sampling']

    def _sample(
        self, student, parent, args, kwargs, num_inference_steps, total_substeps, temperature, final_step_size_scale
    ):
        arguments = dict(inspect.signature(parent).bind_partial(*args, **kwargs).arguments)
        arguments.update(arguments.pop('kwargs', {}))
        if num_inference_steps is None:
            num_inference_steps = arguments.pop('num_inference_steps', None)  # by its position
        check_settings(num_inference_steps, total_substeps, temperature, final_step_size_scale)
        embedded = self._recipe('guidance_scale')
        takes_scale = 'guidance_scale' in inspect.signature(parent).parameters and 'guidance_scale' not in self.unguided
        if embedded is not None and takes_scale:
            arguments.setdefault('guidance_scale', embedded)  # what it was distilled with, not the default of the base
        self._refuse_guidance(arguments)
        sigmas = arguments.pop('sigmas', None)
        num_steps = num_inference_steps or self._recipe('nfe') or DEFAULT_STEPS
        num_steps = num_steps if sigmas is None else len(sigmas)
        grid = self._grid(student, final_step_size_scale)
        asked = {'total_substeps': total_substeps, 'temperature': None if temperature == 'auto' else temperature}
        if takes_scale:
            asked['guidance_scale'] = arguments.get('guidance_scale')
        self._report(contradictions(student, grid.config, num_steps, asked))
        latent = arguments.get('output_type') == 'latent'
        stand_in = PolicyScheduler(
            grid,
            student,
            total_substeps or self._recipe('total_substeps') or DEFAULT_SUBSTEPS,
            chosen_temperature(student.policy_type, student.recipe, temperature, num_steps),
            sigmas,
            arguments.get('generator'),
            None if latent or getattr(self, 'vae', None) is None else self.vae.dtype,
        )
        own = self.scheduler
        self.__dict__['scheduler'] = stand_in  # not through setattr, which would change the pipeline's config
        try:
            return parent(**{**arguments, **self.unguided, 'num_inference_steps': num_steps})
        finally:
            self.__dict__['scheduler'] = own

    def prepare_latents(self, *args, **kwargs):
        """As in the base class, in float32."""
        parent = super().prepare_latents
        bound = inspect.signature(parent).bind_partial(*args, **kwargs)
        bound.arguments['dtype'] = torch.float32
        return parent(*bound.args, **bound.kwargs)

    def _student_of(self, target: str) -> Student:
        student = getattr(getattr(self, target, None), 'piflow', None)
        if student is None:
            raise ValueError(
                f'{type(self).__name__} has no adapter of pi-Flow in its {target}: call load_piflow_adapter first'
            )
        return student

    def _recipe(self, name: str) -> Any:
        recipe = self._student_of('transformer').recipe
        return None if recipe is None else getattr(recipe, name)

    def _refuse_guidance(self, arguments: Mapping[str, Any]) -> None:
        switches = {'true_cfg_scale': 1.0, **self.unguided}
        given = [name for name, value in arguments.items() if name.startswith('negative_') and value is not None]
        asked = [
            name for name in given if not name.startswith('negative_ip_adapter_')
        ]  # FLUX prepares these in any case
        asked += [name for name, off in switches.items() if arguments.get(name, off) not in (None, off)]
        if asked:
            raise ValueError(
                f'{", ".join(asked)}: the guidance of the teacher is distilled into the student, which takes one '
                'evaluation per step and no negative prompt'
            )

    def _grid(self, student: Student, final_step_size_scale: float | None) -> FlowMapSDEScheduler:
        if final_step_size_scale is None and not isinstance(self.scheduler, FlowMapSDEScheduler):
            own = self._recipe('final_step_size_scale')
            final_step_size_scale = PUBLISHED.final_step_size_scale if own is None else own
        return flow_map_of(self.scheduler, final_step_size_scale)

    def _report(self, problems: Iterable[str]) -> None:
        """Say once what contradicts the adapter, and at each change whether the student is whole."""
        for problem in problems:
            if problem not in self._reported:
                self._reported.add(problem)
                logger.warning(problem)
        missing = shortfall(self.transformer)
        if missing is not None and missing != self._shortfall:
            logger.warning(missing)
        self._shortfall = missing


def check_settings(num_inference_steps, total_substeps, temperature, final_step_size_scale) -> None:
    """Refuse arguments of a call that nothing can be sampled with."""
    for name, value in {'num_inference_steps': num_inference_steps, 'total_substeps': total_substeps}.items():
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f'{name}={value}: expected an integer of at least 1')
    if temperature != 'auto' and not (isinstance(temperature, Real) and 0 <= temperature <= 1):
        raise ValueError(f"temperature={temperature!r}: expected 'auto' or a number between 0 and 1")
    scale = final_step_size_scale
    if scale is not None and not (isinstance(scale, Real) and 0 < scale < math.inf):
        raise ValueError(f'final_step_size_scale={scale!r}: expected a positive number')


def _constructor_like(parent):
    """A constructor whose signature is that of a pipeline's, and the arguments of :class:`PiFlowPipelineMixin`."""
    own = inspect.signature(PiFlowPipelineMixin.__init__).parameters
    signature = inspect.signature(parent)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [own[name] for name in ('policy_type', 'policy_kwargs') if name not in signature.parameters]

    def __init__(self, *args, **kwargs):  # noqa: N807
        PiFlowPipelineMixin.__init__(self, *args, **kwargs)

    __init__.__signature__ = signature.replace(parameters=parameters + added)
    __init__.__annotations__ = dict(getattr(parent, '__annotations__', {}))
    return __init__
