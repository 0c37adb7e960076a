"""Weights for inference, taken out of a checkpoint."""

from __future__ import annotations

import re

from lakonlab.storage.checkpoint import read_tensors
from lakonlab.storage.publisher import Record, publisher_of
from lakonlab.storage.remote_path import AnyPath

FOLDER = 'export'
FILE = 'diffusion_pytorch_model.safetensors'


def add_inference_weights(checkpoint: AnyPath, role: str) -> dict[str, Record]:
    """Write the weights of a network of a checkpoint as one file, named as published adapters are.

    Args:
        checkpoint: Directory of the checkpoint.
        role: ``diffusion_ema`` or ``diffusion``.

    Returns:
        ``export/diffusion_pytorch_model.safetensors``, the name of the file in the directory -> its size and checksum.
    """
    from safetensors.torch import save

    prefix = f'{role}.denoising.'
    tensors = {
        re.sub(r'(\.lora_[AB])\.default(?=\.)', r'\1', name.removeprefix(prefix)): tensor
        for name, tensor in read_tensors(checkpoint, 'model', prefix).items()
    }
    record = publisher_of(checkpoint).write(checkpoint / FOLDER / FILE, save(tensors, {'format': 'pt'}))
    return {f'{FOLDER}/{FILE}': record}
