"""What a training run would do, without doing it: nothing is trained or loaded, and nothing stays written."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from lakonlab.config.errors import ConfigError
from lakonlab.config.load import resolved_text
from lakonlab.evaluation.entries import entry_name, images_folder, run_name
from lakonlab.registry import DATASETS, MODELS
from lakonlab.runner.data_plan import planned_data_problems, used_splits
from lakonlab.runner.memory_plan import OVERHEAD, STRATEGIES, Plan, Sizes, plan, recommendation, remarks, table
from lakonlab.runner.memory_sizes import sizes_of
from lakonlab.runner.paths import places_written, require_writable_places, run_directory
from lakonlab.runner.resume import find_starting_point
from lakonlab.runner.sections import training_loader_options
from lakonlab.storage.errors import StorageError
from lakonlab.storage.paths import is_remote
from lakonlab.storage.remote_path import AnyPath

MEBIBYTE = 2**20
MISSING = 'MISSING'
UNWRITABLE = 'NOT WRITABLE'
WEIGHT_KEYS = ('pretrained', 'pretrained_adapter', 'pretrained_lora')
"""Arguments of networks that name files of weights."""


def build_on_meta(cfg: Mapping[str, Any], locate: bool = True) -> nn.Module:
    """Build the model of a config without memory for its weights.

    Args:
        cfg: The config.
        locate: Whether files named by ``pretrained`` must exist; they are never read.
    """
    model = dict(cfg['model']) if locate else _without_pretrained(cfg['model'])
    sections = {key: copy.deepcopy(dict(cfg.get(key) or {})) for key in ('train_cfg', 'test_cfg')}
    with torch.device('meta'):
        return MODELS.build({**copy.deepcopy(model), **sections})


def _without_pretrained(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _without_pretrained(value) for key, value in node.items() if key not in WEIGHT_KEYS}
    return node


def pretrained_files(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Where the weights that a config names were found.

    Args:
        cfg: The config.

    Returns:
        Dotted key -> path; paths that cannot be used begin with ``MISSING`` and say why.
    """
    from lakonlab.models.architecture.loading import PretrainedError, locate_weights

    files = {}
    for key, path in _pretrained_paths(cfg['model'], 'model'):
        try:
            files[key] = str(locate_weights(path, key))
        except (FileNotFoundError, PretrainedError) as error:
            files[key] = f'{MISSING}: {error}'
    return files


def _pretrained_paths(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in WEIGHT_KEYS and isinstance(value, str):
                yield f'{path}.{key}', value
            elif key in WEIGHT_KEYS and isinstance(value, (list, tuple)):
                yield from ((f'{path}.{key}.{index}', item) for index, item in enumerate(value))
            else:
                yield from _pretrained_paths(value, f'{path}.{key}')


def count_parameters(model: nn.Module, trained: Iterable[str]) -> list[tuple[str, int, int, int]]:
    """Parameters by child of the model and by child of those.

    Args:
        model: Any module.
        trained: Paths of the submodules that have an optimiser; what they do not reach is not trainable.

    Returns:
        Rows (path, parameters, trainable parameters, bytes with buffers). What several children share is counted at the
        first; the last row, ``total``, counts everything once.
    """
    rows, seen = [], set()
    optimised = {id(p) for key in trained for p in model.get_submodule(key).parameters() if p.requires_grad}
    for name, child in model.named_children():
        for path, module in [(f'{name}.{sub}', sub_module) for sub, sub_module in child.named_children()] or [
            (name, child)
        ]:
            own = [p for p in module.parameters() if id(p) not in seen]
            buffers = [b for b in module.buffers() if id(b) not in seen]
            seen.update(id(tensor) for tensor in [*own, *buffers])
            if own or buffers:
                rows.append((path, *_sizes(own, buffers, optimised)))
    rest = [p for p in model.parameters() if id(p) not in seen]
    if rest:
        rows.append(('(others)', *_sizes(rest, [], optimised)))
    rows.append(('total', *_sizes(list(model.parameters()), list(model.buffers()), optimised)))
    return rows


def _sizes(parameters: list[nn.Parameter], buffers: list[torch.Tensor], optimised: set[int]) -> tuple[int, int, int]:
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if id(p) in optimised),
        sum(_bytes(tensor) for tensor in [*parameters, *buffers]),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def dry_run(
    cfg: Config, work_dir: str, seed: int, resume_from: str | None = None, world_sizes: Sequence[int] = (1, 8)
) -> str:
    """Describe the run that a checked config would make.

    Args:
        cfg: The config.
        work_dir: Directory of its logs.
        seed: Its seed.
        resume_from: Checkpoint named on the command line.
        world_sizes: Numbers of processes to plan memory for.

    Returns:
        The description; its last lines say so if a file that the run needs is missing, or a place cannot be written to.
    """
    model = build_on_meta(cfg, locate=False)
    files, refused = pretrained_files(cfg), unwritable_places(cfg)
    parts = [
        title('config'),
        resolved_text(cfg).rstrip(),
        title('parameters'),
        parameter_table(model, cfg.optimizer),
        title('length'),
        _length(cfg),
        title('memory of one process'),
        *_memory(model, cfg, world_sizes),
        title('files'),
        _places(cfg, work_dir, seed, resume_from, refused),
        *(f'  {key}\n{" " * 18}{found}' for key, found in files.items()),
    ]
    problems = planned_data_problems(cfg, used_splits(cfg, training=True))
    if problems:
        parts += [title('data'), *(f'  {MISSING}: {problem}' for problem in problems)]
    parts += cannot_start('run', [key for key, found in files.items() if found.startswith(MISSING)], problems)
    if refused:
        parts.append(f'\nThis run cannot start yet: {", ".join(refused)} cannot be written to.')
    return '\n'.join(parts)


