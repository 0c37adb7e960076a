"""What the strategies share that divide weights, gradients and moments among processes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lakonlab.config.errors import ConfigError
from lakonlab.models.architecture.freezing import computing_dtype, parse_dtype
from lakonlab.models.architecture.network import Network
from lakonlab.parallel.ddp import DataParallel, data_parallel, is_trained, trained_children
from lakonlab.parallel.optimizer_classes import optimizer_of_flat
from lakonlab.parallel.state import training_state
from lakonlab.parallel.strategy import Strategy
from lakonlab.parallel.units import NEVER_DIVIDED, Place, networks_of, number_of_parts, select_units

logger = logging.getLogger('lakonlab.parallel')


@dataclass(frozen=True)
class Division:
    """What of a model is to be divided.

    Args:
        children: Names of the model's children.
        networks: Their modules that are called.
        units: What of these is gathered one at a time, by ``id``.
        whole: Parameters of the networks that stay whole.
    """

    children: Sequence[str]
    networks: Sequence[Place]
    units: Mapping[int, nn.Module]
    whole: set[nn.Parameter]


class Sharded(Strategy):
    """Divides what is trained, its averages, and the frozen weights beside them.

    Args:
        fsdp_modules: What is gathered at a time, see :func:`~lakonlab.parallel.units.select_units`; empty for the
            repeated blocks of every network.
        exclude_keys: Children of the model that every process holds whole; the average of one is whole too.
        wrap_frozen_modules: Divide children without trained parameters too.
        ignore_frozen_parameters: Leave the frozen parameters of a divided child whole.
        param_dtype: Precision in which weights are gathered to compute; None for their own. What computes in float32
            keeps float32.
        reduce_dtype: Precision in which gradients are summed; None for their own.
        buffer_dtype: Precision of floating-point buffers; None for their own.
        hybrid_sharding: Divide within a node and repeat between nodes.
        shard_size: Number of processes that share one copy; None for those of a node, or all.
        sync_every_pass: Exchange gradients after every micro-batch and segment instead of the last one of a step: less
            memory, more traffic.
        find_unused_parameters: Whether trained parameters of what is whole may take no part in a step.
        **options: See :class:`Strategy`.

    Raises:
        ValueError: A dtype is unknown.
    """

    is_sharded = True

    def __init__(
        self,
        fsdp_modules: Sequence[str] = (),
        exclude_keys: Sequence[str] = (),
        wrap_frozen_modules: bool = False,
        ignore_frozen_parameters: bool = False,
        param_dtype: str | None = None,
        reduce_dtype: str | None = 'float32',
        buffer_dtype: str | None = None,
        hybrid_sharding: bool = True,
        shard_size: int | None = None,
        sync_every_pass: bool = False,
        find_unused_parameters: bool = False,
        **options,
    ):
        super().__init__(**options)
        self.fsdp_modules = tuple(fsdp_modules)
        self.exclude_keys = tuple(exclude_keys)
        self.wrap_frozen_modules = wrap_frozen_modules
        self.ignore_frozen_parameters = ignore_frozen_parameters
        self.param_dtype = _dtype(param_dtype, 'param_dtype')
        self.reduce_dtype = _dtype(reduce_dtype, 'reduce_dtype')
        self.buffer_dtype = _dtype(buffer_dtype, 'buffer_dtype')
        self.sync_every_pass = sync_every_pass
        self.find_unused_parameters = find_unused_parameters
        self.parts = number_of_parts(self.world_size, self.ranks.local_world_size, hybrid_sharding, shard_size)
        self._mesh: DeviceMesh | None = None
        self._replicated: list[DataParallel] = []
        self._roots: list[nn.Module] = []

    @property
    def num_copies(self) -> int:
        """How many copies of the weights all processes hold together."""
        return self.world_size // self.parts

    @property
    def mesh(self) -> DeviceMesh:
        """The processes: one row for every copy of the weights, or a single dimension if there is one copy."""
        if self._mesh is None:
            if self.num_copies == 1:
                self._mesh = init_device_mesh(self.device.type, (self.parts,), mesh_dim_names=('shard',))
            else:
                self._look_at_nodes()
                shape = (self.num_copies, self.parts)
                self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=('replicate', 'shard'))
        return self._mesh

    def _look_at_nodes(self) -> None:
        """Say so if copies are divided across nodes though each would fit into one."""
        hosts = self.ranks.all_gather(socket.gethostname())
        groups = [set(hosts[start : start + self.parts]) for start in range(0, len(hosts), self.parts)]
        across = [number for number, group in enumerate(groups) if len(group) > 1]
        if across and self.parts <= self.ranks.local_world_size and self.ranks.is_main:
            logger.warning(
                '%d of %d copies of the weights are divided across nodes, whose processes have consecutive numbers '
                'elsewhere; start the processes node by node (Slurm: --distribution=block, MPI: --map-by ppr:N:node)',
                len(across),
                len(groups),
            )

    def _wrap(self, model: nn.Module) -> nn.Module:
        division = self.division(model)
        divided, networks, units, whole = division.children, division.networks, division.units, division.whole
        # nothing here holds on to a tensor, so that the whole of what is divided is freed unit by unit
        kept = {id(tensor) for tensor in training_state(model).values()}
        size = sum(
            tensor.numel() for name, tensor in training_state(model).items() if name.partition('.')[0] in divided
        )
        self._remember(model)
        for place in networks:
            if self.buffer_dtype is not None:
                _cast_buffers(place.module, self.buffer_dtype)
            has_gradient = is_trained(place.module)
            root = self.divide(place, units, kept, whole)
            if has_gradient:
                self._roots.append(root)
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        model.to(self.device)
        left = [name for name in trained_children(model) if name not in divided]
        self._replicated = data_parallel(model, left, self.find_unused_parameters)
        self._locate(model)
        logger.info(
            '%s: %s divided among %d processes in %d units (%s trained and averaged parameters)%s',
            self.name,
            ', '.join(divided),
            self.parts,
            len(units) + len(networks),
            f'{size:,}',
            f', {self.num_copies} copies' if self.num_copies > 1 else '',
        )
        return model

    def division(self, model: nn.Module) -> Division:
        """What of a model is divided.

        Args:
            model: Not wrapped; may be on the meta device.

        Raises:
            ConfigError: ``fsdp_modules`` matches nothing, or ``param_dtype`` contradicts a network.
        """
        children = self.divided_children(model)
        networks = [place for child in children for place in networks_of(model, child)]
        whole = self._whole_parameters(model, networks, children)
        self._check_precision(model, children)
        units = select_units([place.module for place in networks], self.fsdp_modules)
        return Division(children, networks, units, whole)

    def divided_children(self, model: nn.Module) -> list[str]:
        """Names of the children that are divided.

        Raises:
            ConfigError: A key of ``exclude_keys`` names no child, or the average of a child that is divided.
        """
        trained = set(trained_children(model))
        for key in self.exclude_keys:
            if not isinstance(getattr(model, key, key), nn.Module | None):
                children = ', '.join(name for name, _ in model.named_children())
                raise ConfigError(f'fsdp_kwargs.exclude_keys: found {key!r}, expected parts of the model: {children}')
            source = key.removesuffix('_ema')
            if source != key and source in trained and source not in self.exclude_keys:
                raise ConfigError(
                    f'fsdp_kwargs.exclude_keys names {key!r} without {source!r}: an average is computed from what a '
                    'process holds, so both are divided alike; name both, or neither'
                )
        excluded = {*self.exclude_keys, *(f'{key}_ema' for key in self.exclude_keys), *NEVER_DIVIDED}
        divided = []
        for name, _ in model.named_children():
            if name in excluded:
                continue
            if name in trained or name.removesuffix('_ema') in trained or self.wrap_frozen_modules:
                divided.append(name)
        return divided

    def units_within(self, network: nn.Module, units: Mapping[int, nn.Module], kept: set[int]) -> set[int]:
        """What of a network is gathered one at a time: the chosen units, and what has to be one by itself.

        Args:
            network: Not divided yet.
            units: The chosen units, by ``id``.
            kept: ``id`` of the parameters that are trained or averaged.

        Returns:
            ``id`` of the modules.
        """
        raise NotImplementedError(f'{type(self).__name__} does not say what is gathered by itself')

    def keeps_gradients(self, network: nn.Module, kept: set[int]) -> bool:
        """Whether whole gradients are kept between the passes of a step, to be exchanged once.

        Args:
            network: Not divided yet.
            kept: ``id`` of the parameters that are trained or averaged.
        """
        return not self.sync_every_pass

    def divide(self, place: Place, units: Mapping[int, nn.Module], kept: set[int], whole: set[nn.Parameter]):
        """Divide one network in place.

        Args:
            place: Where it is.
            units: Modules that are gathered one at a time, by ``id``.
            kept: ``id`` of the parameters that are trained or averaged.
            whole: Parameters that stay whole.

        Returns:
            The module that stands for the network now.
        """
        raise NotImplementedError(f'{type(self).__name__} does not say how it divides a network')

    def _whole_parameters(self, model: nn.Module, networks: Iterable[Place], divided: Sequence[str]) -> set:
        """Frozen parameters that belong to several networks, or that are to stay whole."""
        owners: dict[nn.Parameter, int] = {}
        for place in networks:
            for parameter in place.module.parameters():
                owners[parameter] = owners.get(parameter, 0) + 1
        elsewhere = {
            parameter
            for name, child in model.named_children()
            if name not in divided and child is not None
            for parameter in child.parameters()
        }
        whole = {parameter for parameter, count in owners.items() if count > 1 or parameter in elsewhere}
        if self.ignore_frozen_parameters:
            state = {id(tensor) for tensor in training_state(model).values()}
            whole |= {parameter for parameter in owners if id(parameter) not in state}
        return whole

    def _check_precision(self, model: nn.Module, divided: Sequence[str]) -> None:
        if self.param_dtype in (None, torch.float32):
            return
        for child in divided:
            for name, network in model.get_submodule(child).named_children():
                if isinstance(network, Network) and network.torch_dtype == torch.float32 and not network.autocast_dtype:
                    raise ConfigError(
                        f'fsdp_kwargs.param_dtype={str(self.param_dtype).removeprefix("torch.")!r}, but {child}.{name} '
                        'computes in float32: set its autocast_dtype, or leave param_dtype out'
                    )

    def _remember(self, model: nn.Module) -> None:
        """Note what is known of a model only before it is divided."""

    def _locate(self, model: nn.Module) -> None:
        """Find out what this process holds of a divided model."""

    def optimizer_state(self, model, optimizers):
        """See the base class; what is no tensor is gathered, as processes may hold different parameters."""
        tensors, plain = super().optimizer_state(model, optimizers)
        merged: dict[str, Any] = {}
        for own in self.ranks.all_gather(plain):
            for key, slots in own.items():
                for slot, values in slots.items():
                    merged.setdefault(key, {}).setdefault(slot, {}).update(values)
        return tensors, {key: merged.get(key, {}) for key in optimizers}

    @classmethod
    def optimizer_class(cls, name):
        """See the base class."""
        return optimizer_of_flat(name, cls.name)


def float32_modules(network: nn.Module) -> set[int]:
    """``id`` of the modules that compute in float32 whatever surrounds them, with all they contain."""
    return {
        id(part)
        for module in network.modules()
        if computing_dtype(module) == torch.float32
        for part in module.modules()
    }


def owners_of(network: nn.Module, parameters: set[int]) -> dict[int, nn.Module]:
    """The modules that hold some parameters directly, by ``id``."""
    return {
        id(module): module
        for module in network.modules()
        if any(id(parameter) in parameters for parameter in module._parameters.values())
    }


def _dtype(name: str | None, key: str) -> torch.dtype | None:
    return None if name is None else parse_dtype(name, f'fsdp_kwargs.{key}')


def _cast_buffers(network: nn.Module, dtype: torch.dtype) -> None:
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Tensor) and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
