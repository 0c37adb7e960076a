"""What every strategy does: one process or many, whole or divided.

A strategy is all that the runner knows about processes and devices. This class is complete for models of which every
process holds all; a subclass says how it wraps a model and which part of a tensor is here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lakonlab.models.architecture.roles import parameter_names
from lakonlab.models.training_step import GradientExchange
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
            ``<optimizer key>/<slot>/<parameter name>`` -> what this process holds, views; and the entries that are no
            tensors, nested as ``{optimizer key: {slot: {parameter name: value}}}``.
        """
        tensors, plain = {}, {}
        names = parameter_names(model)
        for key, optimizer in optimizers.items():
            plain[key] = {}
            for parameter, slots in optimizer.state.items():
                name = names[parameter]
                for slot, value in slots.items():
                    if isinstance(value, Tensor):
                        like = value.shape == parameter.shape
                        tensors[f'{key}/{slot}/{name}'] = self.pieces(name, value) if like else Pieces.whole(value)
                    elif value is not None:
                        plain[key].setdefault(slot, {})[name] = value
        return tensors, plain

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
        shapes = {name: pieces.shape for name, pieces in self.model_state(model).items()}
        wanted: dict[str, Pieces] = {}
        for key, optimizer in optimizers.items():
            states, position = {}, 0
            for group in optimizer.param_groups:
                for parameter in group['params']:
                    name = names[parameter]
                    slots = {slot: info for (own, slot, of), info in saved.items() if own == key and of == name}
                    states[position] = {
                        slot: self._empty_slot(f'{key}/{slot}/{name}', name, parameter, shapes[name], *info, wanted)
                        for slot, info in slots.items()
                        if local_part(parameter).numel()
                    }
                    states[position].update({slot: of[name] for slot, of in plain.get(key, {}).items() if name in of})
                    position += 1
            states = {position: slots for position, slots in states.items() if slots}
            restored = optimizer.state_dict()
            restored['state'] = states
            read_pieces(checkpoint, 'optimizer', wanted)
            wanted.clear()
            optimizer.load_state_dict(restored)

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

    def check_optimizer(self, key: str, options: Mapping[str, Any]) -> None:
        """Refuse an optimiser that this strategy cannot run.

        Args:
            key: Its key in the config.
            options: Its section.

        Raises:
            ValueError: The message says what to use instead.
        """


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
