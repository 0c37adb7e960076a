"""Weights for inference, taken out of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lakonlab.storage.checkpoint import read_tensors
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.remote_path import AnyPath

FOLDER = 'export'
FILE = 'diffusion_pytorch_model.safetensors'


def add_inference_weights(
    checkpoint: AnyPath,
    role: str,
    metadata: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    lora_factor: float = 1.0,
) -> AnyPath:
    """Write the weights of a network of a checkpoint as one file, named as published adapters are.

    Args:
        checkpoint: Directory of the checkpoint.
        role: ``diffusion_ema`` or ``diffusion``.
        metadata: Of the file.
        texts: Name -> content of files beside it.
        lora_factor: What the product of low-rank matrices is multiplied with, which goes into the second of them.

    Returns:
        The file, ``export/diffusion_pytorch_model.safetensors`` in the directory.
    """
    from safetensors.torch import save

    prefix = f'{role}.denoising.'
    tensors = {
        re.sub(r'(\.lora_[AB])\.default(?=\.)', r'\1', name.removeprefix(prefix)): tensor
        for name, tensor in read_tensors(checkpoint, 'model').items()
        if name.startswith(prefix)
    }
    if lora_factor != 1:
        second = [name for name in tensors if name.endswith('.lora_B.weight')]
        tensors.update({name: tensors[name] * lora_factor for name in second})
    path = checkpoint / FOLDER / FILE
    publisher = publisher_of(checkpoint)
    publisher.write(path, save(tensors, {'format': 'pt', **(metadata or {})}))
    for name, text in (texts or {}).items():
        publisher.write(checkpoint / FOLDER / name, text.encode())
    return path
