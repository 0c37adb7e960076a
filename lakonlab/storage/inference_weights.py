"""Weights for inference, taken out of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lakonlab.storage import files
from lakonlab.storage.checkpoint import read_tensors
from lakonlab.storage.local import sha256_of
from lakonlab.storage.publisher import Record, publisher_of
from lakonlab.storage.remote_path import AnyPath

FOLDER = 'export'
FILE = 'diffusion_pytorch_model.safetensors'
META = {'format': 'pt'}
STAGED_BYTES = 1 << 30
"""A larger file for an object store is made on a disk rather than in memory, where its tensors are already."""


def add_inference_weights(checkpoint: AnyPath, role: str) -> dict[str, Record]:
    """Write the weights of a network of a checkpoint as one file, named as published adapters are.

    Args:
        checkpoint: Directory of the checkpoint.
        role: ``diffusion_ema`` or ``diffusion``.

    Returns:
        ``export/diffusion_pytorch_model.safetensors``, the name of the file in the directory -> its size and checksum.
    """
    prefix = f'{role}.denoising.'
    tensors = {
        re.sub(r'(\.lora_[AB])\.default(?=\.)', r'\1', name.removeprefix(prefix)): tensor
        for name, tensor in read_tensors(checkpoint, 'model', prefix).items()
    }
    return {f'{FOLDER}/{FILE}': _write(checkpoint / FOLDER / FILE, tensors)}


def _write(path: AnyPath, tensors: Mapping[str, Tensor]) -> Record:
    from safetensors.torch import save, save_file

    size = sum(tensor.nbytes for tensor in tensors.values())
    if isinstance(path, Path) or size <= STAGED_BYTES:
        return publisher_of(path).write(path, save(dict(tensors), META))
    with files.staged(path.url, size) as local:
        save_file(dict(tensors), local, META)
        return {'size': local.stat().st_size, 'sha256': sha256_of(local)}
