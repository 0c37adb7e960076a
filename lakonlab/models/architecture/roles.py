"""Several roles of one network: teacher, student and moving average (EMA) share every frozen tensor.

A :class:`Backbone` is one module tree. What a role has for itself lives inside that tree: a LoRA adapter of its own in
every adapted layer, and a copy of its own of every other module that is trained, side by side in a :class:`RoleSwitch`.
:meth:`Backbone.playing` selects a role for a forward pass. It sets plain attributes and never ``requires_grad``, which
peft's own ``set_adapter`` would flip and which sharding engines read once. Outside of it the student is on, so that a
backward pass that recomputes checkpointed blocks recomputes the student's.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

STUDENT, EMA, TEACHER = 'student', 'ema', 'teacher'
#: Where diffusers keeps what ``config`` of a model is, which is a property.
CONFIG = '_internal_dict'
#: Role -> name of its LoRA adapter; the teacher has none.
ADAPTERS = {STUDENT: 'default', EMA: 'ema'}
LORA_PART = re.compile(r'\.lora_[A-Za-z_]+\.(\w+)(?=\.|$)')


class RoleSwitch(nn.Module):
    """One place in a network where every role has a module of its own.

    Args:
        **modules: Role -> its module.
    """

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for role, module in modules.items():
            self.add_module(role, module)
        self.role = STUDENT

    def forward(self, *args, **kwargs):
        """Call the module of the role in force."""
        return self._modules[self.role](*args, **kwargs)

    def __getattr__(self, name: str):
        """What a module around this one asks of it (such as ``weight.dtype``), asked of the module of the role."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'role' or 'role' not in self.__dict__:
                raise
            return getattr(self._modules[self.role], name)


class Backbone:
    """A module tree that several roles play.

    Args:
        tree: The modules.
    """

    def __init__(self, tree: nn.Module):
        self.tree = tree
        self.entry = tree  # what is called: the tree, or what an engine wrapped around it
        self.switches: dict[str, RoleSwitch] = {}
        self.adapted: list[nn.Module] = []
        self.settings: dict[str, dict[str, object]] = {}  # role -> attributes of the tree while it plays
        self._modules: list[nn.Module] | None = None
        self._is_paused = False
        self.current = STUDENT

    def set_out_channels(self, value: int) -> None:
        """Let the tree have another number of output channels for the student and its average.

        Forward passes read it from an attribute or from the config, so both change with the role.
        """
        tree = self.tree
        before: dict[str, object] = {}
        after: dict[str, object] = {}
        if hasattr(tree, 'out_channels'):
            before['out_channels'], after['out_channels'] = tree.out_channels, value
        if 'out_channels' in tree.config:
            before[CONFIG] = tree.config
            tree.register_to_config(out_channels=value)
            after[CONFIG] = tree.config
        self.settings = {TEACHER: before, STUDENT: after, EMA: after}
        self._apply_settings()

    def _apply_settings(self) -> None:
        for name, value in self.settings.get(self.current, {}).items():
            setattr(self.tree, name, value)

    def give(self, path: str, role: str, module: nn.Module) -> None:
        """Give a role a module of its own; the module that is there stays with the other role.

        Args:
            path: Where in the tree.
            role: Whose module it is.
            module: The module.
        """
        self._modules = None
        if path in self.switches:
            self.switches[path].add_module(role, module)
            return
        other = {STUDENT: TEACHER, EMA: STUDENT}[role]
        self.switches[path] = RoleSwitch(**{other: self.tree.get_submodule(path), role: module})
        self.tree.set_submodule(path, self.switches[path])

    def find_adapted(self) -> None:
        """Note the layers that hold LoRA adapters of several roles, after some were added.

        Those inside of a module that a role has for itself are that role's, with whatever they hold.
        """
        from peft.tuners.lora import LoraLayer

        self._modules = None
        self.adapted = [
            module
            for name, module in self.tree.named_modules()
            if isinstance(module, LoraLayer) and not self.in_switch(name)
        ]

    def activate_adapters(self) -> None:
        """Let every layer use the student's adapter: peft activates the one that was added last, everywhere."""
        from peft.tuners.lora import LoraLayer

        for module in self.tree.modules():
            if isinstance(module, LoraLayer):
                module._active_adapter = [ADAPTERS[STUDENT]]

    def in_switch(self, path: str) -> bool:
        """Whether a path leads to a place where every role has a module of its own, or into one."""
        return any(path == place or path.startswith(f'{place}.') for place in self.switches)

    @contextlib.contextmanager
    def playing(self, role: str) -> Iterator[nn.Module]:
        """Let the tree play a role; ends with the role that was played before.

        Args:
            role: ``'student'``, ``'ema'`` or ``'teacher'``.
        """
        before = self.current
        self._switch_to(role)
        try:
            yield self.entry
        finally:
            self._switch_to(before)

    def _switch_to(self, role: str) -> None:
        if role == self.current:
            return
        self.current = role
        for switch in self.switches.values():
            switch.role = role
        self._apply_settings()
        if self.tree.training or self._is_paused:
            self._pause(role != STUDENT)
        for layer in self.adapted:
            layer._disable_adapters = role == TEACHER
            if role != TEACHER:
                layer._active_adapter = [ADAPTERS[role]]

    def _pause(self, pause: bool) -> None:
        """Put the tree into evaluation mode, in which teacher and average always are, or back into training mode."""
        if self._modules is None:
            self._modules = list(self.tree.modules())
        for module in self._modules:  # past nn.Module's own setter: this happens at every forward pass
            vars(module)['training'] = not pause
        self._is_paused = pause

    def name_for(self, role: str, name: str) -> str | None:
        """How a tensor or module of the tree is called from the point of view of a role.

        Args:
            role: The role.
            name: Qualified name in the tree.

        Returns:
            The name it would have if the role had a network of its own, whose adapter is called ``default``; None if it
            belongs to another role.
        """
        for path in self.switches:
            if name == path:
                return None
            if name.startswith(f'{path}.'):
                owner, _, rest = name[len(path) + 1 :].partition('.')
                if owner != role:
                    return None
                return f'{path}.{rest}' if rest else path
        adapter = LORA_PART.search(name)
        if adapter is not None:
            if role == TEACHER or adapter[1] != ADAPTERS[role]:
                return None
            name = f'{name[: adapter.start(1)]}{ADAPTERS[STUDENT]}{name[adapter.end(1) :]}'
        elif role == TEACHER:
            name = re.sub(r'\.base_layer(?=\.|$)', '', name)
        return name


