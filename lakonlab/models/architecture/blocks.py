"""The repeated blocks of a network: where they are, and compiling them one by one."""

from __future__ import annotations

from typing import Any

from torch import nn


def block_lists(network: nn.Module, least: int = 3) -> list[tuple[nn.Module, str]]:
    """Owner and name of the outermost lists of blocks of one kind.

    Args:
        network: Where to look.
        least: Least number of blocks.
    """
    found = []
    for module in network.modules():
        for name, child in module.named_children():
            is_list = isinstance(child, nn.ModuleList) and len(child) >= least
            if is_list and len({type(block) for block in child}) == 1:
                found.append((module, name))
    inside = {id(part) for owner, name in found for block in getattr(owner, name) for part in block.modules()}
    return [(owner, name) for owner, name in found if id(owner) not in inside]


def compile_blocks(network: nn.Module, **compile_kwargs: Any) -> None:
    """Compile each repeated block of a network in place, instead of the network.

    Blocks of one kind share their compiled code, so that the time it takes does not grow with their number.

    Args:
        network: A transformer of diffusers that names its repeated blocks, or any network that has them in a list.
        **compile_kwargs: Arguments of ``torch.compile``.

    Raises:
        ValueError: The network has no repeated blocks.
    """
    if getattr(network, '_repeated_blocks', None):
        network.compile_repeated_blocks(**compile_kwargs)
        return
    blocks = [block for owner, name in block_lists(network, least=2) for block in getattr(owner, name)]
    if not blocks:
        raise ValueError(
            f'compile_blocks=True, but {type(network).__name__} has no list of at least two blocks of one kind: set '
            'compile_forward=True instead'
        )
    for block in blocks:
        block.compile(**compile_kwargs)
