"""Which modules are divided among processes, and in which units they are gathered to compute."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from lakonlab.config.errors import ConfigError
from lakonlab.models.architecture.blocks import block_lists
from lakonlab.models.architecture.roles import Backbone

NEVER_DIVIDED = ('vae',)
"""Children that are not called as modules (an autoencoder encodes and decodes), so that nothing could gather them."""


@dataclass(frozen=True)
class Place:
    """Where a module hangs in a tree.

    Args:
        owner: Its parent.
        name: Its name there.
        path: Qualified name, for messages and patterns.
        also: Other objects that hold it under the same name, such as a pipeline.
    """

    owner: nn.Module
    name: str
    path: str
    also: tuple[object, ...] = field(default=())

    @property
    def module(self) -> nn.Module:
        """What is there now."""
        return self.owner._modules[self.name]

    def put(self, module: nn.Module) -> None:
        """Let another module take the place."""
        self.owner._modules[self.name] = module
        for holder in self.also:
            setattr(holder, self.name, module)


def networks_of(model: nn.Module, child: str) -> list[Place]:
    """The modules of a child that are called, outermost first.

    A network that plays several roles is called by its tree, whichever role it plays.

    Args:
        model: The whole model.
        child: Name of a child of it.
    """
    module = model.get_submodule(child)
    if module._parameters:
        return [Place(model, child, child)]
    places = []
    for name, part in module.named_children():
        if next(part.parameters(), None) is None:
            continue
        if isinstance(getattr(part, 'backbone', None), Backbone):
            places.append(Place(part, 'transformer', f'{child}.{name}.transformer'))
            continue
        pipeline = getattr(module, 'pipeline', None)
        places.append(Place(module, name, f'{child}.{name}', () if pipeline is None else (pipeline,)))
    return places


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of modules of one kind."""
    return [block for owner, name in block_lists(network, least=2) for block in getattr(owner, name)]


def select_units(networks: Iterable[nn.Module], patterns: Sequence[str]) -> dict[int, nn.Module]:
    """The modules that are gathered one at a time.

    Args:
        networks: Where to look; the networks themselves are no units.
        patterns: Dotted paths of classes, or patterns of class names or of qualified names of modules, such as
            ``'*TransformerBlock'`` or ``'transformer_blocks.*'``, which means the blocks and nothing within them; empty
            for the repeated blocks of each network.

    Returns:
        ``id`` -> module.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    networks = list(networks)
    if not patterns:
        return {id(block): block for network in networks for block in repeated_blocks(network)}
    units: dict[int, nn.Module] = {}
    for pattern in patterns:
        kind = class_at(pattern)
        found = {
            id(module): module
            for network in networks
            for name, module in network.named_modules()
            if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _matches(module, name, pattern, kind)
        }
        if not found:
            near = sorted({path_of(type(block)) for network in networks for block in repeated_blocks(network)})
            raise ConfigError(
                f'fsdp_kwargs.fsdp_modules: found {pattern!r}, which is no class of a module of the model and matches '
                f'no name of one; name classes of its blocks, such as {", ".join(near) or "none: it has no blocks"}'
            )
        units.update(found)
    return units


def _matches(module: nn.Module, name: str, pattern: str, kind: type | None) -> bool:
    if kind is not None:
        return isinstance(module, kind)
    parts, wanted = name.split('.'), pattern.split('.')
    if len(parts) == len(wanted) and all(fnmatchcase(part, glob) for part, glob in zip(parts, wanted)):
        return True
    return any(fnmatchcase(text, pattern) for text in (type(module).__name__, path_of(type(module))))


def path_of(kind: type) -> str:
    """Dotted path of a class."""
    return f'{kind.__module__}.{kind.__qualname__}'


def class_at(path: str) -> type | None:
    """The class at a dotted path; None if there is none."""
    module, _, name = path.rpartition('.')
    if not module or any(character in path for character in '*?['):
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def places_within(root: Place, chosen: Iterable[int]) -> Iterator[Place]:
    """Where chosen modules hang below a root, innermost first; each module once.

    Args:
        root: The root.
        chosen: ``id`` of the modules.
    """
    chosen, seen, places = set(chosen), set(), []

    def visit(owner: nn.Module, path: str) -> None:
        for name, child in owner.named_children():
            here = f'{path}.{name}'
            visit(child, here)
            if id(child) in chosen and id(child) not in seen:
                seen.add(id(child))
                places.append(Place(owner, name, here))

    visit(root.module, root.path)
    yield from places


def number_of_parts(world_size: int, local_world_size: int, hybrid: bool, shard_size: int | None) -> int:
    """Among how many processes one copy of the weights is divided.

    Args:
        world_size: Number of processes.
        local_world_size: Number of processes of a node.
        hybrid: Whether every node holds a copy.
        shard_size: Given number; None for that of a node, or all.

    Raises:
        ConfigError: It does not divide the number of processes.
    """
    parts = shard_size or (math.gcd(local_world_size, world_size) if hybrid else world_size)
    if not 1 <= parts <= world_size or world_size % parts:
        raise ConfigError(
            f'fsdp_kwargs.shard_size={parts}: expected a divisor of the {world_size} processes of this run'
        )
    return parts
