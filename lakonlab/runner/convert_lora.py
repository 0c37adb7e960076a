"""Writes the LoRA of another program in the layout of diffusers."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch

from lakonlab.models.architecture.adapters import SIDES, read_lora
from lakonlab.models.architecture.loading import PretrainedError

CONVERTER = 'FluxLoraLoaderMixin'


def convert_flux_lora(args: Namespace) -> int:
    """Read a LoRA of FLUX in any layout that diffusers knows, such as ComfyUI's, and write it in its own.

    Args:
        args: ``source`` and ``target``, a file.

    Raises:
        PretrainedError: The file cannot be read, or is of no layout that is known.
    """
    from safetensors.torch import save_file

    lora, alphas = read_lora(args.source, CONVERTER, 'IN')
    layers = {name.removesuffix(side) for name in lora for side in SIDES if name.endswith(side)}
    strangers = _strangers(layers)
    if strangers:
        raise PretrainedError(
            f'IN={str(args.source)!r} holds matrices of {len(strangers)} layers that FLUX does not have: '
            f'{", ".join(strangers[:8])}; expected a LoRA of FLUX.1 of ComfyUI, kohya, XLabs or diffusers'
        )
    tensors = {}
    for name, tensor in lora.items():
        layer = name.removesuffix(SIDES[1])
        if name.endswith(SIDES[1]) and layer in alphas:  # the layout has no alpha: it goes into the second matrix
            tensor = tensor.float() * (alphas[layer] / lora[f'{layer}{SIDES[0]}'].shape[0])
        # query, key and value of a layer that was one get the same first matrix, which safetensors refuses
        tensors[f'transformer.{name}'] = tensor.clone(memory_format=torch.contiguous_format)
    target = Path(args.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, {'format': 'pt'})
    print(f'{target}: {len(layers)} layers')  # noqa: T201
    return 0


def _strangers(layers: Iterable[str]) -> list[str]:
    """Those that no transformer of FLUX.1 has, whatever its size."""
    from diffusers import FluxTransformer2DModel

    with torch.device('meta'):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    known = dict(network.named_modules())
    return sorted(layer for layer in layers if re.sub(r'(?<=transformer_blocks\.)\d+', '0', layer) not in known)
