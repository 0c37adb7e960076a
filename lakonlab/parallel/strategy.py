"""What every strategy does: one process or many, whole or divided.

A strategy is all that the runner knows about processes and devices. This class is complete for models of which every
process holds all; a subclass says how it wraps a model and which part of a tensor is here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lakonlab.models.architecture.roles import parameter_names
from lakonlab.models.training_step import GradientExchange
from lakonlab.parallel.block_moments import has_parts
from lakonlab.parallel.optimizer_classes import named_class, optimizer_of_whole
from lakonlab.parallel.state import check_fits, local_part, training_state
from lakonlab.parallel.synchronise import synchronise
from lakonlab.ranks import ALONE, Ranks
from lakonlab.storage.checkpoint import CheckpointError, read_pieces, tensor_info
from lakonlab.storage.pieces import Pieces

logger = logging.getLogger('lakonlab.parallel')


class Strategy(GradientExchange):
    """How a model is spread over processes and devices.

    Args:
        ranks: The processes.
        device: Where the model lives; None for the first accelerator, or the CPU if there is none.
        trainable_only: Whether frozen parameters of trained modules are left out of checkpoints.

    Attributes:
        stop_requested: Whether this process is asked to stop; after :meth:`conclude`, whether any is.
        failed: Whether something beside training has failed in this process; after :meth:`conclude`, in any.
    """

    name = 'single'
    is_sharded = False
    """Whether every forward pass of a network is a joint act of all processes."""

    def __init__(
        self, ranks: Ranks = ALONE, device: str | torch.device | None = None, trainable_only: bool = True
    ) -> None:
        if device is None:
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.ranks = ranks
        self.device = torch.device(device)
        self.trainable_only = trainable_only
        self.stop_requested = False
        self.failed = False
        self._averaged: list[tuple[nn.Module, str]] = []

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.ranks.world_size

    # -- the model

    def wrap(self, model: nn.Module) -> nn.Module:
        """Put the model where it is trained; what is trained is the same in all processes afterwards.

        Args:
            model: On the CPU.

        Raises:
            RuntimeError: Frozen weights differ between processes.
        """
        synchronise(model, self.ranks)
        self._averaged = [
            (module, name) for module in model.modules() for name in getattr(type(module), 'averaged_buffers', ())
        ]
        self._averaged = [(module, name) for module, name in self._averaged if hasattr(module, name)]
        return self._wrap(model)

    def _wrap(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def to_device(self, batch: Any) -> Any:
        """Copy the tensors of a batch, at any depth of dicts and lists, to the device."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, Mapping):
            return {key: self.to_device(value) for key, value in batch.items()}
        if isinstance(batch, list | tuple):
            return type(batch)(self.to_device(value) for value in batch)
        return batch

    # -- a step

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """See the base class."""
        parts = (local_part(gradient) for gradient in super().gradients(optimizer))
        return [part for part in parts if part.numel()]

    def conclude(
        self, optimizers: Mapping[str, Optimizer], log_vars: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Gradient norms and the values to log of the whole batch, with a single exchange among processes.

        Running averages of losses, the wish of any process to stop and news of a failure travel with them.

        Args:
            optimizers: By key; gradients are accumulated and exchanged.
            log_vars: Means over this process's part of the batch.

        Returns:
            Key -> L2 norm of the whole gradient, and means over the whole batch.
        """
        if self.world_size == 1:
            return super().conclude(optimizers, log_vars)
        buffers = [getattr(module, name) for module, name in self._averaged]
        parts = [self._squared_norm(optimizer) for optimizer in optimizers.values()]
        parts += [value.detach().double() / self.world_size for value in log_vars.values()]
        parts += [buffer.double() / self.world_size for buffer in buffers]
        parts.append(torch.tensor([self.stop_requested, self.failed], dtype=torch.float64))
        total = torch.cat([part.reshape(-1).to(self.device) for part in parts])
        dist.all_reduce(total)
        numbers = total.tolist()
        with torch.no_grad():
            start = len(optimizers) + len(log_vars)
            for buffer in buffers:
                buffer.copy_(total[start : start + buffer.numel()].view(buffer.shape))
                start += buffer.numel()
        self.stop_requested, self.failed = numbers[-2] > 0, numbers[-1] > 0
        norms = {key: number**0.5 for key, number in zip(optimizers, numbers)}
        return norms, dict(zip(log_vars, numbers[len(optimizers) :]))

    def holders_of(self, parameter: nn.Parameter) -> int:
        """How many processes hold every number of a parameter."""
        return self.world_size

    def _squared_norm(self, optimizer: Optimizer) -> Tensor:
        """This process's share of the squared norm of an optimiser's gradient; the shares add up to it."""
        by_holders: dict[int, list[Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group['params']:
                if parameter.grad is not None and local_part(parameter.grad).numel():
                    by_holders.setdefault(self.holders_of(parameter), []).append(local_part(parameter.grad))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for holders, gradients in by_holders.items():
            total += torch.nn.utils.get_total_norm(gradients).double().square() / holders
        return total

    # -- checkpoints

    def pieces(self, name: str, tensor: Tensor) -> Pieces:
        """What this process holds of a tensor of the model, or of one of its shape that belongs to it.

        Args:
            name: Name of the model's tensor.
            tensor: The tensor.
        """
        return Pieces.whole(tensor)

    def model_state(self, model: nn.Module) -> dict[str, Pieces]:
        """What this process holds of the tensors to save, by name; views of the model."""
        state = training_state(model, self.trainable_only)
        return {name: self.pieces(name, tensor) for name, tensor in state.items()}

    def load_model_state(self, model: nn.Module, checkpoint: Path) -> None:
        """Fill the model in place.

        Args:
            model: A wrapped model.
            checkpoint: A verified checkpoint.

        Raises:
            CheckpointError: The checkpoint's tensors are not exactly those of the model.
        """
        wanted = self.model_state(model)
        check_fits(tensor_info(checkpoint, 'model'), wanted, checkpoint)
        read_pieces(checkpoint, 'model', wanted)

    def optimizer_state(
        self, model: nn.Module, optimizers: Mapping[str, Optimizer]
    ) -> tuple[dict[str, Pieces], dict[str, Any]]:
        """What the optimisers remember, by parameter name rather than by position.

        Returns:
            ``<optimizer key>/<slot>/<parameter name>`` -> what this process holds, views, or copies of what several
            parameters share; and the entries that are no tensors, nested as
            ``{optimizer key: {slot: {parameter name: value}}}``.
        """
        tensors, plain = {}, {}
        seen: set[int] = set()
        names = parameter_names(model)
        for key, optimizer in optimizers.items():
            plain[key] = {}
            for parameter, slots in optimizer.state.items():
                if not local_part(parameter).numel():  # what it says of steps may be behind
                    continue
                name = names[parameter]
                for slot, value in slots.items():
                    if isinstance(value, Tensor):
                        entries = self.slot_entries(optimizer, parameter, name, slot, value)
                        for entry, pieces in entries.items():
                            tensors[f'{key}/{entry}/{name}'] = _not_shared(pieces, seen)
                    elif value is not None:
                        plain[key].setdefault(slot, {})[name] = value
        return tensors, plain

    def slot_entries(
        self, optimizer: Optimizer, parameter: nn.Parameter, name: str, slot: str, value: Tensor
    ) -> dict[str, Pieces]:
        """What this process saves of a tensor that an optimiser remembers.

        Args:
            optimizer: The optimiser.
            parameter: A parameter of which this process holds some.
            name: The parameter's name.
            slot: What the optimiser calls the tensor.
            value: The tensor.

        Returns:
            Name of an entry of the checkpoint -> what this process holds of it, views.
        """
        return {slot: self.pieces(name, value) if value.shape == parameter.shape else Pieces.whole(value)}

    def load_optimizer_state(
        self, model: nn.Module, optimizers: Mapping[str, Optimizer], checkpoint: Path, plain: Mapping[str, Any]
    ) -> None:
        """Restore the optimisers; hyperparameters stay those of the config.

        Args:
            model: A wrapped model.
            optimizers: Optimisers of its parameters.
            checkpoint: A verified checkpoint.
            plain: Second result of :meth:`optimizer_state` when it was saved.

        Raises:
            CheckpointError: The checkpoint has state for a parameter or optimiser that does not exist here.
        """
        saved = {tuple(name.split('/', 2)): info for name, info in tensor_info(checkpoint, 'optimizer').items()}
        listed = [(key, name) for key, _, name in saved]
        listed += [(key, name) for key, slots in plain.items() for of in slots.values() for name in of]
        names = parameter_names(model)
        _refuse_strangers(listed, optimizers, names, checkpoint)
        for key, optimizer in optimizers.items():
            of_key: dict[str, dict[str, tuple]] = {}
            for (own, slot, name), info in saved.items():
                if own == key:
                    of_key.setdefault(name, {})[slot] = info
            self.restore_optimizer(model, key, optimizer, of_key, plain.get(key, {}), checkpoint)

    def report_restored(self, checkpoint: Path) -> None:
        """Say in the log what could not be restored exactly. Every process of the run calls this.

        Args:
            checkpoint: What :meth:`load_optimizer_state` has read.
        """

    def restore_optimizer(
        self,
        model: nn.Module,
        key: str,
        optimizer: Optimizer,
        saved: Mapping[str, Mapping[str, tuple[torch.Size, torch.dtype]]],
        plain: Mapping[str, Mapping[str, Any]],
        checkpoint: Path,
    ) -> None:
        """Restore one optimiser.

        Args:
            model: A wrapped model.
            key: The optimiser's key.
            optimizer: The optimiser.
            saved: Parameter name -> entry of the checkpoint -> shape and dtype.
            plain: Slot -> parameter name -> value that is no tensor.
            checkpoint: The checkpoint.

        Raises:
            CheckpointError: The state was saved in another form.
        """
        if any(map(has_parts, saved.values())):
            raise CheckpointError(
                f"{checkpoint} holds 8-bit moments of optimizer {key!r} by torchao, as module_wrapper='fsdp2' divides "
                f'them, which {type(optimizer).__name__} of {self.name!r} cannot read: go on with '
                "module_wrapper='fsdp2' on any number of processes that torchrun starts; or start a run of another "
                'name (work_dir) from the weights alone, with load_from'
            )
        names = parameter_names(model)
        shapes = {name: pieces.shape for name, pieces in self.model_state(model).items()}
        wanted: dict[str, Pieces] = {}
        restored = optimizer.state_dict()
        states, position = {}, 0
        for group in optimizer.param_groups:
            for parameter in group['params']:
                name = names[parameter]
                if local_part(parameter).numel():
                    slots = {
                        slot: self._empty_slot(f'{key}/{slot}/{name}', name, parameter, shapes[name], *info, wanted)
                        for slot, info in saved.get(name, {}).items()
                    }
                    slots.update({slot: of[name] for slot, of in plain.items() if name in of})
                else:
                    slots = restored['state'].get(position)
                if slots:
                    states[position] = slots
                position += 1
        restored['state'] = states
        read_pieces(checkpoint, 'optimizer', wanted)
        optimizer.load_state_dict(restored)
        own = [parameter for group in optimizer.param_groups for parameter in group['params']]
        for position, slots in states.items():
            _undo_casts(own[position], slots, optimizer.state[own[position]])

    def _empty_slot(
        self,
        entry: str,
        name: str,
        parameter: nn.Parameter,
        shape: tuple[int, ...],
        saved_shape: torch.Size,
        dtype: torch.dtype,
        wanted: dict[str, Pieces],
    ) -> Tensor:
        """Memory for one saved value of an optimiser; ``wanted`` is told what is to be read into it."""
        if tuple(saved_shape) == tuple(shape):
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            wanted[entry] = self.pieces(name, value)
        else:
            value = torch.zeros(saved_shape, dtype=dtype)
            wanted[entry] = Pieces.whole(value)
        return value

    @classmethod
    def optimizer_class(cls, name: str) -> type[Optimizer]:
        """The optimiser that a name in the config means under this strategy.

        Raises:
            ValueError: There is no such optimiser, or this strategy cannot run it.
            ImportError: Its package is not installed; the message says how to install it.
        """
        return optimizer_of_whole(name)

    def check_optimizer(self, key: str, options: Mapping[str, Any]) -> None:
        """Refuse an optimiser that this strategy cannot run.

        Args:
            key: Its key in the config.
            options: Its section.

        Raises:
            ValueError: The message says what to use instead.
            ImportError: Its package is not installed.
        """
        named_class(key, str(options.get('type')), self.optimizer_class)


def _not_shared(pieces: Pieces, seen: set[int]) -> Pieces:
    """Pieces that share no memory with those seen before: files hold what several parameters share several times."""
    tensors = tuple(tensor.clone() if tensor.data_ptr() in seen else tensor for tensor in pieces.tensors)
    seen.update(tensor.data_ptr() for tensor in tensors if tensor.numel())
    return replace(pieces, tensors=tensors)


def _undo_casts(parameter: nn.Parameter, read: Mapping[str, Any], loaded: dict[str, Any]) -> None:
    """Take back that torch casts what it loads to the parameter's dtype, also what is no moment of it."""
    for slot, value in read.items():
        if isinstance(value, Tensor) and value.shape != parameter.shape and loaded[slot].dtype != value.dtype:
            loaded[slot] = value.to(loaded[slot].device)


def _refuse_strangers(
    listed: list[tuple[str, str]], optimizers: Mapping[str, Optimizer], names: Mapping[nn.Parameter, str], origin: Path
) -> None:
    for key, _ in listed:
        if key not in optimizers:
            raise CheckpointError(
                f'{origin} holds the state of an optimizer {key!r}, the config has {sorted(optimizers)}'
            )
    for key, optimizer in optimizers.items():
        own = {names[parameter] for group in optimizer.param_groups for parameter in group['params']}
        strangers = sorted({name for saved_key, name in listed if saved_key == key} - own)
        if strangers:
            raise CheckpointError(
                f'{origin} holds optimizer state for {len(strangers)} parameters that optimizer {key!r} does not '
                f'train: {", ".join(strangers[:8])}'
            )
