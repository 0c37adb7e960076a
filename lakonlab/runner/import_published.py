"""From a published training checkpoint (``iter_<N>.pth``) to one of ours, from which the run goes on."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config, resolved_text
from lakonlab.config.options import parse_options
from lakonlab.models.architecture.roles import named_state, parameter_names
from lakonlab.parallel.optimizer_classes import BITSANDBYTES_SUFFIXES
from lakonlab.parallel.state import training_state
from lakonlab.runner.dry_run import build_on_meta
from lakonlab.runner.guard import SkipGuard
from lakonlab.runner.optimizer import build_optimizers
from lakonlab.runner.paths import require_place
from lakonlab.runner.sections import saves_trainable_only
from lakonlab.storage.checkpoint import CheckpointError, checkpoint_name, write_checkpoint
from lakonlab.storage.published_checkpoint import OptimizerState, PublishedCheckpoint, read_published_checkpoint
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.remote_path import as_path
from lakonlab.storage.schemes import LIST, PUBLISH, READ, WRITE

logger = logging.getLogger('lakonlab.runner')

OPTIMIZER_ADVICE = 'Use the optimizer that it was trained with, or import the weights alone with --no-optimizer.'


def import_checkpoint(args: Namespace) -> int:
    """Write a published training checkpoint as one of ours.

    Args:
        args: ``checkpoint``, the published file; ``out``, the directory that gets ``iter_<N>``; ``config`` and
            ``cfg_options`` of the run that goes on from it, ``config`` None to compare with no model; ``no_optimizer``.

    Returns:
        The exit status.

    Raises:
        CheckpointError: The file cannot be read, does not fit the config, or was imported there already.
        ConfigError: The config cannot be used.
    """
    require_place(args.out, 'OUT', READ, WRITE, LIST, PUBLISH)
    published = read_published_checkpoint(args.checkpoint, with_optimizers=not args.no_optimizer)
    cfg = None if args.config is None else _read_config(args.config, args.cfg_options or (), published.seed)
    model, optimizers = published.model, published.optimizers
    if cfg is None:
        logger.warning('without --config nothing is compared with the model that will resume from this')
    else:
        try:
            planned = build_on_meta(cfg, locate=False)
            model = fit_model(model, planned, saves_trainable_only(cfg), published.path)
            optimizers = fit_optimizers(optimizers, planned, cfg.optimizer, published.path)
        except ValueError as error:  # a value of the config that a constructor refuses
            raise ConfigError(str(error)) from error
    tensors, plain = split_optimizers(optimizers)
    out = as_path(args.out)
    publisher = publisher_of(out)
    with publisher.hold(out):
        final = out / checkpoint_name(published.iteration)
        if publisher.is_published(final):
            raise CheckpointError(f'{final} exists already: name another directory, or move it away')
        write_checkpoint(
            out,
            published.iteration,
            {'model': independent(model), 'optimizer': independent(tensors)},
            state_of(published, plain, {} if cfg is None else cfg.optimizer),
            published.config_text if cfg is None else resolved_text(cfg),
        )
    _report(published, final, len(model), len(tensors), args.config)
    return 0


def fit_model(saved: Mapping[str, Tensor], model: nn.Module, trainable_only: bool, origin: object) -> dict[str, Tensor]:
    """Bring the tensors of a published checkpoint to the training state of a model.

    Left out are what the run loads from where its config says (frozen children such as teacher, autoencoder and text
    encoder), buffers that are computed, and what the networks declare in ``ignored_keys``.

    Args:
        saved: Tensors by published name.
        model: The model that will resume, may be on the meta device.
        trainable_only: See :func:`~lakonlab.parallel.state.training_state`.
        origin: The file, for messages.

    Returns:
        Tensors by the names of the training state, in the model's dtypes.

    Raises:
        CheckpointError: Tensors are missing, unknown, of another shape or kind, or not finite; all are named.
    """
    wanted, everything = training_state(model, trainable_only), dict(named_state(model))
    name_of = {id(tensor): name for name, tensor in wanted.items()}
    is_left_out = _left_out(model, wanted)
    kept: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    shared, frozen, unknown = {}, [], []
    for name, tensor in saved.items():
        if name in wanted:
            kept[name] = tensor
        elif name in everything and id(everything[name]) in name_of:
            shared[name] = name_of[id(everything[name])]
        elif is_left_out(name):
            left_out[name.partition('.')[0]] += 1
        else:
            (frozen if name in everything else unknown).append(name)
    differing = [
        f'{name} and {first}'
        for name, first in shared.items()
        if not _same(kept.setdefault(first, saved[name]), saved[name])
    ]
    if left_out:
        parts = ', '.join(f'{count} of {part}' for part, count in left_out.items())
        logger.info('left out, the model has them from elsewhere: %s', parts)
    problems = {
        'missing': [name for name in wanted if name not in kept],
        'not of this model': unknown,
        'frozen in this model, so they are not part of its checkpoints (set runner.ckpt_trainable_only=False to have '
        'them there)': frozen,
        'one tensor in this model, but different in the file': differing,
        'of another shape': [
            f'{name} {tuple(tensor.shape)} in the file, {tuple(wanted[name].shape)} in the model'
            for name, tensor in kept.items()
            if tensor.shape != wanted[name].shape
        ],
        'of another kind': [
            f'{name} {tensor.dtype} in the file, {wanted[name].dtype} in the model'
            for name, tensor in kept.items()
            if tensor.dtype != wanted[name].dtype and not (tensor.dtype.is_floating_point and _is_float(wanted[name]))
        ],
    }
    _refuse(problems, origin, 'Use the config that it was trained with, and the same --cfg-options.')
    dtypes = {name: wanted[name].dtype for name in kept}
    return _cast(kept, dtypes, origin)


def _left_out(model: nn.Module, wanted: Mapping[str, Tensor]) -> Callable[[str], bool]:
    """Whether a tensor that a run does not save may be in a file: a function of its name."""
    children = {name for name, child in model._modules.items() if child is not None}
    trained = {name.partition('.')[0] for name in wanted}
    trained |= {f'{name}_ema' for name in trained}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    patterns = [
        f'{path}.{pattern}'
        for path, module in model.named_modules(remove_duplicate=False)
        for pattern in getattr(module, 'ignored_keys', ())
    ]

    def is_left_out(name: str) -> bool:
        child = name.partition('.')[0]
        return (
            (child in children and child not in trained)
            or name in buffers
            or any(fnmatchcase(name, pattern) for pattern in patterns)
        )

    return is_left_out


def fit_optimizers(
    saved: Mapping[str, OptimizerState], model: nn.Module, config: Mapping[str, Mapping[str, Any]], origin: object
) -> dict[str, OptimizerState]:
    """Bring what published optimisers remember to what those of a config do.

    Args:
        saved: Path of what is trained -> parameter name in the whole model -> slot -> value.
        model: The model that will resume, on the meta device.
        config: The section ``optimizer``.
        origin: The file, for messages.

    Returns:
        The same, with tensors in the dtypes of the optimisers.

    Raises:
        CheckpointError: It is of other parameters, of an optimiser of another type, or of another shape.
    """
    foreign = sorted(set(saved) - set(config))
    _refuse({f'optimizers; the config has {", ".join(config)}': foreign}, origin, OPTIMIZER_ADVICE)
    return {
        key: _fit_optimizer(
            states, _planned_state(model, key, config[key]), config[key]['type'], f'{origin}: optimizer[{key!r}]'
        )
        for key, states in saved.items()
    }


def _fit_optimizer(
    states: OptimizerState, planned: Mapping[str, dict[str, Any] | None], kind: str, where: str
) -> OptimizerState:
    problems = {'of parameters that it does not train': [name for name in states if name not in planned]}
    compared = {name: slots for name, slots in states.items() if planned.get(name) is not None}
    problems[f'not those of {kind}'] = [
        f'{name} has {_listed(slots)}, expected {_listed(planned[name])}'
        for name, slots in compared.items()
        if slots.keys() != planned[name].keys()
    ]
    problems['of another shape'] = [
        f'{slot} of {name} {tuple(value.shape)}, expected {tuple(planned[name][slot].shape)}'
        for name, slots in compared.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor) and isinstance(planned[name].get(slot), Tensor)
        if value.shape != planned[name][slot].shape
    ]
    _refuse(problems, where, OPTIMIZER_ADVICE)
    without = [name for name in planned if name not in states]
    if without:
        logger.warning('%s remembers nothing of %d parameters: %s', where, len(without), _some(without))
    tensors = {
        (name, slot): value for name, slots in states.items() for slot, value in slots.items() if _is_float(value)
    }
    cast = _cast(tensors, {(name, slot): _dtype_of(planned[name], slot) for name, slot in tensors}, where)
    return {
        name: {slot: cast.get((name, slot), value) for slot, value in slots.items()} for name, slots in states.items()
    }


def _planned_state(model: nn.Module, key: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """What an optimiser will remember of each parameter, from a step without values; None where that cannot be had."""
    names = parameter_names(model)
    trained = [parameter for parameter in parameter_names(model.get_submodule(key)) if parameter.requires_grad]
    unknown: dict[str, dict[str, Any] | None] = {names[parameter]: None for parameter in trained}
    if options['type'].endswith(BITSANDBYTES_SUFFIXES):  # computes on its own devices only
        return unknown
    optimizer = build_optimizers(model, {key: dict(options)})[key]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, TypeError):  # it needs values, or a closure
        return unknown
    finally:
        for parameter in trained:
            parameter.grad = None
    state = {names[parameter]: slots for parameter, slots in optimizer.state.items()}
    return {name: {slot: value for slot, value in state.get(name, {}).items() if value is not None} for name in unknown}


def _dtype_of(expected: Mapping[str, Any] | None, slot: str) -> torch.dtype:
    planned = None if expected is None else expected[slot]
    return planned.dtype if _is_float(planned) else torch.float32


def split_optimizers(optimizers: Mapping[str, OptimizerState]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain values of optimisers as checkpoints hold them.

    Args:
        optimizers: Path of what is trained -> parameter name in the whole model -> slot -> value.

    Returns:
        ``<path>/<slot>/<parameter name>`` -> tensor; and ``{path: {slot: {parameter name: value}}}``.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {key: {} for key in optimizers}
    for key, states in optimizers.items():
        for name, slots in states.items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f'{key}/{slot}/{name}'] = value
                else:
                    plain[key].setdefault(slot, {})[name] = value
    return tensors, plain


def state_of(
    published: PublishedCheckpoint, plain: Mapping[str, Any], config: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What a run resumes from beside tensors; of the data only the seed is known.

    Args:
        published: The published checkpoint.
        plain: Second result of :func:`split_optimizers`.
        config: The section ``optimizer``; empty if it is not known.
    """
    state = {
        'iteration': published.iteration,
        'guard': SkipGuard().state_dict(),
        'hooks': {},
        'log_window': {},
        'data': {'seed': published.seed, 'batch_size': None, 'dataset_size': None},
        'optimizer_types': {key: options['type'] for key, options in config.items()},
        'started_from': [],
        'imported_from': {
            'path': str(published.path.absolute()),
            'experiment': published.experiment,
            'version': published.version,
        },
    }
    return {**state, 'optimizers': dict(plain)} if published.optimizers else state


def independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are contiguous and share no memory with each other; copies where they were not or did."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return result


def _read_config(path: str, options: Iterable[str], seed: int | None) -> Config:
    cfg = load_config(path, parse_options(options))
    check_config(cfg, planning=True)
    if cfg.get('seed') is None and seed is not None:
        cfg.seed = seed
    return cfg


def _cast(tensors: Mapping[Any, Tensor], dtypes: Mapping[Any, torch.dtype], origin: object) -> dict[Any, Tensor]:
    """Tensors in the given dtypes; says which were rounded when they were saved."""
    cast, counts, overflown = {}, Counter(), []
    for name, tensor in tensors.items():
        cast[name] = tensor.to(dtypes[name])
        if tensor.dtype != dtypes[name]:
            counts[tensor.dtype, dtypes[name]] += 1
            if not bool(cast[name].isfinite().all()):
                overflown.append(' of '.join(reversed(name)) if isinstance(name, tuple) else name)
    problem = 'not finite, so they became too large for the type that they were saved in, or the run had diverged'
    _refuse({problem: overflown}, origin, 'Import an earlier checkpoint.')
    for (before, after), count in counts.items():
        logger.info('%s: %d tensors are %s, cast to %s; what rounding lost stays lost', origin, count, before, after)
    return cast


def _report(published: PublishedCheckpoint, final: Path, tensors: int, slots: int, config: str | None) -> None:
    if published.has_loss_scaler:
        logger.info('left out: the state of the loss scaler, which runs here do not have')
    if not published.optimizers:
        logger.warning('%s is imported without state of optimizers, which will start anew', published.path)
    of_run = f' of {published.experiment}' if published.experiment else ''
    seed = '' if published.seed is None else f' --seed {published.seed}'
    logger.info('wrote %s%s: %d tensors of the model, %d of optimizers', final, of_run, tensors, slots)
    logger.info('go on with: python tools/train.py %s --resume-from %s%s', config or 'CONFIG', final, seed)


def _refuse(problems: Mapping[str, list[str]], origin: object, advice: str) -> None:
    found = [f'{len(names)} {what}: {_some(names)}' for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f'{origin} does not fit: {"; ".join(found)}. {advice}')


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _listed(names: Iterable[str]) -> str:
    return ', '.join(sorted(names)) or 'nothing'


def _some(names: list[str], most: int = 8) -> str:
    return ', '.join(names[:most]) + (f', and {len(names) - most} more' if len(names) > most else '')
