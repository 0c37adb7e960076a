"""Tensors as files of adapters have them: under published names, low-rank products to be added with a factor of 1."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

WEIGHTS_FILE = 'diffusion_pytorch_model.safetensors'
UP_MATRIX = '.lora_B.weight'
COMPUTED = 'pos_embed.pos_embed'
"""A table of published checkpoints that networks compute."""


def published_name(name: str) -> str:
    """A name without that of the adapter in a training run: ``x.lora_A.weight`` of ``x.lora_A.default.weight``."""
    return re.sub(r'(\.lora_[AB])\.default(?=\.)', r'\1', name)


def published_tensors(state: Mapping[str, Tensor], prefix: str, lora_factor: float = 1.0) -> dict[str, Tensor]:
    """The tensors of a network of a checkpoint as its export has them.

    Args:
        state: Tensors of the checkpoint.
        prefix: Of those of the network, such as ``'diffusion_ema.denoising.'``.
        lora_factor: What the product of low-rank matrices is multiplied with; it goes into the second of them, since
            readers of the layout know only 1.
    """
    tensors = {
        published_name(name.removeprefix(prefix)): tensor for name, tensor in state.items() if name.startswith(prefix)
    }
    tensors.pop(COMPUTED, None)
    if lora_factor != 1:
        second = [name for name in tensors if name.endswith(UP_MATRIX)]
        tensors.update({name: tensors[name] * lora_factor for name in second})
    return tensors
