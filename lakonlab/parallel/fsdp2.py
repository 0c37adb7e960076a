"""Fully sharded data parallelism of divided tensors (torch's ``fully_shard``, FSDP2)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lakonlab.parallel.sharded import Sharded, float32_modules, owners_of
from lakonlab.parallel.units import Place, places_within
from lakonlab.registry import STRATEGIES
from lakonlab.storage.pieces import Pieces


@STRATEGIES.register_module('fsdp2')
class FullyShard(Sharded):
    """Every parameter is divided by rows. See :class:`Sharded` for the arguments."""

    name = 'fsdp2'

    def divide(self, place: Place, units: Mapping[int, nn.Module], kept: set[int], whole: set[nn.Parameter]):
        """See the base class."""
        network = place.module
        # nothing here changes a network's output in place
        warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view tensor')
        exact = float32_modules(network) if self.param_dtype not in (None, torch.float32) else set()
        apart = {key for key in owners_of(network, {id(p) for p in network.parameters()}) if key in exact}
        for inner in [*places_within(place, {*units, *apart}), place]:
            fully_shard(
                inner.module,
                mesh=self.mesh,
                # the root too: what stays gathered after an evaluation would be older than the next step
                reshard_after_forward=True,
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=None if id(inner.module) in exact else self.param_dtype,
                    reduce_dtype=self.reduce_dtype,
                    cast_forward_inputs=False,
                ),
                ignored_params=whole or None,
            )
        return network

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """See the base class."""
        with contextlib.ExitStack() as stack:
            for root in self._roots:
                root.set_requires_gradient_sync(last or self.sync_every_pass)
            if not last:
                for wrapper in self._replicated:
                    stack.enter_context(wrapper.no_sync())
            yield

    def pieces(self, name: str, tensor: Tensor) -> Pieces:
        """See the base class."""
        if not isinstance(tensor, DTensor):
            return Pieces.whole(tensor)
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape = tuple(tensor.shape)
        sizes, offsets = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
        local = tensor.detach().to_local()
        if local.numel() == 0 and tensor.numel():
            return Pieces(shape, tensor.dtype, (), ())
        return Pieces(shape, tensor.dtype, ((tuple(offsets), tuple(sizes)),), (local,))

    def holders_of(self, parameter: nn.Parameter) -> int:
        """See the base class."""
        return self.num_copies if isinstance(parameter, DTensor) else self.world_size
