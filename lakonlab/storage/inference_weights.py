"""Weights for inference, taken out of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lakonlab.storage import files
from lakonlab.storage.adapter_layout import WEIGHTS_FILE, published_tensors
from lakonlab.storage.checkpoint import read_tensors
from lakonlab.storage.local import sha256_of
from lakonlab.storage.publisher import Record, publisher_of
from lakonlab.storage.remote_path import AnyPath

FOLDER = 'export'
FILE = WEIGHTS_FILE
META = {'format': 'pt'}
STAGED_BYTES = 1 << 30
"""A larger file for an object store is made on a disk rather than in memory, where its tensors are already."""


def add_inference_weights(
    checkpoint: AnyPath,
    place: AnyPath,
    role: str,
    metadata: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    card: tuple[str, Callable[[str], str]] | None = None,
    lora_factor: float = 1.0,
) -> dict[str, Record]:
    """Write the weights of a network of a checkpoint as one file, named as published adapters are.

    Args:
        checkpoint: Directory of the checkpoint, not yet published.
        place: Where what is in it will be when it is.
        role: ``diffusion_ema`` or ``diffusion``.
        metadata: Of the file.
        texts: Name -> content of files beside it.
        card: Name of a further file, and what makes its content from the place of the folder.
        lora_factor: See :func:`~lakonlab.storage.adapter_layout.published_tensors`.

    Returns:
        Names of the files, ``export/diffusion_pytorch_model.safetensors`` and those beside it -> size and checksum.
    """
    prefix = f'{role}.denoising.'
    tensors = published_tensors(read_tensors(checkpoint, 'model', prefix), prefix, lora_factor)
    publisher, folder = publisher_of(checkpoint), checkpoint / FOLDER
    records = {f'{FOLDER}/{FILE}': _write(folder / FILE, tensors, {**META, **(metadata or {})})}
    texts = dict(texts or {})
    if card is not None:
        name, text_of = card
        texts[name] = text_of(str(place / FOLDER))
    for name, text in texts.items():
        records[f'{FOLDER}/{name}'] = publisher.write(folder / name, text.encode())
    return records


def _write(path: AnyPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Record:
    from safetensors.torch import save, save_file

    size = sum(tensor.nbytes for tensor in tensors.values())
    if isinstance(path, Path) or size <= STAGED_BYTES:
        return publisher_of(path).write(path, save(dict(tensors), dict(metadata)))
    with files.staged(path.url, size) as local:
        save_file(dict(tensors), local, dict(metadata))
        return {'size': local.stat().st_size, 'sha256': sha256_of(local)}
