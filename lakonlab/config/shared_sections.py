"""Checking ``train_cfg`` and ``test_cfg``, which several classes share.

The keys are the fields of the dataclasses ``train_cfg_class`` and ``test_cfg_class`` of the classes in the config; an
object of each dataclass is made, so that whatever it refuses is reported with the full key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from lakonlab.config import schema
from lakonlab.config.errors import describe_unknown
from lakonlab.config.signature import arguments_of, field_types
from lakonlab.config.walker import Walker

PARTS = {'student': 'model.diffusion', 'teacher': 'model.teacher'}


def sampling_sections(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Every section of sampling options, with the role that samples by it.

    Args:
        cfg: The config; sections of the wrong kind count as empty.
    """
    train_cfg = _dict(cfg.get('train_cfg'))
    yield 'test_cfg', _dict(cfg.get('test_cfg')), None
    for name in ('teacher_test_cfg', 'teacher_test_cfg_2'):
        yield f'train_cfg.{name}', _dict(train_cfg.get(name)), 'teacher'
    evaluation = cfg.get('evaluation')
    for index, entry in enumerate(evaluation if isinstance(evaluation, (list, tuple)) else ()):
        for key in ('sample_kwargs', 'reference_kwargs'):
            kwargs = _dict(_dict(entry).get(key))
            path = f'evaluation.{index}.{key}.test_cfg_override'
            yield path, _dict(kwargs.get('test_cfg_override')), kwargs.get('role')


def check_shared_sections(walker: Walker) -> None:
    """Check ``train_cfg``, ``test_cfg`` and all that overrides the latter.

    Args:
        walker: A config whose classes have been found.
    """
    _check_train_cfg(walker)
    for path, section, role in sampling_sections(walker.cfg):
        readers = _readers_of_role(walker, path, role)
        before = len(walker.problems)
        _check_keys(walker, path, section, *_hints(readers, 'test_cfg'))
        if len(walker.problems) == before:
            _check_sampling_values(walker, path, section, readers)
        _check_sampler(walker, path, section, role)


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _check_train_cfg(walker: Walker) -> None:
    section = walker.section('train_cfg')
    hints, is_open = _hints(walker.classes, 'train_cfg')
    for key in walker.section('optimizer'):
        for pattern in schema.OPTIMIZER_KEY_PATTERNS:
            hints.setdefault(pattern.format(key), float | int)
    for key in schema.TRAINING_STEP_KEYS:
        hints.setdefault(key, int | None)
    before = len(walker.problems)
    _check_keys(walker, 'train_cfg', section, hints, is_open)
    if len(walker.problems) > before:
        return
    for path, kind in walker.classes.items():
        view = getattr(kind, 'train_cfg_class', None)
        if view is None:
            continue
        aliases = getattr(kind, 'train_cfg_aliases', None) or {}
        missing = _missing_keys(view, section, aliases)
        is_trained = walker.training and not f'{path}.'.startswith(f'{PARTS["teacher"]}.')
        if missing and is_trained:
            walker.problems += [f'train_cfg.{key}: missing; {kind.__name__} needs it' for key in missing]
        elif not missing:
            _add(walker, 'train_cfg', _refusal(view, 'train_cfg', section, aliases))


def _readers_of_role(walker: Walker, path: str, role: str | None) -> dict[str, type]:
    """Dotted key -> class of those that read a sampling section; for ``test_cfg`` itself, all."""
    teacher, student = PARTS['teacher'], PARTS['student']
    if path == 'test_cfg' or teacher not in walker.classes or student not in walker.classes:
        return walker.classes
    other = student if role == 'teacher' else teacher
    return {key: kind for key, kind in walker.classes.items() if not f'{key}.'.startswith(f'{other}.')}


def _check_sampling_values(walker: Walker, path: str, section: Mapping[str, Any], readers: Mapping[str, type]) -> None:
    base = {} if path == 'test_cfg' else _dict(walker.cfg.get('test_cfg'))
    if path != 'test_cfg' and not section:
        return
    for kind in readers.values():
        view = getattr(kind, 'test_cfg_class', None)
        aliases = getattr(kind, 'test_cfg_aliases', None) or {}
        merged = {**base, **section}
        if view is None or _missing_keys(view, merged, aliases):
            continue
        refusal = _refusal(view, path, merged, aliases)
        # what is wrong with test_cfg itself is said there
        if refusal is not None and (not base or refusal != _refusal(view, path, base, aliases)):
            _add(walker, path, refusal)


