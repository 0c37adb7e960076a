"""Adapters with random values, written as published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DX = dict(type='DX', segment_size=1 / 3.5, shift=3.2)
RECIPE = dict(nfe=4, shift=3.2, final_step_size_scale=0.5, total_substeps=32)


def random_lora(base: nn.Module, layers: tuple[str, ...], rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Low-rank matrices for the layers of a transformer whose names end like this."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(layers):
            shapes = {'A': (rank, module.in_features), 'B': (module.out_features, rank)}
            for side, shape in shapes.items():
                lora[f'{name}.lora_{side}.weight'] = torch.randn(shape, generator=generator) * 0.3
    assert lora
    return lora


def random_tensors(base: nn.Module, kind: str = 'GM', lora: bool = True, points: int = 3, seed: int = 0):
    """Tensors of an adapter of ``'GM'`` or ``'DX'`` with patches of 2 by 2 pixels."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = base.proj_out.weight.shape
    condition = base.norm_out.linear.in_features
    sizes = {
        'GM': {'proj_out_means': (points * rows, width), 'proj_out_logweights': (points * 4, width)},
        'DX': {'proj_out': (points * rows, width)},
    }[kind]
    if kind == 'GM':
        sizes.update({'proj_out_logstds.1': (12, condition), 'proj_out_logstds.3': (1, 12)})
    sizes['norm_out.linear'] = tuple(base.norm_out.linear.weight.shape)
    tensors = {}
    for name, (outputs, inputs) in sizes.items():
        tensors[f'{name}.weight'] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        tensors[f'{name}.bias'] = torch.randn(outputs, generator=generator) * 0.1
    if lora:
        tensors.update(random_lora(base, ('mlp.net.2', 'ff.net.2', 'timestep_embedder.linear_1'), seed=seed))
    return tensors


def write_adapter(
    folder: Path,
    base: nn.Module,
    kind: str = 'GM',
    recipe: dict[str, Any] | None = RECIPE,
    policy: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    **options: Any,
) -> Path:
    """Write an adapter with random tensors, or with those that are given; see :func:`random_tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    policy = policy if policy is not None else DX if kind == 'DX' else dict(type='GMFlow')
    metadata = {'policy_config': json.dumps(policy)} if policy else {}
    if recipe is not None:
        metadata['piflow_recipe'] = json.dumps(recipe)
    if tensors is None:
        tensors = random_tensors(base, kind, **options)
    save_file(tensors, folder / 'diffusion_pytorch_model.safetensors', metadata or None)
    content = {'_class_name': type(base).__name__} if config is None else config
    (folder / 'config.json').write_text(json.dumps(content))
    return folder


def write_euler_adapter(folder: Path, base: nn.Module) -> Path:
    """Write an adapter with which one evaluation is one Euler step of the base: a mixture of one narrow component."""
    output = base.proj_out
    bias = torch.zeros(output.out_features) if output.bias is None else output.bias
    means = {'proj_out_means.weight': output.weight, 'proj_out_means.bias': bias}
    tensors = {name: tensor.detach().clone() for name, tensor in means.items()}
    tensors['proj_out_logweights.weight'] = torch.zeros(4, output.in_features)
    tensors['proj_out_logweights.bias'] = torch.zeros(4)
    config = dict(_class_name=type(base).__name__, constant_logstd=-12.0)
    return write_adapter(folder, base, config=config, tensors=tensors, recipe={**RECIPE, 'nfe': 1})
