"""Checking a config before anything heavy starts: every name in it must exist, and what belongs together must agree.

Dicts with a ``type`` are checked against the constructor of the class they name. ``train_cfg`` and ``test_cfg`` are
shared by several classes, each of which declares the keys that it reads as the dataclasses ``train_cfg_class`` and
``test_cfg_class`` (old names: ``train_cfg_aliases``, ``test_cfg_aliases``); their union is accepted. The other sections
are described in ``schema.py``.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import Registry

from lakonlab.config import schema
from lakonlab.config.consistency import check_consistency
from lakonlab.config.errors import ConfigError, describe_unknown, nearest
from lakonlab.config.signature import Arguments, arguments_of, field_types, fits, type_name
from lakonlab.registry import DATASETS, FEATURE_EXTRACTORS, HOOKS, METRICS, MODELS, MODULES

logger = logging.getLogger('lakonlab.config')

INJECTED = frozenset({'train_cfg', 'test_cfg', 'num_timesteps'})
"""Constructor arguments that the surrounding object fills in."""
PLAIN_ARGUMENTS = frozenset({'log_cfgs', 'data_info', 'rescale_cfg', 'sampler_kwargs', 'policy_kwargs'})
"""Arguments whose dicts are not built, even if they have a ``type``."""
METRIC_ARGUMENTS = {'extractor': FEATURE_EXTRACTORS, 'reference': DATASETS}
"""Arguments of metrics that are built -> registry of what they name."""
SPLIT_NAME = re.compile(r'(train|val|test)\d*')
LOADER_NAMES = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def check_config(cfg: Config, training: bool = True) -> None:
    """Check a config, and drop keys of the published schema that have no effect here, saying so in the log.

    Args:
        cfg: The config; legacy keys are removed from it.
        training: Whether it must hold what training needs; without, what evaluation needs.

    Raises:
        ConfigError: Something is wrong; all problems that were found are listed, each with its full key.
    """
    import_custom_modules(cfg)
    for key, instead in schema.REFUSED_KEYS.items():
        if cfg.get(key) is not None:
            raise ConfigError(f'{key}: {cfg[key]!r} is not supported; {instead}')
    drop_legacy_keys(cfg)
    checker = _Checker(cfg.to_dict(), training)
    checker.run()
    for note in checker.notes:
        logger.warning('config: %s', note)
    if checker.problems:
        where = cfg.filename or 'config'
        listed = '\n'.join(f'  {problem}' for problem in checker.problems)
        raise ConfigError(f'{where} cannot be used:\n{listed}')


def import_custom_modules(cfg: Mapping[str, Any]) -> None:
    """Import the modules of ``custom_imports``, so that the classes they register can be named.

    Raises:
        ConfigError: A module cannot be imported, or the section is malformed.
    """
    section = cfg.get('custom_imports')
    if not section:
        return
    unknown = sorted(set(section) - set(field_types(schema.CustomImports)))
    if unknown or 'imports' not in section:
        raise ConfigError(f"custom_imports: expected 'imports' and 'allow_failed_imports', found {sorted(section)}")
    names = section['imports']
    for name in [names] if isinstance(names, str) else names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if not section.get('allow_failed_imports', False):
                raise ConfigError(
                    f'custom_imports.imports: {name!r} cannot be imported: {error}. Install it or add its folder to '
                    'PYTHONPATH.'
                ) from error
            logger.warning('custom_imports: %s cannot be imported: %s', name, error)


def drop_legacy_keys(cfg: Config) -> None:
    """Remove keys of the published schema that have no effect here, and report them in one line of the log."""
    dropped = []
    for dotted, reason in schema.LEGACY_KEYS.items():
        *sections, key = dotted.split('.')
        node: Any = cfg
        for section in sections:
            node = node.get(section) or {}
        if key in node:
            if node[key]:
                dropped.append(f'{dotted} ({reason})')
            node.pop(key)
    if dropped:
        logger.info('config: without effect here: %s', '; '.join(dropped))


class _Checker:
    """Walks through a config and collects what is wrong with it."""

    def __init__(self, cfg: dict[str, Any], training: bool):
        self.cfg = cfg
        self.training = training
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.classes: dict[str, type] = {}
        """Dotted key -> class, of every dict with a ``type`` that was found."""

    def run(self) -> None:
        self._top_level()
        self._model()
        self._data()
        self._hooks()
        self._optimizer()
        self._sections()
        self._train_and_test_cfg()
        if not self.problems:
            check_consistency(self.cfg, self.classes, self.problems, self.notes)

    def _section(self, key: str) -> dict[str, Any]:
        """A section that is a dict; empty if it is absent or, which is reported, of another type."""
        value = self.cfg.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.problems.append(f'{key}: found {value!r}, expected a dict')
            return {}
        return value

    def _unknown(self, path: str, value: Any, what: str, valid: Iterable[str]) -> None:
        self.problems.append(describe_unknown(path, what, path.rsplit('.', 1)[-1], valid, value=value))

    # -- names at the top level

    def _top_level(self) -> None:
        hints = field_types(schema.TopLevel)
        for key, value in self.cfg.items():
            if key in hints:
                self._check_value(key, value, hints[key])
            elif key not in schema.HELPER_NAMES and (near := nearest(key, hints, 0.8)) is not None:
                self.problems.append(
                    f'{key}: {key!r} is no section of a config; did you mean {near!r}? If it is a helper variable, '
                    'give it a name that cannot be mistaken for a section.'
                )
        required = ['model', 'data', *(('optimizer', 'total_iters') if self.training else ())]
        for key in required:
            if self.cfg.get(key) is None and not any(problem.startswith(f'{key}:') for problem in self.problems):
                self.problems.append(f'{key}: missing; {"training" if self.training else "evaluation"} needs it')
        total = self.cfg.get('total_iters')
        if isinstance(total, (int, float)) and total < 1:
            self.problems.append(f'total_iters: found {total}, expected a positive number of iterations')

    def _check_value(self, path: str, value: Any, hint: Any) -> None:
        if not fits(value, hint):
            self.problems.append(f'{path}: found {value!r} ({type(value).__name__}), expected {type_name(hint)}')

    def _check_plain(self, path: str, section: Mapping[str, Any], kind: type, others: Iterable[str] = ()) -> None:
        """Check keys and types of a section that a dataclass describes."""
        hints = field_types(kind)
        for key, value in section.items():
            if key in hints:
                self._check_value(f'{path}.{key}', value, hints[key])
            elif key not in others:
                self._unknown(f'{path}.{key}', value, f'key of {path}', [*hints, *others])

    # -- dicts that name a class

    def _check_built(
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
        self._check_arguments(node, path, kind.__name__, arguments, extra)
        missing = arguments.required - set(node) - INJECTED
        if missing:
            self.problems.append(f'{path}: {kind.__name__} needs {", ".join(sorted(missing))}')
        for key, value in node.items():
            if key not in PLAIN_ARGUMENTS and key != 'type':
                self._check_nested(value, f'{path}.{key}', nested)
        return kind

    def _check_nested(self, value: Any, path: str, registry: Registry) -> None:
        if isinstance(value, Mapping) and 'type' in value:
            if registry is METRICS:
                registry = METRIC_ARGUMENTS.get(path.rsplit('.', 1)[-1], METRICS)
            self._check_built(value, path, registry, nested=registry)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                self._check_nested(item, f'{path}.{index}', registry)

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

    def _check_arguments(
        self, node: Mapping[str, Any], path: str, owner: str, arguments: Arguments, extra: Sequence[str] = ()
    ) -> None:
        if arguments.is_open:
            return
        for key, value in node.items():
            if key != 'type' and key not in arguments.names and key not in extra:
                self._unknown(f'{path}.{key}', value, f'argument of {owner}', arguments.names - INJECTED)

    # -- sections

    def _model(self) -> None:
        model = self._section('model')
        if not model:
            return
        for key in ('train_cfg', 'test_cfg'):
            if key in model:
                self.problems.append(f'model.{key}: belongs at the top level of the config, as {key}')
        self._check_built(model, 'model', MODELS)
        for path in list(self.classes):
            node = self._at(path)
            if 'policy_kwargs' in node and node.get('policy_kwargs'):
                self._policy(node, path)

    def _policy(self, node: Mapping[str, Any], path: str) -> None:
        from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES

        if node.get('policy_type') not in POLICY_CLASSES:
            found = str(node.get('policy_type'))
            self.problems.append(describe_unknown(f'{path}.policy_type', 'policy', found, POLICY_CLASSES))
            return
        policy = POLICY_CLASSES[node['policy_type']]
        arguments = arguments_of(policy, positional=3)
        self._check_arguments(node['policy_kwargs'], f'{path}.policy_kwargs', policy.__name__, arguments)

    def _at(self, path: str) -> Any:
        node: Any = self.cfg
        for key in path.split('.'):
            node = node[int(key)] if isinstance(node, (list, tuple)) else node[key]
        return node

    def _data(self) -> None:
        data = self._section('data')
        loader_hints = field_types(schema.Loader)
        for key, value in data.items():
            path = f'data.{key}'
            if key in LOADER_NAMES:
                if isinstance(value, Mapping):
                    self._check_plain(path, value, schema.Loader)
                else:
                    self.problems.append(f'{path}: found {value!r}, expected a dict of loader arguments')
            elif SPLIT_NAME.fullmatch(key):
                self._check_built(value, path, DATASETS, nested=DATASETS)
            elif key in loader_hints:
                self._check_value(path, value, loader_hints[key])
            else:
                self._unknown(path, value, 'key of data', [*loader_hints, *LOADER_NAMES, 'train', 'val', 'test'])
        if not data or not self.training:
            return
        if 'train' not in data:
            self.problems.append("data.train: missing; training needs a data set, dict(type='...', ...)")
        loader = data.get('train_dataloader')
        batch_size = {**data, **(loader if isinstance(loader, Mapping) else {})}.get('samples_per_gpu')
        if batch_size is None:
            self.problems.append('data.train_dataloader.samples_per_gpu: missing; it is the batch size of one process')
        elif isinstance(batch_size, (int, float)) and batch_size < 1:
            self.problems.append(
                f'data.train_dataloader.samples_per_gpu: found {batch_size}, expected a positive number'
            )

    def splits(self) -> list[str]:
        """Names of the data sets."""
        return [key for key, value in self._section('data').items() if isinstance(value, Mapping) and 'type' in value]

    def _hooks(self) -> None:
        for section in ('custom_hooks', 'evaluation'):
            entries = self.cfg.get(section) or []
            if not isinstance(entries, (list, tuple)):
                self.problems.append(f'{section}: found a {type(entries).__name__}, expected a list of dicts')
                continue
            for index, entry in enumerate(entries):
                path = f'{section}.{index}'
                self._check_built(entry, path, HOOKS, extra=('priority',), nested=METRICS)
                if not isinstance(entry, Mapping):
                    continue
                if section == 'evaluation':
                    self._evaluation_entry(entry, path)
                elif entry.get('type') == 'ExponentialMovingAverageHook':
                    self._momentum(entry, path)
        if self.cfg.get('checkpoint_config') is not None:
            section = self._section('checkpoint_config')
            node = {'type': 'CheckpointHook', **section}
            arguments = arguments_of(HOOKS.get('CheckpointHook'))
            self._check_arguments(node, 'checkpoint_config', node['type'], arguments, extra=('priority',))
            if 'interval' not in section:
                self.problems.append(
                    'checkpoint_config.interval: missing; it is the number of iterations between saves'
                )

    def _evaluation_entry(self, entry: Mapping[str, Any], path: str) -> None:
        from lakonlab.evaluation.sampling import SAMPLE_ARGUMENTS

        split = entry.get('data', 'val')
        if split not in self.splits():
            self.problems.append(describe_unknown(f'{path}.data', 'data set of this config', str(split), self.splits()))
        for key in ('sample_kwargs', 'reference_kwargs'):
            for name, value in (entry.get(key) or {}).items():
                if name not in SAMPLE_ARGUMENTS:
                    self._unknown(f'{path}.{key}.{name}', value, f'key of {key}', SAMPLE_ARGUMENTS)

    def _momentum(self, entry: Mapping[str, Any], path: str) -> None:
        from lakonlab.runner.hooks.ema import MOMENTUM_POLICIES

        policy = entry.get('momentum_policy', 'fixed')
        if policy not in MOMENTUM_POLICIES:
            message = describe_unknown(f'{path}.momentum_policy', 'momentum policy', str(policy), MOMENTUM_POLICIES)
            self.problems.append(message)
            return
        arguments = arguments_of(MOMENTUM_POLICIES[policy], positional=2)
        self._check_arguments(entry.get('momentum_cfg') or {}, f'{path}.momentum_cfg', policy, arguments)

    def _optimizer(self) -> None:
        from lakonlab.runner.optimizer import optimizer_class

        for key, options in self._section('optimizer').items():
            path = f'optimizer.{key}'
            children = [name for name, value in self._section('model').items() if isinstance(value, Mapping)]
            if key.split('.')[0] not in children:
                self.problems.append(describe_unknown(path, 'part of the model', key, children))
            if not isinstance(options, Mapping) or not isinstance(options.get('type'), str):
                self.problems.append(f"{path}: found {options!r}, expected dict(type='AdamW', lr=...)")
                continue
            try:
                kind = optimizer_class(options['type'])
            except (ValueError, ImportError) as error:
                self.problems.append(f'{path}.type: {error}')
                continue
            arguments = arguments_of(kind, positional=1)
            self._check_arguments(options, path, kind.__name__, arguments, extra=('paramwise_cfg',))
            if 'lr' not in options:
                self.problems.append(f'{path}.lr: missing; it is the base learning rate')
            for name, value in (options.get('paramwise_cfg') or {}).items():
                if name != 'custom_keys':
                    self._unknown(f'{path}.paramwise_cfg.{name}', value, 'key of paramwise_cfg', ['custom_keys'])

    def _sections(self) -> None:
        self._loop()
        self._learning_rate()
        self._log()

    def _loop(self) -> None:
        loop = self._section('runner')
        self._check_plain('runner', loop, schema.Loop)
        if loop.get('type', schema.LOOP_TYPES[0]) not in schema.LOOP_TYPES:
            self.problems.append(describe_unknown('runner.type', 'loop', str(loop['type']), schema.LOOP_TYPES))

    def _learning_rate(self) -> None:
        from lakonlab.runner.lr_schedule import POLICIES, LearningRateSchedule

        section = self._section('lr_config')
        policy = {name.lower(): name for name in POLICIES}.get(str(section.get('policy', 'fixed')).lower())
        if policy is None:
            message = describe_unknown('lr_config.policy', 'learning rate policy', str(section['policy']), POLICIES)
            self.problems.append(message)
            return
        before = len(self.problems)
        arguments = arguments_of(POLICIES[policy], positional=3)
        self._check_plain('lr_config', section, schema.LearningRate, arguments.names)
        if section and len(self.problems) == before:
            try:
                LearningRateSchedule(max(int(self.cfg.get('total_iters') or 1), 1), **section)
            except (ValueError, TypeError) as error:
                self.problems.append(str(error))

    def _log(self) -> None:
        from lakonlab.runner.log import log_settings

        section = self._section('log_config')
        before = len(self.problems)
        self._check_plain('log_config', section, schema.Log)
        for index, entry in enumerate(section.get('hooks') or ()):
            kind = entry.get('type') if isinstance(entry, Mapping) else None
            if kind not in schema.LOGGER_TYPES:
                path = f'log_config.hooks.{index}.type'
                self.problems.append(describe_unknown(path, 'logger', str(kind), schema.LOGGER_TYPES))
        if section and len(self.problems) == before:
            try:
                log_settings(section, 'work_dir')
            except ValueError as error:
                self.problems.append(str(error))

    # -- train_cfg and test_cfg

    def _readers(self, attribute: str) -> tuple[dict[str, Any], bool]:
        """Keys that the classes of the config read -> their types, and whether some class does not declare them."""
        hints: dict[str, Any] = {}
        is_open = False
        for path, kind in self.classes.items():
            section = getattr(kind, f'{attribute}_class', None)
            if section is not None:
                hints.update(field_types(section))
            elif path.startswith('model') and attribute in arguments_of(kind).names:
                is_open = is_open or not self._declares(kind, attribute)
            for old, new in (getattr(kind, f'{attribute}_aliases', None) or {}).items():
                hints.setdefault(old, hints.get(new, Any))
        return hints, is_open

    @staticmethod
    def _declares(kind: type, attribute: str) -> bool:
        """Whether a class is ours: one that declares either section reads no undeclared key of the other."""
        other = {'train_cfg': 'test_cfg', 'test_cfg': 'train_cfg'}[attribute]
        return getattr(kind, f'{other}_class', None) is not None

    def _train_and_test_cfg(self) -> None:
        hints, is_open = self._readers('train_cfg')
        for key in self._section('optimizer'):
            hints.update({pattern.format(key): float | int for pattern in schema.OPTIMIZER_KEY_PATTERNS})
        hints.update(dict.fromkeys(schema.TRAINING_STEP_KEYS, int | None))
        train_cfg = self._section('train_cfg')
        self._check_keys('train_cfg', train_cfg, hints, is_open)

        hints, is_open = self._readers('test_cfg')
        sections = {'test_cfg': self._section('test_cfg')}
        for name in ('teacher_test_cfg', 'teacher_test_cfg_2'):
            sections[f'train_cfg.{name}'] = train_cfg.get(name) or {}
        evaluation = self.cfg.get('evaluation')
        for index, entry in enumerate(evaluation if isinstance(evaluation, (list, tuple)) else ()):
            for key in ('sample_kwargs', 'reference_kwargs'):
                kwargs = (entry.get(key) or {}) if isinstance(entry, Mapping) else {}
                path = f'evaluation.{index}.{key}.test_cfg_override'
                sections[path] = kwargs.get('test_cfg_override') or {}
        for path, section in sections.items():
            self._check_keys(path, section, hints, is_open)
            self._sampler(path, section)

    def _check_keys(self, path: str, section: Mapping[str, Any], hints: Mapping[str, Any], is_open: bool) -> None:
        for key, value in section.items():
            if key in hints:
                self._check_value(f'{path}.{key}', value, hints[key])
            elif is_open:
                self.notes.append(f'{path}.{key} may be unused: a class of the model does not declare what it reads')
            else:
                self._unknown(f'{path}.{key}', value, f'key that this model reads from {path}', hints)

    def _sampler(self, path: str, section: Mapping[str, Any]) -> None:
        if not isinstance(section.get('sampler'), str):
            return
        from lakonlab.models.diffusions.schedulers import scheduler_class

        try:
            solver = scheduler_class(section['sampler'])
        except (ValueError, KeyError) as error:
            self.problems.append(f'{path}.sampler: {error}')
            return
        kwargs = section.get('sampler_kwargs') or {}
        self._check_arguments(kwargs, f'{path}.sampler_kwargs', solver.__name__, arguments_of(solver))
