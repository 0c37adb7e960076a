"""Walking through a config: what every section's check is made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.registry import Registry

from lakonlab.config.errors import describe_unknown, nearest
from lakonlab.config.signature import Arguments, arguments_of, field_types, fits, type_name
from lakonlab.registry import DATASETS, FEATURE_EXTRACTORS, METRICS, MODULES

INJECTED = frozenset({'train_cfg', 'test_cfg', 'num_timesteps'})
"""Constructor arguments that the surrounding object fills in."""
PLAIN_ARGUMENTS = frozenset({'log_cfgs', 'data_info', 'rescale_cfg', 'sampler_kwargs', 'policy_kwargs'})
"""Arguments whose dicts are not built, even if they have a ``type``; they are checked by what they belong to."""
BUILT_ARGUMENTS = frozenset({'diffusion', 'teacher', 'vae', 'text_encoder', 'denoising', 'flow_loss'})
"""Arguments whose dicts are built, so that they must have a ``type``."""
METRIC_ARGUMENTS = {'extractor': FEATURE_EXTRACTORS, 'reference': DATASETS}
"""Arguments of metrics that are built -> registry of what they name."""


class Walker:
    """A config, and what was found in it so far.

    Args:
        cfg: The config's values.
        training: Whether it must hold what training needs.
        planning: Whether the run is only planned, so that what can be planned and not run is noted.
    """

    def __init__(self, cfg: dict[str, Any], training: bool, planning: bool = False):
        self.cfg = cfg
        self.training = training
        self.planning = planning
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.classes: dict[str, type] = {}
        """Dotted key -> class, of every dict with a ``type`` that was found."""

    def section(self, key: str) -> dict[str, Any]:
        """A section that is a dict; empty if it is absent or, which is reported, of another type."""
        value = self.cfg.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.problems.append(f'{key}: found {value!r}, expected a dict')
            return {}
        return value

    def unknown(self, path: str, value: Any, what: str, valid: Iterable[str]) -> None:
        """Report a key that does not exist."""
        self.problems.append(describe_unknown(path, what, path.rsplit('.', 1)[-1], valid, value=value))

    def only_plan(self, path: str, message: str) -> None:
        """Report what can be planned and not run.

        Args:
            path: Its key.
            message: What is said of it.
        """
        (self.notes if self.planning else self.problems).append(f'{path}: {message}')

    def check_keys(self, path: str, section: Any, what: str, valid: Iterable[str]) -> bool:
        """Check that a value is a dict of known keys; whether it is a dict."""
        if not isinstance(section, Mapping):
            self.problems.append(f'{path}: found {section!r}, expected a dict')
            return False
        valid = list(valid)
        for key, value in section.items():
            if key not in valid:
                self.unknown(f'{path}.{key}', value, what, valid)
        return True

    def check_whole(self, path: str, value: Any, least: int, or_else: str = '') -> None:
        """Check that a value is a whole number that is not too small.

        Args:
            path: Its key; nothing is said if a problem of the key is known already.
            value: The value.
            least: Smallest number allowed.
            or_else: What else the key accepts, for the message.
        """
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and value == int(value) and value >= least:
            return
        if not any(problem.startswith(f'{path}:') for problem in self.problems):
            self.problems.append(f'{path}: found {value!r}, expected a whole number of at least {least}{or_else}')

    def check_value(self, path: str, value: Any, hint: Any) -> None:
        """Check the type of a value."""
        if not fits(value, hint):
            self.problems.append(f'{path}: found {value!r} ({type(value).__name__}), expected {type_name(hint)}')

    def check_plain(self, path: str, section: Mapping[str, Any], kind: type, others: Iterable[str] = ()) -> None:
        """Check keys and types of a section that a dataclass describes."""
        hints = field_types(kind)
        for key, value in section.items():
            if key in hints:
                self.check_value(f'{path}.{key}', value, hints[key])
            elif key not in others:
                self.unknown(f'{path}.{key}', value, f'key of {path}', [*hints, *others])

    def check_built(
        self, node: Any, path: str, registry: Registry, extra: Sequence[str] = (), nested: Registry = MODULES
    ) -> type | None:
        """Check a dict with a ``type``; return the class it names."""
        if not isinstance(node, Mapping):
            self.problems.append(f"{path}: found {node!r}, expected dict(type='...', ...)")
            return None
        kind = self._find_class(node, path, registry)
        if kind is None:
            return None
        if inspect.isclass(kind):
            self.classes[path] = kind
        arguments = arguments_of(kind)
        self.check_arguments(node, path, kind.__name__, arguments, extra)
        missing = arguments.required - set(node) - INJECTED
        if missing:
            self.problems.append(f'{path}: {kind.__name__} needs {", ".join(sorted(missing))}')
        for key, value in node.items():
            if key not in PLAIN_ARGUMENTS and key != 'type':
                self.check_nested(value, f'{path}.{key}', nested)
        return kind

    def check_nested(self, value: Any, path: str, registry: Registry) -> None:
        """Check the dicts with a ``type`` in an argument, or in a list of them."""
        name = path.rsplit('.', 1)[-1]
        built = METRIC_ARGUMENTS if registry is METRICS else BUILT_ARGUMENTS
        if isinstance(value, Mapping) and ('type' in value or name in built):
            if registry is METRICS:
                registry = METRIC_ARGUMENTS.get(name, METRICS)
            self.check_built(value, path, registry, nested=registry)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                self.check_nested(item, f'{path}.{index}', registry)

    def _find_class(self, node: Mapping[str, Any], path: str, registry: Registry) -> Any:
        name = node.get('type')
        if not isinstance(name, str):
            names = getattr(registry, 'names', lambda: sorted(registry.module_dict))()
            near = nearest('type', node)
            hint = '' if near is None else f' (is {near!r} a misspelling of it?)'
            self.problems.append(f"{path}: 'type' is missing{hint}; it names a {registry.name}: {', '.join(names)}")
            return None
        try:
            kind = registry.get(name)
        except ImportError as error:
            self.problems.append(f'{path}.type: {name!r} cannot be imported: {error}')
            return None
        if kind is None:
            names = getattr(registry, 'names', lambda: sorted(registry.module_dict))()
            self.problems.append(describe_unknown(f'{path}.type', registry.name, name, names))
        return kind

    def check_arguments(
        self, node: Mapping[str, Any], path: str, owner: str, arguments: Arguments, extra: Sequence[str] = ()
    ) -> None:
        """Check that a value is a dict of arguments of ``owner``."""
        if not isinstance(node, Mapping):
            self.problems.append(f'{path}: found {node!r}, expected a dict')
            return
        if arguments.is_open:
            return
        for key, value in node.items():
            if key != 'type' and key not in arguments.names and key not in extra:
                self.unknown(f'{path}.{key}', value, f'argument of {owner}', arguments.names - INJECTED)

    def at(self, path: str) -> Any:
        """What is found under a dotted key."""
        node: Any = self.cfg
        for key in path.split('.'):
            node = node[int(key)] if isinstance(node, (list, tuple)) else node[key]
        return node
