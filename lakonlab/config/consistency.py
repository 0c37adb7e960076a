"""Checks across sections: values that are fine alone but contradict each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lakonlab.config.shared_sections import sampling_sections
from lakonlab.config.signature import arguments_of

SEGMENTS = frozenset({'nfe', 'final_step_size_scale', 'sigmas'})
GRID_IS_FIXED = 'found True, but the grid of model.diffusion.policy_kwargs is laid out for one shift; set it to False'
SEGMENT_TOLERANCE = 1e-3
"""Relative difference of segment sizes that is put down to rounding in the config."""


def check_consistency(
    cfg: Mapping[str, Any],
    classes: Mapping[str, type],
    problems: list[str],
    notes: list[str],
    training: bool = True,
) -> None:
    """Append what contradicts itself to ``problems``, and what is unusual to ``notes``.

    Args:
        cfg: A config whose names have all been checked.
        classes: Dotted key -> class of every dict with a ``type``.
        problems: Extended in place.
        notes: Extended in place.
        training: Whether the config is to be trained.
    """
    student, teacher = (_Part(cfg, classes, f'model.{name}') for name in ('diffusion', 'teacher'))
    if student.exists and teacher.exists and student.num_timesteps != teacher.num_timesteps:
        problems.append(
            f'model.diffusion.num_timesteps: {student.num_timesteps} differs from model.teacher.num_timesteps, '
            f'{teacher.num_timesteps}; student and teacher must measure time in the same unit'
        )
    if training and student.exists:
        problems.extend(_training_problems(cfg, student))
    for path, section, role in sampling_sections(cfg):
        part = teacher if role == 'teacher' else student
        if part.exists:
            problems.extend(_guidance_problems(path, section, part))
    if teacher.exists:
        scale = (cfg.get('train_cfg') or {}).get('teacher_guidance_scale')
        problems.extend(_scale_problems('train_cfg.teacher_guidance_scale', scale, teacher))
    if student.node.get('policy_type') == 'DX':
        problems.extend(_grid_problems(cfg, student))
    notes.extend(_differences(cfg, student))
    problems.extend(_batch_problems(cfg))


def _differences(cfg: Mapping[str, Any], student: _Part) -> Iterator[str]:
    """How sampling differs from training, where the config says both."""
    train_cfg, test_cfg = (cfg.get(key) or {} for key in ('train_cfg', 'test_cfg'))
    trained = {key: train_cfg[key] for key in ('nfe', 'final_step_size_scale') if train_cfg.get(key) is not None}
    if trained and student.exists:
        trained['shift'] = student.shift
    for path, override, role in sampling_sections(cfg):
        is_entry = path.startswith('evaluation') and role != 'teacher'
        section = override if is_entry else test_cfg if path == 'test_cfg' else {}
        for key, value in trained.items():
            found = section.get(key)
            if found is not None and found != value:
                of = 'model.diffusion.timestep_sampler' if key == 'shift' else 'train_cfg'
                yield f'{of}.{key} is {value} and {path}.{key} is {found}: samples differ from what is trained'


class _Part:
    """``model.diffusion`` or ``model.teacher``."""

    def __init__(self, cfg: Mapping[str, Any], classes: Mapping[str, type], path: str):
        self.exists = path in classes
        self.kind = classes.get(path)
        self.node: Mapping[str, Any] = cfg['model'][path.split('.')[1]] if self.exists else {}

    def argument(self, name: str) -> Any:
        """Value of a constructor argument, given or by default."""
        return self.node.get(name, arguments_of(self.kind).defaults.get(name)) if self.kind else None

    @property
    def num_timesteps(self) -> Any:
        return self.argument('num_timesteps')

    @property
    def mixes_probabilities(self) -> bool:
        """Whether guidance mixes probabilities, as GMFlow's, whose scale lies in (0, 1)."""
        return getattr(self.kind, 'guidance_is_probabilistic', False)

    @property
    def shift(self) -> float:
        return self.timestep_sampler.get('shift', 1.0)

    @property
    def timestep_sampler(self) -> Mapping[str, Any]:
        section = self.node.get('timestep_sampler')
        return section if isinstance(section, Mapping) else {}


def _training_problems(cfg: Mapping[str, Any], student: _Part) -> Iterator[str]:
    """What training of a diffusion needs and inference does not."""
    from lakonlab.models.diffusions.gaussian_flow import GaussianFlow
    from lakonlab.models.diffusions.piflow import PiFlow

    name = student.kind.__name__
    if issubclass(student.kind, GaussianFlow) and student.node.get('flow_loss') is None:
        yield f"model.diffusion.flow_loss: missing; training of {name} needs a loss, dict(type='DiffusionMSELoss', ...)"
    if not issubclass(student.kind, PiFlow):
        return
    if cfg['model'].get('teacher') is None:
        yield f"model.teacher: missing; {name} is trained by a teacher, dict(type='GaussianFlow', ...)"
    if student.timestep_sampler.get('logit_normal_enable'):
        yield (
            'model.diffusion.timestep_sampler.logit_normal_enable: found True, but pi-ID draws the beginnings of its '
            'segments uniformly; set it to False'
        )
    dropout = (cfg.get('train_cfg') or {}).get('policy_dropout')
    if dropout and student.node.get('policy_type') == 'DX':
        yield f'train_cfg.policy_dropout: found {dropout}, but a DX policy has no components to drop; remove it'


