"""What the tools for checkpoints do: weights for inference, counting parameters, removing old checkpoints."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lakonlab.storage.checkpoint import (
    LATEST_NAMES,
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_model_state,
    require_checkpoint,
    tensor_info,
)
from lakonlab.storage.paths import is_remote
from lakonlab.storage.published_checkpoint import read_published_checkpoint
from lakonlab.storage.publisher import MANIFEST, publisher_of
from lakonlab.storage.remote_path import AnyPath, as_path

logger = logging.getLogger(__name__)

NETWORKS = ('diffusion_ema.', 'diffusion.')
EMA = NETWORKS[0]
BEST = 'best_'


def model_state(path: str) -> tuple[dict[str, Tensor], str]:
    """Tensors of the model of a checkpoint, or of a published ``.pth``, and a name for what is made of it."""
    if Path(path).is_file():
        if Path(path).suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path), Path(path).stem
        return read_published_checkpoint(path, with_optimizers=False).model, Path(path).stem
    found = require_checkpoint(path)
    return load_model_state(found), found.name


def in_precision(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another floating-point precision.

    Raises:
        CheckpointError: A value is finite, but not in that precision.
    """
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not bool(result[name].isfinite().all()) and bool(tensor.isfinite().all()):
            raise CheckpointError(f'{name} has values that {dtype} cannot hold: choose another --dtype')
    return result


def save_inference_weights(args: Namespace) -> int:
    """Write the networks of a checkpoint, without the state of a run, as one file that ``pretrained=`` takes.

    Args:
        args: ``path``, ``out_path``, ``dtype`` and ``ema_only``.
    """
    from safetensors.torch import save_file

    if args.out_path is None and is_remote(args.path):
        raise CheckpointError(f'{args.path} is no local place: say where to write the weights with --out-path')
    state, stem = model_state(args.path)
    state = {name: tensor for name, tensor in state.items() if name.startswith(EMA if args.ema_only else NETWORKS)}
    if not state:
        wanted = EMA if args.ema_only else ' nor '.join(NETWORKS)
        raise CheckpointError(f'{args.path} holds no {wanted.replace(".", "")}')
    state = in_precision(state, getattr(torch, args.dtype))
    place = Path(args.path)
    folder = place.parent if place.name in LATEST_NAMES or place.is_file() or stem == place.name else place
    out = Path(args.out_path) if args.out_path else folder / f'{stem}_inference.safetensors'
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out, {'format': 'pt'})
    print(f'{out}: {len(state)} tensors, {out.stat().st_size / 1e6:.1f} MB')  # noqa: T201
    return 0


def count_parameters(args: Namespace) -> int:
    """Print how many parameters the networks of a checkpoint or a file have.

    Args:
        args: ``path`` and ``ema_only``.
    """
    sizes: dict[str, int]
    if Path(args.path).is_file():
        sizes = {name: tensor.numel() for name, tensor in model_state(args.path)[0].items()}
    else:
        found = require_checkpoint(args.path)
        sizes = {name: shape.numel() for name, (shape, _) in tensor_info(found, 'model').items()}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {'layers': 0, 'LoRA': 0})
    for name, size in sizes.items():
        network = next((prefix for prefix in NETWORKS if name.startswith(prefix)), '')
        if not args.ema_only or network == EMA:
            counts[network.rstrip('.') or 'weights']['LoRA' if '.lora_' in name else 'layers'] += size
    if not counts:
        raise CheckpointError(f'{args.path} holds no {EMA.rstrip(".")}')
    for network, parts in sorted(counts.items()):
        total = sum(parts.values())
        detail = f' ({parts["layers"]:,} of layers, {parts["LoRA"]:,} of LoRA)' if parts['LoRA'] else ''
        print(f'{network}: {total:,} parameters, {total / 1e6:.2f} M{detail}')  # noqa: T201
    return 0