@runtime_checkable
class SharedNetwork(Protocol):
    """A network whose tensors may be shared by several roles."""

    def role_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of its role, shared ones too, by names of a network of its own."""

    def as_average(self) -> nn.Module:
        """A network that shares everything frozen and holds a copy of everything trained."""


def callable_places(tree: nn.Module, path: str) -> list[str]:
    """The module at a path, or the parts of a container that is iterated over and never called itself."""
    module = tree.get_submodule(path)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [place for name, _ in module.named_children() for place in callable_places(tree, f'{path}.{name}')]
    return [path]


def outermost_trained(tree: nn.Module, name: str) -> str:
    """The largest module around a trained parameter that is called and whose parameters are all trained."""
    path, _, _ = name.rpartition('.')
    while '.' in path:
        parent = path.rpartition('.')[0]
        module = tree.get_submodule(parent)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, RoleSwitch)):
            break
        if not all(parameter.requires_grad for parameter in module.parameters()):
            break
        path = parent
    return path


def without_adapters(module: nn.Module) -> nn.Module:
    """A module, changed in place, whose layers are as they were before LoRA adapters were added."""
    from peft.tuners.lora import LoraLayer

    if isinstance(module, LoraLayer):
        return module.base_layer
    for name, child in module.named_children():
        setattr(module, name, without_adapters(child))
    return module


def average_of(module: nn.Module) -> nn.Module:
    """A copy of a trained module for its moving average, without gradient."""
    return copy.deepcopy(module).requires_grad_(False)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what an engine that spreads it over processes has wrapped around it.

    Such a wrapper names the child that it wraps in its class attribute ``wraps``.
    """
    while hasattr(type(module), 'wraps'):
        module = module._modules[type(module).wraps]
    return module


def own_state(module: nn.Module, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by their place in a tree, as in ``state_dict``, wrappers left out.

    Args:
        module: Any module.
        prefix: Put before all names.

    Yields:
        Names and tensors (not detached); of a divided tensor, what this process holds.
    """
    module = unwrapped(module)
    yield from _direct_state(module, prefix)
    for name, child in module._modules.items():
        if child is not None:
            yield from own_state(child, f'{prefix}{name}.')


def named_state(module: nn.Module, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by the names they have if every role is a network of its own.

    Networks that share a backbone each yield what belongs to their role, so what is shared is yielded under several
    names. Where nothing is shared, the names are those of ``state_dict``.

    Args:
        module: Any module.
        prefix: Put before all names.

    Yields:
        Names and tensors (not detached); of a divided tensor, what this process holds.
    """
    module = unwrapped(module)
    if isinstance(module, SharedNetwork):
        yield from ((prefix + name, tensor) for name, tensor in module.role_state().items())
        return
    yield from _direct_state(module, prefix)
    for name, child in module._modules.items():
        if child is not None:
            yield from named_state(child, f'{prefix}{name}.')


def _direct_state(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, tensor


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """The name of every parameter, as :func:`named_state` has it; the first one of what is shared."""
    names: dict[nn.Parameter, str] = {}
    for name, tensor in named_state(module):
        if isinstance(tensor, nn.Parameter):
            names.setdefault(tensor, name)
    return names
