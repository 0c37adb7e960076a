"""Small networks that several tests build."""

from __future__ import annotations

import torch
from torch import nn

from lakonlab.registry import MODULES

TINY = {
    'num_attention_heads': 2,
    'attention_head_dim': 16,
    'in_channels': 4,
    'num_layers': 2,
    'sample_size': 8,
    'num_embeds_ada_norm': 10,
}
STUDENTS = {
    'GMDiTTransformer2DModelV2': {'num_gaussians': 3, 'logstd_inner_dim': 12},
    'GMDiTTransformer2DModel': {'num_gaussians': 3, 'logstd_inner_dim': 12},
    'DXDiTTransformer2DModel': {'n_grid': 3},
}
ALL = {'DiTTransformer2DModelMod': {}, **STUDENTS}


def build(type_name: str, **arguments) -> nn.Module:
    """A tiny network of the DiT family."""
    return MODULES.build({'type': type_name, **TINY, **ALL.get(type_name, {}), **arguments})


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with all parameters drawn anew: after adaLN-Zero initialisation a block does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(size: tuple[int, int] = (8, 8), batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, times and labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 4, *size, generator=generator)
    return images, torch.rand(batch, generator=generator), torch.randint(0, 11, (batch,), generator=generator)


def flat(output) -> torch.Tensor:
    """All tensors of a network's output in one vector."""
    values = output.values() if isinstance(output, dict) else [output]
    return torch.cat([value.float().flatten() for value in values])