def removable(run_dir: AnyPath) -> list[AnyPath]:
    """Checkpoints of a run that nothing goes on from: never the newest valid one, what is newer, nor the best.

    Args:
        run_dir: Directory of the run, of our checkpoints or published ``.pth`` files, of which ``latest.pth`` is one.
    """
    ours = list_checkpoints(run_dir)
    newest = find_checkpoint(run_dir) if ours else None
    removed = ours[ours.index(newest) + 1 :] if newest in ours else []
    if isinstance(run_dir, Path):
        removed += _removable_files(run_dir)
    return removed


def _removable_files(run_dir: Path) -> list[Path]:
    files = [path for path in run_dir.glob('iter_*.pth') if path.is_file() and path.stem[5:].isdigit()]
    if not files:
        return []
    kept = {max(files, key=lambda path: int(path.stem[5:])).resolve()}
    kept |= {(run_dir / name).resolve() for name in LATEST_NAMES if (run_dir / name).exists()}
    pointer = run_dir / 'latest.txt'
    if pointer.is_file():
        kept.add((run_dir / Path(pointer.read_text(encoding='utf-8').strip()).name).resolve())
    kept |= {path.resolve() for path in run_dir.glob(f'{BEST}*')}
    return sorted(path for path in files if path.resolve() not in kept)


def clean_checkpoints(args: Namespace, ask: Callable[[str], str] = input) -> int:
    """Remove the checkpoints of a run but the newest and the best, after asking.

    Args:
        args: ``path``; ``dry_run``: only say what would be removed; ``yes``: do not ask; ``save_inf``: keep the weights
            for inference of each.
        ask: Puts a question.
    """
    run_dir = as_path(args.path)
    if not run_dir.is_dir():
        raise CheckpointError(f'{args.path} is no directory of checkpoints')
    _require_checkpoints(run_dir)
    paths = removable(run_dir)
    if not paths:
        print(f'{run_dir}: nothing to remove')  # noqa: T201
        return 0
    print(f'{run_dir}: {_named(paths)} {"would" if args.dry_run else "will"} be removed')  # noqa: T201
    if args.dry_run:
        return 0
    if not args.yes and not _agreed(ask, f'remove {len(paths)} checkpoints? [y/N] '):
        print('nothing was removed')  # noqa: T201
        return 0
    for path in paths:
        if args.save_inf:
            save_inference_weights(
                Namespace(
                    path=str(path),
                    out_path=str(run_dir / f'{path.stem}_inference.safetensors'),
                    dtype=args.dtype,
                    ema_only=False,
                )
            )
        if path.is_file():
            path.unlink()
        else:
            publisher_of(run_dir).remove(path)
        logger.info('removed %s', path)
    print(f'removed {len(paths)}')  # noqa: T201
    return 0


def _require_checkpoints(run_dir: AnyPath) -> None:
    """Tell a directory with nothing to remove from one that is none of a run.

    Raises:
        CheckpointError: It is none.
    """
    if (run_dir / MANIFEST).is_file():
        raise CheckpointError(f'{run_dir} is a single checkpoint: name the directory of the run, {run_dir.parent}')
    if _holds_checkpoints(run_dir):
        return
    runs = sorted(child.name for child in run_dir.iterdir() if child.is_dir() and _holds_checkpoints(child))
    advice = f': name one of the runs in it, {", ".join(runs[:8])}' if runs else ', neither iter_<n> nor iter_<n>.pth'
    raise CheckpointError(f'{run_dir} holds no checkpoints{advice}')


def _holds_checkpoints(folder: AnyPath) -> bool:
    return any(re.fullmatch(r'(iter_\d+|best_.+|latest)(\.pth)?', child.name) for child in folder.iterdir())


def _agreed(ask: Callable[[str], str], question: str) -> bool:
    try:
        return ask(question).strip().lower() in ('y', 'yes')
    except EOFError:  # nobody is there to answer
        return False


def _named(paths: Iterable[AnyPath]) -> str:
    return ', '.join(path.name for path in paths)
