"""Fully sharded data parallelism of flattened units (torch's FullyShardedDataParallel, FSDP1)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.utils._pytree import tree_map_only

from lakonlab.models.architecture.roles import Backbone
from lakonlab.parallel.sharded import Sharded, float32_modules, owners_of
from lakonlab.parallel.state import training_state
from lakonlab.parallel.units import Place, places_within
from lakonlab.registry import STRATEGIES
from lakonlab.storage.pieces import Pieces


class Unit(FullyShardedDataParallel):
    """torch's wrapper, whose name does not show in the names of parameters."""

    wraps = '_fsdp_wrapped_module'

    def forward(self, *args, **kwargs):
        """See the base class.

        A unit that is frozen is let go once the gradients of all its inputs are there. Those of a tensor that every
        block gets, such as an embedding of the time, are there at the end of the backward pass only, when all blocks
        would be gathered. So the inputs of a unit are views of its own.
        """
        handle = self._handle
        if torch.is_grad_enabled() and handle is not None and not handle.flat_param.requires_grad:
            args, kwargs = tree_map_only(Tensor, _view, (args, kwargs))
        return super().forward(*args, **kwargs)


def _view(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor


@STRATEGIES.register_module('fsdp')
class FlatShards(Sharded):
    """The parameters of a unit are flattened into one and cut into equal stretches.

    A unit has one dtype, and what is trained and its average must be cut alike, so in a network that is partly frozen
    every module that holds trained or averaged parameters is a unit of its own. Trained weights that are gathered in
    lower precision have their gradients exchanged after every pass: kept until the last one, they would be added up in
    that precision. See :class:`Sharded` for the arguments.
    """

    name = 'fsdp'

    def __init__(self, **options):
        super().__init__(**options)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._starts: dict[str, int] = {}
        self._divided: set[int] = set()
        self._keeps_gradients = True

    def units_within(self, network: nn.Module, units: Mapping[int, nn.Module], kept: set[int]) -> set[int]:
        """See the base class."""
        is_mixed = any(id(parameter) not in kept for parameter in network.parameters())
        return {*units, *(owners_of(network, kept) if is_mixed else ())}

    def keeps_gradients(self, network: nn.Module, kept: set[int]) -> bool:
        """See the base class."""
        if self.param_dtype in (None, torch.float32):
            return super().keeps_gradients(network, kept)
        exact = float32_modules(network)
        adds_in_lower_precision = any(
            parameter.requires_grad
            for key, owner in owners_of(network, kept).items()
            if key not in exact
            for parameter in owner.parameters(recurse=False)
        )
        return super().keeps_gradients(network, kept) and not adds_in_lower_precision

    def divide(self, place: Place, units: Mapping[int, nn.Module], kept: set[int], whole: set[nn.Parameter]):
        """See the base class."""
        network = place.module
        exact = float32_modules(network)
        self._keeps_gradients &= self.keeps_gradients(network, kept)
        for inner in places_within(place, self.units_within(network, units, kept)):
            inner.put(self._unit(inner.module, exact, whole))
        # an outermost unit keeps its weights after an evaluation, older than the next step: it gets none of its own
        place.put(self._unit(self._unit(network, exact, whole), exact, whole))
        backbone = getattr(place.owner, 'backbone', None)
        if isinstance(backbone, Backbone):
            backbone.entry = place.module
        return place.module

    def _unit(self, module: nn.Module, exact: set[int], whole: set[nn.Parameter]) -> Unit:
        param_dtype = None if id(module) in exact else self.param_dtype
        precision = None
        if param_dtype is not None or self.reduce_dtype is not None:
            precision = MixedPrecision(
                param_dtype=param_dtype,
                reduce_dtype=self.reduce_dtype,
                cast_forward_inputs=False,
                cast_root_forward_inputs=False,
            )
        is_hybrid = self.num_copies > 1
        own = [parameter for parameter in module.parameters() if parameter in whole]
        with warnings.catch_warnings():
            # one process has nothing to divide, and torch says so for every unit
            warnings.filterwarnings('ignore', message='.*NO_SHARD')
            return Unit(
                module,
                device_mesh=self.mesh,
                sharding_strategy=ShardingStrategy.HYBRID_SHARD if is_hybrid else ShardingStrategy.FULL_SHARD,
                mixed_precision=precision,
                device_id=self.device if self.device.index is not None else torch.device(self.device.type),
                use_orig_params=True,
                ignored_states=own or None,
            )

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """See the base class."""
        with contextlib.ExitStack() as stack:
            if not last:
                for root in self._roots if self._keeps_gradients else ():
                    stack.enter_context(root.no_sync())
                for wrapper in self._replicated:
                    stack.enter_context(wrapper.no_sync())
            yield

    def _remember(self, model: nn.Module) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in training_state(model, False).items()}

    def holders_of(self, parameter: nn.Parameter) -> int:
        """See the base class."""
        return self.num_copies if id(parameter) in self._divided else self.world_size

    def _locate(self, model: nn.Module) -> None:
        divided = (parameter for root in self._roots for parameter in root.parameters() if parameter.requires_grad)
        self._divided = {id(parameter) for parameter in divided}
        held = {name: tensor.numel() for name, tensor in training_state(model, False).items()}
        everyone = self.ranks.all_gather(held)
        first = self.rank - self.rank % self.parts
        self._starts = {name: sum(everyone[rank][name] for rank in range(first, self.rank)) for name in held}

    def pieces(self, name: str, tensor: Tensor) -> Pieces:
        """See the base class."""
        shape = self._shapes[name]
        if tensor.numel() == torch.Size(shape).numel():  # not divided, or all of it is here
            return Pieces.whole(tensor.detach().view(shape))
        return Pieces.stretch(shape, self._starts[name], tensor.detach().reshape(-1))
