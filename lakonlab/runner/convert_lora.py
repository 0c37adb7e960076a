"""Writes the LoRA of another program in the layout of diffusers."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from lakonlab.models.architecture.adapters import SIDES, read_lora

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
    tensors = {}
    for name, tensor in lora.items():
        layer = name.removesuffix(SIDES[1])
        if name.endswith(SIDES[1]) and layer in alphas:  # the layout has no alpha: it goes into the second matrix
            tensor = tensor.float() * (alphas[layer] / lora[f'{layer}{SIDES[0]}'].shape[0])
        tensors[f'transformer.{name}'] = tensor.contiguous()
    target = Path(args.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, {'format': 'pt'})
    print(f'{target}: {len(tensors) // 2} layers')  # noqa: T201
    return 0