def _scale_problems(path: str, scale: Any, part: _Part) -> Iterator[str]:
    if isinstance(scale, (int, float)) and not part.mixes_probabilities and (scale < 0 or 0 < scale < 1):
        yield (
            f'{path}: found {scale}; {part.kind.__name__} needs 0 or 1 (no guidance) or more than 1; '
            'scales between 0 and 1 belong to guidance that mixes probabilities'
        )


def _guidance_problems(path: str, section: Mapping[str, Any], part: _Part) -> Iterator[str]:
    yield from _scale_problems(f'{path}.guidance_scale', section.get('guidance_scale'), part)
    interval, end = section.get('guidance_interval'), part.num_timesteps
    if interval is not None and isinstance(end, (int, float)):
        is_pair = len(interval) == 2 and all(isinstance(bound, (int, float)) for bound in interval)
        low, high = interval if is_pair else (math.nan, math.nan)
        if not 0 <= low <= high <= end:
            yield (
                f'{path}.guidance_interval: found {list(interval)}, expected [low, high] with '
                f'0 <= low <= high <= {end}, in units of num_timesteps'
            )
        elif end > 1 and 0 < high <= 1:
            yield (
                f'{path}.guidance_interval: found {list(interval)}, which is next to nothing of times up to {end}; '
                f'it is in units of num_timesteps, so that the same part of them is {[low * end, high * end]}'
            )


def _grid_problems(cfg: Mapping[str, Any], student: _Part) -> Iterator[str]:
    """A DX grid is laid out over one segment, so it must know how long segments are and how time is shifted."""
    policy = student.node.get('policy_kwargs') or {}
    shift = policy.get('shift', 1.0)
    if student.timestep_sampler.get('use_dynamic_shifting'):
        yield f'model.diffusion.timestep_sampler.use_dynamic_shifting: {GRID_IS_FIXED}'
    for path, section, role in sampling_sections(cfg):
        if role != 'teacher' and section.get('use_dynamic_shifting'):
            yield f'{path}.use_dynamic_shifting: {GRID_IS_FIXED}'
        other = section.get('shift')
        if role != 'teacher' and other is not None and not math.isclose(shift, other, rel_tol=SEGMENT_TOLERANCE):
            yield (
                f'{path}.shift: found {other}, but the grid of model.diffusion.policy_kwargs is laid out for shift='
                f'{shift}; sample with that shift, or train a policy for the other'
            )
    if not math.isclose(shift, student.shift, rel_tol=SEGMENT_TOLERANCE):
        yield (
            f'model.diffusion.policy_kwargs.shift: found {shift}, expected {student.shift}, the shift of '
            'model.diffusion.timestep_sampler'
        )
    if policy.get('mode', 'grid') != 'grid':
        return
    segment = policy.get('segment_size', 1.0)
    test_cfg = cfg.get('test_cfg') or {}
    sections = [('train_cfg', cfg.get('train_cfg') or {}), ('test_cfg', test_cfg)]
    for path, override, role in sampling_sections(cfg):
        if path.startswith('evaluation') and role != 'teacher' and SEGMENTS & set(override):
            sections.append((path, {**test_cfg, **override}))
    for path, section in sections:
        if section.get('sigmas'):
            yield from _sigma_problems(path, section, segment)
            continue
        nfe = section.get('nfe')
        if nfe is None:
            continue
        expected = 1 / (nfe - 1 + section.get('final_step_size_scale', 1.0))
        if not math.isclose(segment, expected, rel_tol=SEGMENT_TOLERANCE):
            yield (
                f'model.diffusion.policy_kwargs.segment_size: found {segment:g}, but nfe={nfe} and '
                f'final_step_size_scale={section.get("final_step_size_scale", 1.0)} of {path} make segments of '
                f'{expected:g}, 1 / (nfe - 1 + final_step_size_scale)'
            )


def _sigma_problems(path: str, section: Mapping[str, Any], segment: float) -> Iterator[str]:
    """Segments between explicit times, of which the last alone may be shorter than the grid."""
    sigmas = [*section['sigmas'], 0.0]
    if section.get('nfe') not in (None, len(sigmas) - 1):
        yield f'{path}.sigmas: has {len(sigmas) - 1} entries, but nfe is {section["nfe"]}'
        return
    lengths = [before - after for before, after in itertools.pairwise(sigmas)]
    fits = all(math.isclose(length, segment, rel_tol=SEGMENT_TOLERANCE) for length in lengths[:-1])
    if not fits or lengths[-1] > segment * (1 + SEGMENT_TOLERANCE):
        yield (
            f'{path}.sigmas: makes segments of {", ".join(f"{length:g}" for length in lengths)}, but the grid of '
            f'model.diffusion.policy_kwargs.segment_size is laid out over {segment:g}; only the last may be shorter'
        )


def _batch_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    data, micro = cfg.get('data') or {}, (cfg.get('train_cfg') or {}).get('grad_accum_batch_size')
    batch = {**data, **(data.get('train_dataloader') or {})}.get('samples_per_gpu')
    if micro and batch and batch % max(1, min(micro, batch)):
        yield (
            f'train_cfg.grad_accum_batch_size: found {micro}, which does not divide the batch of '
            f'data.train_dataloader.samples_per_gpu, {batch}; choose a divisor'
        )
