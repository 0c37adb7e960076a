"""Checking a config before anything heavy starts: every name in it must exist, and what belongs together must agree.

Dicts with a ``type`` are checked against the constructor of the class they name. ``train_cfg`` and ``test_cfg`` are
shared by several classes, each of which declares the keys that it reads as the dataclasses ``train_cfg_class`` and
``test_cfg_class`` (old names: ``train_cfg_aliases``, ``test_cfg_aliases``); their union is accepted. The other sections
are described in ``schema.py``.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from lakonlab.config import schema
from lakonlab.config.consistency import check_consistency
from lakonlab.config.errors import ConfigError, describe_unknown, nearest
from lakonlab.config.legacy import drop_legacy_keys
from lakonlab.config.shared_sections import check_shared_sections
from lakonlab.config.signature import arguments_of, field_types, fits
from lakonlab.config.walker import Walker
from lakonlab.registry import DATASETS, HOOKS, METRICS, MODELS, MODULES, STRATEGIES

logger = logging.getLogger('lakonlab.config')

SPLIT_NAME = re.compile(r'(train|val|test)\d*')
LOADER_NAMES = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def check_config(cfg: Config, training: bool = True, planning: bool = False, single_process: bool = True) -> None:
    """Check a config, and drop keys of the published schema that have no effect here, saying so in the log.

    Args:
        cfg: The config; legacy keys are removed from it.
        training: Whether it must hold what training needs; without, what evaluation needs.
        planning: Whether the run is only planned: what can be planned and not run here is noted in the log,
            not refused.
        single_process: Whether one process runs alone, so that sections for several have no effect.

    Raises:
        ConfigError: Something is wrong; all problems that were found are listed, each with its full key.
    """
    import_custom_modules(cfg)
    for key, instead in schema.REFUSED_KEYS.items():
        if cfg.get(key) is not None:
            raise ConfigError(f'{key}: {cfg[key]!r} is not supported; {instead}')
    drop_legacy_keys(cfg, training)
    checker = _Checker(cfg.to_dict(), training, planning, _strategy_of(cfg, training, planning, single_process))
    checker.run()
    for note in checker.notes:
        logger.warning('config: %s', note)
    alone = [key for key in schema.DISTRIBUTED_KEYS if cfg.get(key)]
    alone += ['module_wrapper'] if cfg.get('module_wrapper') in schema.SHARDING_WRAPPERS else []
    if alone and single_process and not planning:
        logger.info('config: without effect in one process: %s', ', '.join(alone))
    if checker.problems:
        where = cfg.filename or 'config'
        listed = '\n'.join(f'  {problem}' for problem in checker.problems)
        raise ConfigError(f'{where} cannot be used:\n{listed}')


def _strategy_of(cfg: Mapping[str, Any], training: bool, planning: bool, single_process: bool) -> str:
    """Name of the strategy that a run will have; a plan is one of several processes if the config is."""
    wrapper = cfg.get('module_wrapper') or 'ddp'
    is_single = not training or (single_process and not planning)
    return 'single' if is_single or wrapper not in schema.MODULE_WRAPPERS else wrapper


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


class _Checker(Walker):
    """Walks through a config and collects what is wrong with it.

    Args:
        cfg: See :class:`Walker`, as are the next two.
        strategy: Name of the parallel strategy of the run.
    """

    def __init__(self, cfg: dict[str, Any], training: bool, planning: bool, strategy: str):
        super().__init__(cfg, training, planning)
        self.strategy = strategy

    def run(self) -> None:
        self._top_level()
        self._model()
        self._data()
        self._hooks()
        self._optimizer()
        self._sections()
        check_shared_sections(self)
        if not self.problems:
            check_consistency(self.cfg, self.classes, self.problems, self.notes, self.training)

    # -- names at the top level

    def _top_level(self) -> None:
        hints = field_types(schema.TopLevel)
        for key, value in self.cfg.items():
            if key in hints:
                self.check_value(key, value, hints[key])
            elif key not in schema.HELPER_NAMES and (near := nearest(key, hints, 0.8)) is not None:
                could_be = fits(value, hints[near])
                text = f'{key}: {key!r} is no section of a config; did you mean {near!r}? '
                if could_be:
                    text += 'If it is a helper variable, give it a name that cannot be mistaken for a section.'
                else:
                    text += f'It is taken for a helper variable, since {near} is no {type(value).__name__}.'
                (self.problems if could_be else self.notes).append(text)
        required = ['model', 'data', *(('optimizer', 'total_iters') if self.training else ())]
        for key in required:
            if self.cfg.get(key) is None and not any(problem.startswith(f'{key}:') for problem in self.problems):
                self.problems.append(f'{key}: missing; {"training" if self.training else "evaluation"} needs it')
        if self.cfg.get('total_iters') is not None:
            self.check_whole('total_iters', self.cfg['total_iters'], 1)
        wrapper, level = self.cfg.get('module_wrapper'), self.cfg.get('log_level')
        if wrapper is not None and wrapper not in schema.MODULE_WRAPPERS:
            self.problems.append(
                describe_unknown('module_wrapper', 'parallel strategy', str(wrapper), schema.MODULE_WRAPPERS)
            )
        if isinstance(level, str) and level not in schema.LOG_LEVELS:
            self.problems.append(describe_unknown('log_level', 'level of logging', level, schema.LOG_LEVELS))

    # -- sections

    def _model(self) -> None:
        model = self.section('model')
        if not model:
            return
        for key in ('train_cfg', 'test_cfg'):
            if key in model:
                self.problems.append(f'model.{key}: belongs at the top level of the config, as {key}')
        self.check_built(model, 'model', MODELS)
        for path, kind in list(self.classes.items()):
            node = self.at(path)
            if node.get('policy_kwargs'):
                self._policy(node, path)
            self._timestep_sampler(node, path, kind)
            self._loss(node, path, kind)

    def _timestep_sampler(self, node: Mapping[str, Any], path: str, kind: type) -> None:
        """Check a sampler of times that leaves out its type."""
        sampler = node.get('timestep_sampler')
        if not isinstance(sampler, Mapping) or 'type' in sampler:
            return
        from lakonlab.models.diffusions.gaussian_flow import GaussianFlow

        if issubclass(kind, GaussianFlow):
            sampler = {'type': 'ContinuousTimeStepSampler', **sampler}
            self.check_built(sampler, f'{path}.timestep_sampler', MODULES)

    def _loss(self, node: Mapping[str, Any], path: str, kind: type) -> None:
        """Check the dicts that a loss reads itself, as far as it declares their keys."""
        keys = {name: getattr(kind, f'{name}_keys', None) for name in ('rescale_cfg', 'log_cfgs')}
        if callable(getattr(kind, 'per_sample', None)):
            inputs = arguments_of(kind.per_sample, positional=1)
            keys['data_info'] = None if inputs.is_open else inputs.names
        for name, valid in keys.items():
            if valid is not None and node.get(name) is not None:
                self.check_keys(f'{path}.{name}', node[name], f'key of {name} of {kind.__name__}', valid)
        rescaled = node.get('rescale_mode', arguments_of(kind).defaults.get('rescale_mode'))
        if keys['rescale_cfg'] is not None and node.get('rescale_cfg') and rescaled is None:
            self.problems.append(
                f'{path}.rescale_cfg: found {node["rescale_cfg"]!r}, which has an effect only with '
                "rescale_mode='constant' beside it"
            )

    def _policy(self, node: Mapping[str, Any], path: str) -> None:
        from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES

        found = str(node.get('policy_type'))
        if found not in POLICY_CLASSES:
            self.problems.append(describe_unknown(f'{path}.policy_type', 'policy', found, POLICY_CLASSES))
            return
        policy = POLICY_CLASSES[found]
        arguments = arguments_of(policy, positional=3)
        self.check_arguments(node['policy_kwargs'], f'{path}.policy_kwargs', policy.__name__, arguments)

    def _data(self) -> None:
        data = self.section('data')
        loader_hints = field_types(schema.Loader)
        for key, value in data.items():
            path = f'data.{key}'
            if key in LOADER_NAMES:
                if isinstance(value, Mapping):
                    self.check_plain(path, value, schema.Loader)
                    self._ranges(path, value, schema.LEAST_OF_LOADER)
                else:
                    self.problems.append(f'{path}: found {value!r}, expected a dict of loader arguments')
            elif SPLIT_NAME.fullmatch(key):
                self.check_built(value, path, DATASETS, nested=DATASETS)
            elif key in loader_hints:
                self.check_value(path, value, loader_hints[key])
            else:
                self.unknown(path, value, 'key of data', [*loader_hints, *LOADER_NAMES, 'train', 'val', 'test'])
        self._ranges('data', data, schema.LEAST_OF_LOADER)
        if not data or not self.training:
            return
        if 'train' not in data:
            self.problems.append("data.train: missing; training needs a data set, dict(type='...', ...)")
        loader = data.get('train_dataloader')
        batch_size = {**data, **(loader if isinstance(loader, Mapping) else {})}.get('samples_per_gpu')
        if batch_size is None:
            self.problems.append('data.train_dataloader.samples_per_gpu: missing; it is the batch size of one process')

    def _ranges(self, path: str, section: Mapping[str, Any], least: Mapping[str, int]) -> None:
        """Check the whole numbers of a section; None stands for a default."""
        for key, bound in least.items():
            if section.get(key) is not None:
                self.check_whole(f'{path}.{key}', section[key], bound)

    def splits(self) -> list[str]:
        """Names of the data sets."""
        return [key for key, value in self.section('data').items() if isinstance(value, Mapping) and 'type' in value]

    def _hooks(self) -> None:
        from lakonlab.evaluation.entries import clashes, entries_of

        for section in ('custom_hooks', 'evaluation'):
            entries = self.cfg.get(section) or []
            if not isinstance(entries, (list, tuple)):
                self.problems.append(f'{section}: found a {type(entries).__name__}, expected a list of dicts')
                continue
            for index, entry in enumerate(entries):
                path = f'{section}.{index}'
                self.check_built(entry, path, HOOKS, extra=('priority',), nested=METRICS)
                if not isinstance(entry, Mapping):
                    continue
                if section == 'evaluation':
                    self._evaluation_entry(entry, path)
                elif entry.get('type') == 'ExponentialMovingAverageHook':
                    self._momentum(entry, path)
                    self._averages(entry, path)
        evaluations = self.cfg.get('evaluation') or []
        if isinstance(evaluations, (list, tuple)):
            self.problems += clashes(entries_of(evaluations))
        if self.cfg.get('checkpoint_config') is not None:
            section = self.section('checkpoint_config')
            node = {'type': 'CheckpointHook', **section}
            arguments = arguments_of(HOOKS.get('CheckpointHook'))
            self.check_arguments(node, 'checkpoint_config', node['type'], arguments, extra=('priority',))
            if section.get('interval') is None:
                self.problems.append(
                    'checkpoint_config.interval: missing; it is the number of iterations between saves'
                )
            self._ranges('checkpoint_config', section, schema.LEAST_OF_CHECKPOINTS)
            if section.get('by_epoch'):
                self.problems.append(
                    f'checkpoint_config.by_epoch: found {section["by_epoch"]!r}, but intervals count iterations; '
                    'set it to False'
                )
            if section.get('max_keep_ckpts', -1) != -1:
                self.check_whole('checkpoint_config.max_keep_ckpts', section['max_keep_ckpts'], 1, ', or -1 for all')

    def _evaluation_entry(self, entry: Mapping[str, Any], path: str) -> None:
        from lakonlab.evaluation.references import needs_reference_kwargs
        from lakonlab.evaluation.sampling import SAMPLE_ARGUMENTS

        split = entry.get('data', 'val')
        if split not in self.splits():
            self.problems.append(describe_unknown(f'{path}.data', 'data set of this config', str(split), self.splits()))
        for key in ('sample_kwargs', 'reference_kwargs'):
            if entry.get(key) is not None:
                self.check_keys(f'{path}.{key}', entry[key], f'key of {key}', SAMPLE_ARGUMENTS)
        if entry.get('save_best_ckpt') and self.training:
            self._best_checkpoint(entry, path)
        self._metrics(entry.get('metrics'), f'{path}.metrics')
        self._ranges(path, entry, schema.LEAST_OF_EVALUATION)
        kinds = [kind for kind, _ in self._metrics_of(entry, path)]
        compared = [kind.__name__ for kind in kinds if getattr(kind, 'needs_reference', False)]
        if compared and entry.get('reference_kwargs') is None:
            self.problems.append(needs_reference_kwargs(path, compared))
        self._evaluation_interval(entry.get('interval', 1), f'{path}.interval')

    def _best_checkpoint(self, entry: Mapping[str, Any], path: str) -> None:
        """The best checkpoint has a place to go, and a number that says which one it is."""
        from lakonlab.evaluation.best import numbers_that_decide

        found = f'{path}.save_best_ckpt: found {entry["save_best_ckpt"]!r}'
        if self.cfg.get('checkpoint_config') is None:
            self.problems.append(
                f'{found}, but checkpoint_config is not set, which says where checkpoints go; set it, or '
                'save_best_ckpt=False'
            )
        if entry.get('interval', 1) is None:
            self.problems.append(f'{found}, but interval=None never evaluates while training')
        found = self._metrics_of(entry, path)
        if any(kind is None for kind, _ in found):  # which has been reported
            return
        try:
            numbers_that_decide(
                [kind.better_of(arguments) for kind, arguments in found], entry.get('best_metric'), path
            )
        except ValueError as error:
            self.problems.append(str(error))

    def _metrics_of(self, entry: Mapping[str, Any], path: str) -> list[tuple[type | None, Any]]:
        """Class and arguments of each metric of an entry; None for a class that has not been found."""
        metrics = entry.get('metrics') or ()
        keys = [f'{path}.metrics']
        if isinstance(metrics, (list, tuple)):
            keys = [f'{path}.metrics.{index}' for index in range(len(metrics))]
        return [(self.classes.get(key), self.at(key)) for key in keys]

    def _metrics(self, metrics: Any, path: str) -> None:
        """Every metric names a class; those that do have been checked with the hook."""
        if metrics is None:
            return
        items = {path: metrics} if isinstance(metrics, Mapping) else metrics
        if isinstance(items, (list, tuple)):
            items = {f'{path}.{index}': item for index, item in enumerate(items)}
        if not isinstance(items, Mapping):
            self.problems.append(f'{path}: found {metrics!r}, expected a list of dicts')
            return
        for key, item in items.items():
            if not isinstance(item, Mapping) or 'type' not in item:
                self.check_built(item, key, METRICS, nested=METRICS)

    def _evaluation_interval(self, interval: Any, path: str) -> None:
        if not isinstance(interval, Mapping):
            if interval is not None:
                self.check_whole(path, interval, 1, ', None, or dict(milestones=[...], interval=[...])')
            return
        self.check_keys(path, interval, 'key of interval', ('milestones', 'interval'))
        for key, least in (('milestones', 0), ('interval', 1)):
            values = interval.get(key)
            if not isinstance(values, (list, tuple)):
                self.problems.append(f'{path}.{key}: found {values!r}, expected a list of iterations')
                return
            for index, value in enumerate(values):
                self.check_whole(f'{path}.{key}.{index}', value, least)
        if len(interval['interval']) != len(interval['milestones']) + 1:
            self.problems.append(
                f'{path}.interval: found {len(interval["interval"])} intervals, expected one more than the '
                f'{len(interval["milestones"])} milestones'
            )

    def _averages(self, entry: Mapping[str, Any], path: str) -> None:
        """Every average is that of a part that is trained."""
        keys = entry.get('module_keys', ())
        for key in [keys] if isinstance(keys, str) else keys if isinstance(keys, (list, tuple)) else ():
            if not str(key).endswith('_ema'):
                self.problems.append(
                    f"{path}.module_keys: found {key!r}, expected a name that ends in '_ema'; the rest names the part "
                    'that it averages'
                )

    def _momentum(self, entry: Mapping[str, Any], path: str) -> None:
        from lakonlab.runner.hooks.ema import MOMENTUM_POLICIES

        policy = str(entry.get('momentum_policy', 'fixed'))
        if policy not in MOMENTUM_POLICIES:
            message = describe_unknown(f'{path}.momentum_policy', 'momentum policy', policy, MOMENTUM_POLICIES)
            self.problems.append(message)
            return
        arguments = arguments_of(MOMENTUM_POLICIES[policy], positional=2)
        self.check_arguments(entry.get('momentum_cfg') or {}, f'{path}.momentum_cfg', policy, arguments)

    def _optimizer(self) -> None:
        classes = STRATEGIES.get(self.strategy).optimizer_class
        for key, options in self.section('optimizer').items():
            path = f'optimizer.{key}'
            model = self.section('model')
            children = [
                name for name, value in model.items() if isinstance(value, Mapping) and name not in schema.FROZEN_PARTS
            ]
            child = key.split('.')[0]
            if child in schema.FROZEN_PARTS:
                self.problems.append(f'{path}: found {key!r}, but model.{child} is never trained; remove it')
            elif child not in children:
                self.problems.append(describe_unknown(path, 'part of the model that can be trained', key, children))
            if not isinstance(options, Mapping) or not isinstance(options.get('type'), str):
                self.problems.append(f"{path}: found {options!r}, expected dict(type='AdamW', lr=...)")
                continue
            try:
                kind = classes(options['type'])
            except ImportError as error:
                if self.training:  # an evaluation has no use for it
                    self.only_plan(f'{path}.type', str(error))
                continue
            except ValueError as error:
                self.problems.append(f'{path}.type: {error}')
                continue
            arguments = arguments_of(kind, positional=1)
            self.check_arguments(options, path, kind.__name__, arguments, extra=('paramwise_cfg',))
            if 'lr' not in options:
                self.problems.append(f'{path}.lr: missing; it is the base learning rate')
            else:
                self._positive(f'{path}.lr', options['lr'])
            if options.get('paramwise_cfg') is not None:
                self._paramwise(options['paramwise_cfg'], f'{path}.paramwise_cfg')

    def _positive(self, path: str, value: Any) -> None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            self.problems.append(f'{path}: found {value!r}, expected a positive number')

    def _paramwise(self, section: Any, path: str) -> None:
        if not self.check_keys(path, section, 'key of paramwise_cfg', schema.PARAMWISE_KEYS):
            return
        patterns = section.get('custom_keys') or {}
        if not isinstance(patterns, Mapping):
            self.problems.append(f'{path}.custom_keys: found {patterns!r}, expected a dict')
            return
        for pattern, multipliers in patterns.items():
            where = f'{path}.custom_keys.{pattern}'
            if not self.check_keys(where, multipliers, 'multiplier of parameters', schema.MULTIPLIERS):
                continue
            for key in schema.MULTIPLIERS:
                value = multipliers.get(key, 1)
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                    self.problems.append(f'{where}.{key}: found {value!r}, expected a number of at least 0')

    def _sections(self) -> None:
        self._loop()
        self.check_plain('fsdp_kwargs', self.section('fsdp_kwargs'), schema.Sharding)
        self.check_plain('dist_params', self.section('dist_params'), schema.Processes)
        self._learning_rate()
        self._log()

    def _loop(self) -> None:
        loop = self.section('runner')
        self.check_plain('runner', loop, schema.Loop)
        self._ranges('runner', loop, schema.LEAST_OF_LOOP)
        if loop.get('type', schema.LOOP_TYPES[0]) not in schema.LOOP_TYPES:
            self.problems.append(describe_unknown('runner.type', 'loop', str(loop['type']), schema.LOOP_TYPES))

    def _learning_rate(self) -> None:
        from lakonlab.runner.lr_schedule import POLICIES, LearningRateSchedule

        section = self.section('lr_config')
        policy = {name.lower(): name for name in POLICIES}.get(str(section.get('policy', 'fixed')).lower())
        if policy is None:
            message = describe_unknown('lr_config.policy', 'learning rate policy', str(section['policy']), POLICIES)
            self.problems.append(message)
            return
        before = len(self.problems)
        arguments = arguments_of(POLICIES[policy], positional=3)
        self.check_plain('lr_config', section, schema.LearningRate, arguments.names)
        if section and len(self.problems) == before:
            try:
                total = self.cfg.get('total_iters')
                LearningRateSchedule(
                    int(total) if isinstance(total, (int, float)) and 1 <= total < math.inf else 1, **section
                )
            except (ValueError, TypeError) as error:
                self.problems.append(str(error))

    def _log(self) -> None:
        from lakonlab.runner.log import log_settings

        section = self.section('log_config')
        before = len(self.problems)
        self.check_plain('log_config', section, schema.Log)
        self._ranges('log_config', section, {'interval': 1})
        hooks = section.get('hooks')
        for index, entry in enumerate(hooks if isinstance(hooks, (list, tuple)) else ()):
            kind = entry.get('type') if isinstance(entry, Mapping) else None
            if kind not in schema.LOGGER_TYPES:
                path = f'log_config.hooks.{index}.type'
                self.problems.append(describe_unknown(path, 'logger', str(kind), schema.LOGGER_TYPES))
        if section and len(self.problems) == before:
            try:
                log_settings(section, 'work_dir')
            except ValueError as error:
                self.problems.append(str(error))
