"""How much memory a network's activations take, measured with tensors that have a shape and a precision but no values.

A dispatch mode watches every operation of a forward and a backward pass and adds up the storages that are alive. The
tensors are torch's fake ones, which unlike those of the meta device are subject to autocast.
Gradients of parameters are left out, since a plan counts them apart. Attention is taken to be fused, as it is on GPUs
and on CPUs: it keeps its inputs, its result and one number per row, never the matrix of weights.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lakonlab.models.architecture.blocks import block_lists


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that were made while it is active and are still alive.

    Attributes:
        live: Bytes now.
        peak: Most bytes so far.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and count what it made."""
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _has_storage(leaf) and id(leaf.untyped_storage()) not in inputs:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size

    def forget(self, tensor: Tensor) -> None:
        """Stop counting a tensor, though it stays alive."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            self.live -= storage.nbytes()
            weakref.finalize(storage, self._freed, -storage.nbytes())


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided


class FusedAttention(torch.autograd.Function):
    """Shapes and memory of an attention kernel that never holds the matrix of weights; its values mean nothing."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (..., T, D), keys (..., S, D) and values (..., S, E) to (..., T, E)."""
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        normalisers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, normalisers)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Gradients of all three."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Takes what torch's own function takes; masks and dropout do not change the memory of a fused kernel."""
    return FusedAttention.apply(query, key, value)


def _attention_is_fused():
    """Attention as a fused kernel, which the meta device has none of.

    A mode for torch functions would not reach blocks that are recomputed inside of the backward pass.
    """
    return patch.object(F, 'scaled_dot_product_attention', _fused_attention)


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that the activations of one micro-batch take, gradients of parameters left out."""

    held: int
    """Alive between forward and backward pass."""
    peak: int
    """Most that is alive."""


def measure_training(network: nn.Module, inputs: Mapping[str, Tensor], checkpointing: bool) -> ActivationMemory:
    """Measure a network that is built on the meta device.

    Networks repeat blocks, and what is held grows by the same amount with each but the first and the last, so lists of
    blocks are cut to two and to three blocks and the rest is extrapolated. What a backward pass takes beyond what is
    held, to go through one block, does not grow with their number.

    Args:
        network: On the meta device; has an attribute ``checkpointing``; changed back to how it was.
        inputs: Keyword arguments of its forward pass.
        checkpointing: Whether blocks are recomputed.
    """
    was_checkpointing, was_training = network.checkpointing, network.training
    network.train()
    network.checkpointing = checkpointing
    try:
        with _faked(network):
            inputs = {name: _fake(value) for name, value in inputs.items()}
            measured: list[tuple[int, int]] = []

            def held() -> int:
                measured.append(training_memory(network, inputs))
                return measured[-1][0]

            total = _extrapolated(network, held)
        return ActivationMemory(total, total + max(peak - held for held, peak in measured))
    finally:
        network.checkpointing = was_checkpointing
        network.train(was_training)


def measure_inference(network: nn.Module, inputs: Mapping[str, Tensor], role: nn.Module | None = None) -> int:
    """Most bytes alive in a forward pass without gradient; see :func:`measure_training`.

    Args:
        network: Holds the tensors.
        inputs: Keyword arguments of the forward pass.
        role: What is called, if that is another role of the network.
    """
    called = network if role is None else role
    with _faked(network):
        inputs = {name: _fake(value) for name, value in inputs.items()}
        return _extrapolated(network, lambda: inference_memory(called, inputs))


@functools.cache
def _fake_mode() -> FakeTensorMode:
    """One for all measurements: networks keep tables of positions, which no other mode would take."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _fake(value: Any) -> Any:
    """A stand-in for a tensor on the CPU, without memory; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    stand_in = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device='cpu')
    return nn.Parameter(stand_in, value.requires_grad) if isinstance(value, nn.Parameter) else stand_in


@contextlib.contextmanager
def _faked(network: nn.Module) -> Iterator[None]:
    """Put stand-ins into the place of all tensors of a network, and the tensors back."""
    tables = [table for module in network.modules() for table in (module._parameters, module._buffers, vars(module))]
    places = [(table, name, value) for table in tables for name, value in table.items() if isinstance(value, Tensor)]
    with _fake_mode(), torch.device('cpu'):
        stand_ins = {id(value): _fake(value) for _, _, value in places}
        try:
            for table, name, value in places:
                table[name] = stand_ins[id(value)]
            yield
        finally:
            for table, name, value in places:
                table[name] = value


def training_memory(network: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes of activations alive between a forward and a backward pass, and at most in both."""
    memory = LiveMemory()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    grads = [parameter.grad for parameter in trained]

    def forget(parameter: Tensor) -> None:
        memory.forget(parameter.grad)

    handles = [parameter.register_post_accumulate_grad_hook(forget) for parameter in trained]
    try:
        with memory, _attention_is_fused():
            output = network(**inputs)
            outputs = [tensor for tensor in tree_leaves(output) if tensor.requires_grad]
            held = memory.live
            torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in zip(trained, grads):
            parameter.grad = grad
    return held, memory.peak


@torch.no_grad()
def inference_memory(network: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Most bytes alive in a forward pass without gradient."""
    memory = LiveMemory()
    with memory, _attention_is_fused():
        network(**inputs)
    return memory.peak


@contextlib.contextmanager
def _cut(lists: list[tuple[nn.Module, str]], counts: tuple[int, ...]) -> Iterator[None]:
    whole = [getattr(owner, name) for owner, name in lists]
    try:
        for (owner, name), blocks, count in zip(lists, whole, counts):
            setattr(owner, name, nn.ModuleList(itertools.islice(blocks, count)))
        yield
    finally:
        for (owner, name), blocks in zip(lists, whole):
            setattr(owner, name, blocks)


def _extrapolated(network: nn.Module, measure: Callable[[], int]) -> int:
    """A measurement that grows linearly with the length of every list of blocks."""
    lists = block_lists(network)
    with _cut(lists, (2,) * len(lists)):
        total = least = measure()
    for position, (owner, name) in enumerate(lists):
        length = len(getattr(owner, name))
        with _cut(lists, tuple(3 if other == position else 2 for other in range(len(lists)))):
            total += (length - 2) * (measure() - least)
    return total
