"""Data parallelism: every process holds the whole model and a part of the batch (torch's DistributedDataParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lakonlab.parallel.strategy import Strategy
from lakonlab.registry import STRATEGIES


class DataParallel(DistributedDataParallel):
    """torch's wrapper, through which attributes of the wrapped module are seen."""

    wraps = 'module'

    def __getattr__(self, name: str):
        """What the wrapper does not have is the module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('module'), name)


def data_parallel(model: nn.Module, children: Sequence[str], find_unused_parameters: bool) -> list[DataParallel]:
    """Wrap children of a model, in place.

    Args:
        model: The whole model, on the device.
        children: Names of children that are trained.
        find_unused_parameters: Whether some trained parameters may take no part in a step.

    Returns:
        The wrappers.
    """
    wrappers = []
    for name in children:
        wrapper = DataParallel(
            model.get_submodule(name),
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,
            # weights are equal already; buffers are constants, and an exchange of them in every forward pass would
            # wait for ever in evaluations, where processes make different numbers of passes
            init_sync=False,
            forward_sync_buffers=False,
        )
        setattr(model, name, wrapper)
        wrappers.append(wrapper)
    return wrappers


def trained_children(model: nn.Module) -> list[str]:
    """Names of the children that have trained parameters."""
    return [name for name, child in model.named_children() if is_trained(child)]


def is_trained(module: nn.Module) -> bool:
    """Whether a module has trained parameters."""
    return any(parameter.requires_grad for parameter in module.parameters())


@STRATEGIES.register_module('ddp')
class DistributedData(Strategy):
    """Every trained child of the model is wrapped; frozen ones are just there.

    Args:
        find_unused_parameters: Whether some trained parameters may take no part in a step.
        **options: See :class:`Strategy`.
    """

    name = 'ddp'

    def __init__(self, find_unused_parameters: bool = False, **options):
        super().__init__(**options)
        self.find_unused_parameters = find_unused_parameters
        self._wrappers: list[DataParallel] = []

    def _wrap(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        self._wrappers = data_parallel(model, trained_children(model), self.find_unused_parameters)
        return model

    def clear_gradients(self, optimizers: Mapping[str, Optimizer]) -> None:
        """See the base class; gradients stay in the buckets, beside which new ones would take their size once more.

        What takes no part in a step has no gradient, so where that may happen there are new ones.
        """
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=self.find_unused_parameters)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """See the base class."""
        with contextlib.ExitStack() as stack:
            if not last:
                for wrapper in self._wrappers:
                    stack.enter_context(wrapper.no_sync())
            yield
