"""Fully sharded data parallelism of divided tensors (torch's ``fully_shard``, FSDP2)."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lakonlab.models.architecture.roles import parameter_names
from lakonlab.parallel.block_moments import BlockMoments, entries_of, has_parts, restore
from lakonlab.parallel.ddp import is_trained
from lakonlab.parallel.optimizer_classes import optimizer_of_rows
from lakonlab.parallel.sharded import Sharded, float32_modules, owners_of
from lakonlab.parallel.state import local_part
from lakonlab.parallel.units import Place, places_within
from lakonlab.registry import STRATEGIES
from lakonlab.storage.checkpoint import CheckpointError, read_pieces
from lakonlab.storage.pieces import Pieces

logger = logging.getLogger('lakonlab.parallel')


@STRATEGIES.register_module('fsdp2')
class FullyShard(Sharded):
    """Every parameter is divided by rows. See :class:`Sharded` for the arguments."""

    name = 'fsdp2'

    def __init__(self, **options):
        super().__init__(**options)
        self._rounded: dict[str, tuple[int, int]] = {}

    def units_within(self, network: nn.Module, units: Mapping[int, nn.Module], kept: set[int]) -> set[int]:
        """See the base class; what computes in float32 is gathered by itself where the rest is gathered in less."""
        exact = float32_modules(network) if self.param_dtype not in (None, torch.float32) else set()
        return {*units, *(exact & owners_of(network, {id(p) for p in network.parameters()}).keys())}

    def divide(self, place: Place, units: Mapping[int, nn.Module], kept: set[int], whole: set[nn.Parameter]):
        """See the base class."""
        network = place.module
        # nothing here changes a network's output in place
        warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view tensor')
        exact = float32_modules(network) if self.param_dtype not in (None, torch.float32) else set()
        for inner in [*places_within(place, self.units_within(network, units, kept)), place]:
            fully_shard(
                inner.module,
                mesh=self.mesh,
                # the root too: what stays gathered after an evaluation would be older than the next step
                reshard_after_forward=True,
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=None if id(inner.module) in exact else self.param_dtype,
                    # torch looks for gradients to convert, which a frozen unit that was never gathered has no place for
                    reduce_dtype=self.reduce_dtype if is_trained(inner.module) else None,
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

    @classmethod
    def optimizer_class(cls, name):
        """See the base class."""
        return optimizer_of_rows(name, cls.name)

    def slot_entries(self, optimizer, parameter, name, slot, value):
        """See the base class; moments of 8 bits are saved as they are divided."""
        if not isinstance(optimizer, BlockMoments) or slot == 'step':
            return super().slot_entries(optimizer, parameter, name, slot, value)
        return entries_of(slot, value, self._first_element(name, parameter))

    def restore_optimizer(self, model, key, optimizer, saved, plain, checkpoint):
        """See the base class."""
        if not isinstance(optimizer, BlockMoments):
            super().restore_optimizer(model, key, optimizer, saved, plain, checkpoint)
            return
        kind = type(optimizer).__name__
        if saved and not any(map(has_parts, saved.values())):
            raise CheckpointError(
                f'{checkpoint} holds moments of optimizer {key!r} that are not by torchao, which {kind} of '
                f"module_wrapper={self.name!r} cannot read: go on with module_wrapper='ddp', where {kind} is the one "
                'of bitsandbytes; or start a run of another name (work_dir) from the weights alone, with load_from'
            )
        names = parameter_names(model)
        own = [parameter for group in optimizer.param_groups for parameter in group['params']]
        firsts = {p: self._first_element(names[p], p) for p in own if local_part(p).numel()}

        def read(wanted):
            entries = {f'{key}/{entry}/{names[parameter]}': pieces for (parameter, entry), pieces in wanted.items()}
            read_pieces(checkpoint, 'optimizer', entries)

        try:
            number, changed = restore(optimizer, firsts, {p: saved.get(names[p], {}) for p in firsts}, read)
        except ValueError as error:
            raise CheckpointError(f'{checkpoint} lacks some of what optimizer {key!r} remembers: {error}') from error
        self._rounded[key] = number, changed

    def report_restored(self, checkpoint: Path) -> None:
        """See the base class."""
        everyone = self.ranks.all_gather(self._rounded)
        for key in self._rounded:
            number, changed = (sum(values) for values in zip(*(own[key] for own in everyone)))
            if changed:
                logger.warning(
                    'optimizer[%r]: %s was saved by processes that held other parts, so %d of %d parts of moments are '
                    'rounded to 8 bits anew: from here on the run differs, by such rounding, from an uninterrupted one',
                    key,
                    checkpoint,
                    changed,
                    number,
                )
        self._rounded = {}

    def _first_element(self, name: str, parameter: nn.Parameter) -> int:
        """Number of the first element that this process holds of a parameter, in row-major order."""
        ((offsets, _),) = self.pieces(name, parameter).boxes
        return sum(offset * stride for offset, stride in zip(offsets, parameter.stride()))