def _missing_keys(view: type, section: Mapping[str, Any], aliases: Mapping[str, str]) -> list[str]:
    given = set(section) | {new for old, new in aliases.items() if old in section}
    required = (field for field in fields(view) if field.default is MISSING and field.default_factory is MISSING)
    return [field.name for field in required if field.name not in given]


def _refusal(view: type, path: str, section: Mapping[str, Any], aliases: Mapping[str, str]) -> str | None:
    """What a dataclass has against a section, beginning with the full key; None if it accepts it."""
    from lakonlab.models.section import read_section

    try:
        read_section(view, section, path, aliases)
    except (ValueError, TypeError) as error:
        text = str(error)
        if text.startswith(f'{path}.'):
            return text
        names = [field.name for field in fields(view)]
        name = next((name for name in sorted(names, key=len, reverse=True) if text.startswith(name)), None)
        if name is None:
            return f'{path}: {text}'
        return f'{path}.{name}' + re.sub(r'^=(.*?): ', r': found \1, ', text[len(name) :])
    return None


def _add(walker: Walker, path: str, refusal: str | None) -> None:
    """Report a refusal, once if several classes have the same."""
    if refusal is not None and refusal not in walker.problems:
        walker.problems.append(refusal)


def _hints(readers: Mapping[str, type], attribute: str) -> tuple[dict[str, Any], bool]:
    """Keys that classes read -> their types, and whether some class does not declare them."""
    hints: dict[str, Any] = {}
    is_open = False
    for path, kind in readers.items():
        section = getattr(kind, f'{attribute}_class', None)
        if section is not None:
            hints.update(field_types(section))
        elif path.startswith('model') and attribute in arguments_of(kind).names:
            is_open = is_open or not _declares(kind, attribute)
        for old, new in (getattr(kind, f'{attribute}_aliases', None) or {}).items():
            hints.setdefault(old, hints.get(new, Any))
    return hints, is_open


def _declares(kind: type, attribute: str) -> bool:
    """Whether a class is ours: one that declares either section reads no undeclared key of the other."""
    other = {'train_cfg': 'test_cfg', 'test_cfg': 'train_cfg'}[attribute]
    return getattr(kind, f'{other}_class', None) is not None


def _check_keys(walker: Walker, path: str, section: Mapping[str, Any], hints: Mapping[str, Any], is_open: bool) -> None:
    for key, value in section.items():
        if key in hints:
            walker.check_value(f'{path}.{key}', value, hints[key])
        elif is_open:
            walker.notes.append(f'{path}.{key} may be unused: a class of the model does not declare what it reads')
        else:
            walker.unknown(f'{path}.{key}', value, f'key that this model reads from {path}', hints)


def _check_sampler(walker: Walker, path: str, section: Mapping[str, Any], role: str | None) -> None:
    """Check the solver's name and arguments; without a name it is the default of what samples."""
    if path != 'test_cfg' and not {'sampler', 'sampler_kwargs'} & set(section):
        return
    from lakonlab.models.diffusions.schedulers import SCHEDULER_MODULES, scheduler_class

    merged = {**_dict(walker.cfg.get('test_cfg')), **section}
    kind = walker.classes.get(PARTS['teacher' if role == 'teacher' else 'student'])
    view = getattr(kind, 'test_cfg_class', None)
    default = {field.name: field.default for field in fields(view)}.get('sampler') if view is not None else None
    name = merged.get('sampler', default)
    if not isinstance(name, str):
        return
    if name not in SCHEDULER_MODULES:
        if 'sampler' in section:
            walker.problems.append(describe_unknown(f'{path}.sampler', 'solver', name, SCHEDULER_MODULES))
        return
    solver = scheduler_class(name)
    kwargs = merged.get('sampler_kwargs')
    if isinstance(kwargs, Mapping):
        arguments = arguments_of(solver, positional=1)  # the model fills in its num_train_timesteps
        walker.check_arguments(kwargs, f'{path}.sampler_kwargs', solver.__name__, arguments)
