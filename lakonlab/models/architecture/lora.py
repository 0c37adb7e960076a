"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685), injected by peft."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import nn

OUTPUT_LAYERS = ('norm_out', 'proj_out')


def add_lora(
    transformer: nn.Module,
    target_modules: Sequence[str],
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    adapter: str = 'default',
    untouched: Sequence[str] = (),
) -> None:
    """Add an adapter to every layer that a pattern names.

    Args:
        transformer: Changed in place.
        target_modules: Qualified names of layers, or their last parts: ``'ff.net.2'`` names
            ``transformer_blocks.0.ff.net.2`` too.
        rank: Rank of the adapter.
        alpha: The product of its matrices is multiplied by ``alpha / rank``; None for ``rank``.
        dropout: Probability of dropping an input of the adapter in training, at least 0 and less than 1.
        adapter: Its name.
        untouched: Qualified names of modules that are never adapted, whatever the patterns say.

    Raises:
        ValueError: A pattern names no layer, the rank is not positive, or the probability out of range.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f'lora_rank={rank}: expected at least 1')
    if not 0 <= dropout < 1:
        raise ValueError(f'lora_dropout={dropout}: expected at least 0 and less than 1')
    if not target_modules:
        raise ValueError('lora_target_modules is empty: name the layers to adapt, or set use_lora=False')
    excluded = '|'.join(rf'{re.escape(name)}(\..*)?' for name in untouched) or None
    layers = [
        name.removesuffix('.base_layer')
        for name, module in transformer.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
        and not (excluded and re.fullmatch(excluded, name))
        and '.lora_' not in name
    ]
    for pattern in target_modules:
        if not any(name == pattern or name.endswith(f'.{pattern}') for name in layers):
            endings = {'.'.join(name.split('.')[start:]) for name in layers for start in range(name.count('.') + 1)}
            near = get_close_matches(pattern, sorted(endings), n=3)
            hint = f'; near it: {", ".join(near)}' if near else ''
            raise ValueError(
                f'lora_target_modules names {pattern!r}, which is no layer of {type(transformer).__name__}{hint}'
            )
    before = {parameter: parameter.requires_grad for parameter in transformer.parameters()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights='gaussian',
        target_modules=list(target_modules),
        exclude_modules=excluded,
    )
    inject_adapter_in_model(config, transformer, adapter_name=adapter)
    if hasattr(transformer, 'peft_config'):
        del transformer.peft_config  # a note for peft's own adapters, which are not used here
    for parameter, requires_grad in before.items():
        parameter.requires_grad_(requires_grad)


@torch.no_grad()
def copy_adapter(layers: Sequence[nn.Module], source: str, target: str) -> None:
    """Copy the matrices of one adapter to another of the same shapes.

    Args:
        layers: Layers that hold both.
        source: Name of the adapter to copy.
        target: Name of the adapter to fill; its dtype becomes the source's.
    """
    for layer in layers:
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[target].weight.data = matrices[source].weight.detach().clone()