def cannot_start(
    what: str, weights: Sequence[str], problems: Sequence[str], references: Sequence[str] = ()
) -> list[str]:
    """The last line of a plan, if something is missing.

    Args:
        what: What is planned.
        weights: Keys of the weights that are missing.
        problems: What data sets do not bring.
        references: Files of reference statistics that are missing.
    """
    reasons = [f'the weights of {", ".join(weights)} are missing'] if weights else []
    reasons += ['data sets lack what is said above'] if problems else []
    reasons += [f'there is no {", ".join(references)}'] if references else []
    return [f'\nThis {what} cannot start yet: {"; ".join(reasons)}.'] if reasons else []


def _memory(model: nn.Module, cfg: Config, world_sizes: Sequence[int]) -> list[str]:
    sizes, notes = sizes_of(model, cfg)
    plans = memory_plans(sizes, cfg, world_sizes, notes)
    single = [
        ('frozen', sizes.frozen + sizes.resident),
        ('trainable', sizes.trainable),
        ('EMA', sizes.average),
        ('gradients', sizes.gradients),
        ('optimizer', sizes.optimizer),
        ('activations', sizes.kept and sizes.kept.most),
        ('the same, checkpointing', sizes.checkpointed and sizes.checkpointed.most),
    ]
    network = getattr(model.diffusion, 'denoising', None)
    return [
        *(f'  {what:<24}{"unknown" if size is None else f"{size / MEBIBYTE:,.1f} MB":>16}' for what, size in single),
        '',
        *table(plans),
        '',
        *(f'  {sentence}' for sentence in recommendation(plans, bool(getattr(network, 'checkpointing', False)))),
        '',
        *(f'  {sentence}' for sentence in remarks(plans, sizes.passes)),
        *(f'  {note}.' for note in notes),
        f'  {OVERHEAD / 2**30:.0f} GB are set aside on every card for the driver and libraries; see docs/memory.md.',
    ]


def memory_plans(sizes: Sizes, cfg: Mapping[str, Any], world_sizes: Sequence[int], notes: list[str]) -> list[Plan]:
    """Plans of all strategies: of one process alone, of several under each that shares them out.

    Args:
        sizes: Of the config.
        cfg: The config, of which ``fsdp_kwargs`` counts.
        world_sizes: Numbers of processes.
        notes: Gets what is impossible.
    """
    options = {
        key: value for key, value in (cfg.get('fsdp_kwargs') or {}).items() if key in ('hybrid_sharding', 'shard_size')
    }
    plans = []
    for world_size in world_sizes:
        for strategy in STRATEGIES:
            if (strategy == 'single') != (world_size == 1):
                continue
            try:
                plans.append(plan(sizes, strategy, world_size, **options))
            except ConfigError as error:
                notes.append(f'{strategy} is impossible on {world_size} processes: {error}')
    return plans


def title(text: str) -> str:
    """A heading."""
    return f'\n{text}\n{"-" * len(text)}'


