"""One process, one device.

A strategy is all that the runner knows about processes and devices. Its methods are the ones below; another strategy
(data parallel, sharded) registers another class with the same methods and shares everything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lakonlab.models.architecture.roles import parameter_names
from lakonlab.parallel.state import check_fits, training_state
from lakonlab.registry import STRATEGIES
from lakonlab.storage.checkpoint import CheckpointError, read_tensors, tensor_info


@STRATEGIES.register_module('single')
class SingleProcess:
    """Training in one process.

    Args:
        device: Where the model lives; None for the first accelerator, or the CPU if there is none.
        trainable_only: Whether frozen parameters of trained modules are left out of checkpoints.
    """

    rank = 0
    world_size = 1

    def __init__(self, device: str | torch.device | None = None, trainable_only: bool = True):
        if device is None:
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.device = torch.device(device)
        self.trainable_only = trainable_only

    def wrap(self, model: nn.Module) -> nn.Module:
        """Put the model where it is trained."""
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

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Suspend the exchange of gradients; there is none here."""
        yield

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors to save, by name; views of the model."""
        return training_state(model, self.trainable_only)

    def load_model_state(self, model: nn.Module, checkpoint: Path) -> None:
        """Fill the model in place.

        Args:
            model: A wrapped model.
            checkpoint: A verified checkpoint.

        Raises:
            CheckpointError: The checkpoint's tensors are not exactly those of the model.
        """
        wanted = {name: tensor.detach() for name, tensor in self.model_state(model).items()}
        check_fits(tensor_info(checkpoint, 'model'), wanted, checkpoint)
        read_tensors(checkpoint, 'model', into=wanted)

    def optimizer_state(
        self, model: nn.Module, optimizers: Mapping[str, Optimizer]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the optimisers remember, by parameter name rather than by position.

        Returns:
            Tensors, ``<optimizer key>/<slot>/<parameter name>`` -> value, views; and the entries that are no tensors,
            nested as ``{optimizer key: {slot: {parameter name: value}}}``.
        """
        tensors, plain = {}, {}
        names = parameter_names(model)
        for key, optimizer in optimizers.items():
            plain[key] = {}
            for parameter, slots in optimizer.state.items():
                for slot, value in slots.items():
                    if isinstance(value, Tensor):
                        tensors[f'{key}/{slot}/{names[parameter]}'] = value
                    elif value is not None:
                        plain[key].setdefault(slot, {})[names[parameter]] = value
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
        restored: dict[str, dict[str, dict[str, Any]]] = {key: {} for key in optimizers}
        entries = [(*name.split('/', 2), value) for name, value in read_tensors(checkpoint, 'optimizer').items()]
        for key, slots in plain.items():
            entries += [(key, slot, name, value) for slot, of in slots.items() for name, value in of.items()]
        for key, slot, name, value in entries:
            if key not in restored:
                raise CheckpointError(
                    f'{checkpoint} holds the state of an optimizer {key!r}, the config has {sorted(optimizers)}'
                )
            restored[key].setdefault(name, {})[slot] = value
        names = parameter_names(model)
        for key, optimizer in optimizers.items():
            state = optimizer.state_dict()
            order = [names[parameter] for group in optimizer.param_groups for parameter in group['params']]
            strangers = sorted(set(restored[key]) - set(order))
            if strangers:
                raise CheckpointError(
                    f'{checkpoint} holds optimizer state for {len(strangers)} parameters that optimizer {key!r} does '
                    f'not train: {", ".join(strangers[:8])}'
                )
            state['state'] = {
                position: restored[key][name] for position, name in enumerate(order) if name in restored[key]
            }
            optimizer.load_state_dict(state)

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors on the CPU, contiguous, which training cannot change any more."""
        copies = {}
        for name, tensor in tensors.items():
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device='cpu')
            copies[name] = copy.copy_(tensor.detach())
        return copies