def parameter_table(model: nn.Module, trained: Iterable[str] = ()) -> str:
    """Rows of :func:`count_parameters` as text."""
    rows = count_parameters(model, trained)
    width = max(len(row[0]) for row in rows)
    lines = [f'  {"module":<{width}} {"parameters":>16} {"trainable":>16} {"MB":>10}']
    lines += [
        f'  {path:<{width}} {total:>16,} {trained:>16,} {size / MEBIBYTE:>10,.1f}'
        for path, total, trained, size in rows
    ]
    return '\n'.join(lines)


def _length(cfg: Config) -> str:
    batch = training_loader_options(cfg.data)['samples_per_gpu']
    micro = (cfg.get('train_cfg') or {}).get('grad_accum_batch_size') or batch
    micro = max(1, min(micro, batch))
    samples = cfg.total_iters * batch
    try:
        size = len(DATASETS.build(copy.deepcopy(dict(cfg.data.train))))
        epochs = f'{samples / size:,.1f} of {size:,} samples'
    except (ImportError, OSError, ValueError) as error:
        epochs = f'unknown, the data set cannot be opened: {error}'
    return _length_table(cfg, batch, micro, epochs)


def _length_table(cfg: Config, batch: int, micro: int, epochs: str) -> str:
    return '\n'.join(
        [
            f'  batch           {batch:,} = {batch // micro} micro-batches of {micro:,}, 1 process',
            f'  iterations      {cfg.total_iters:,}',
            f'  samples         {cfg.total_iters * batch:,}',
            f'  epochs          {epochs}',
        ]
    )


def _places(cfg: Config, work_dir: str, seed: int, resume_from: str | None, refused: Mapping[str, str]) -> str:
    section = cfg.get('checkpoint_config')
    mirror = cfg.get('work_dir_mirror')
    run_dir = _run_directory(cfg, work_dir) if section else 'none (checkpoint_config is not set)'
    lines = [f'  logs            {work_dir}']
    lines += [f'  copy of logs    {mirror}', *_verdict(mirror, 'work_dir_mirror', refused)] if mirror else []
    lines += [f'  checkpoints     {run_dir}', *_verdict(run_dir, 'checkpoint_config.out_dir', refused)]
    for number, entry in enumerate(cfg.get('evaluation') or ()):
        name = entry_name(entry.get('data', 'val'), entry.get('prefix'))
        if entry.get('viz_num') != 0:
            images = images_folder(entry.get('viz_dir'), run_name(work_dir), name)
            lines += [f'  images          {images}', *_verdict(images, f'evaluation[{number}].viz_dir', refused)]
    lines.append(f'  run             {_start(cfg, work_dir, resume_from)}, seed {seed}')
    return '\n'.join(lines)


def unwritable_places(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Setting -> why it cannot be written to, of every remote directory that a run would write to.

    A small file is written to each, and removed again.
    """
    refused = {}
    for setting in places_written(cfg):
        try:
            require_writable_places(cfg, setting)
        except OSError as error:
            refused[setting] = str(error)
    return refused


def _verdict(place: object, setting: str, refused: Mapping[str, str]) -> list[str]:
    """Whether a remote directory can be written to, as an indented line."""
    if not is_remote(str(place)):
        return []
    return [f'{" " * 18}{f"{UNWRITABLE}: {refused[setting]}" if setting in refused else "can be written to"}']


def _run_directory(cfg: Config, work_dir: str) -> AnyPath:
    out_dir = (cfg.get('checkpoint_config') or {}).get('out_dir')
    return run_directory(out_dir, work_dir, cfg.get('work_dir_mirror'))


def _start(cfg: Config, work_dir: str, resume_from: str | None) -> str:
    """Where the run begins, as far as that can be looked at."""
    section = cfg.get('checkpoint_config')
    try:
        start = find_starting_point(
            _run_directory(cfg, work_dir),
            resume_from=resume_from,
            configured_resume_from=cfg.get('resume_from'),
            load_from=cfg.get('load_from'),
            auto_resume=(cfg.get('runner') or {}).get('auto_resume', True) and bool(section),
        )
    except StorageError as error:
        return f'begins where its checkpoints say, which cannot be looked at ({error})'
    what = {'resume': 'resumes from', 'weights': 'starts with the weights of', 'fresh': 'starts from the beginning'}
    origin = '' if start.checkpoint is None else f' {start.checkpoint}'
    return f'{what[start.mode]}{origin} ({start.reason})'
