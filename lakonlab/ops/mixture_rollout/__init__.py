"""Many Euler substeps along the posterior velocity of a Gaussian mixture, as one operation with its own gradient.

With ``d = x_t - x_src`` and the coefficients of :mod:`lakonlab.ops.mixture`, a substep of length ``h`` is

    g       = logit_offset * d + logit_source * x_src
    logit_k = log pi_k + m_k . g + logit_norm * |m_k|^2
    d      += state * d + source * x_src + mean * sum_k softmax(logit)_k m_k

where ``state``, ``source`` and ``mean`` are ``h`` times the factors of the velocity. The six numbers per sample and
substep depend on noise levels and variance alone, so they are computed beforehand, in double precision.

The gradient keeps nothing of a forward call but its inputs: it runs the substeps again, remembers the offsets, and
walks back. Backends do the arithmetic; all of them compute the same function and are tested against the plain loop.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lakonlab.ops.mixture import posterior_coefficients

BACKENDS = {
    'torch': 'lakonlab.ops.mixture_rollout.torch_backend',
    'native': 'lakonlab.ops.mixture_rollout.native_backend',
    'triton': 'lakonlab.ops.mixture_rollout.triton_backend',
}
"""Backend -> module with ``unavailable(device)`` (a reason, or None), ``forward`` and ``backward``."""

PREFERRED = {'cpu': 'native', 'cuda': 'triton'}
"""Device type -> the backend tried before ``'torch'``."""


class RolloutInputs(NamedTuple):
    """What a backend computes with: float32 or float64 tensors on one device, all contiguous."""

    means: Tensor
    """(B, K, C, P) component means in velocity space; P pixels."""
    logweights: Tensor
    """(B, K, P), up to a constant; ``-inf`` for dropped components, never all of a pixel."""
    source: Tensor
    """(B, C, P) state at which the mixture was predicted."""
    offset: Tensor
    """(B, C, P) state at the start of the rollout minus ``source``."""
    coefficients: Tensor
    """(B, N, 6): state, source, mean, logit_offset, logit_source, logit_norm of each substep."""


def substep_coefficients(sigmas: Tensor, sigma_src: Tensor, variance: Tensor, eps: float) -> Tensor:
    """The six factors of every substep, (B, N, 6), in the dtype of ``sigmas`` and on its device.

    Args:
        sigmas: Noise levels of the substeps' ends, (B, N + 1), decreasing.
        sigma_src: Noise level in (0, 1] at which the mixture was predicted, (B,).
        variance: Variance of the components in velocity space, (B,).
        eps: Floor of noise levels that divide.
    """
    c = posterior_coefficients(sigma_src[:, None].clamp(min=eps), sigmas[:, :-1].clamp(min=eps), variance[:, None])
    h = sigmas.diff(dim=1)
    return torch.stack(
        [h * c.u_offset, h * c.u_source, h * c.u_mean, c.logit_offset, c.logit_source, c.logit_norm], dim=-1
    )


def mixture_rollout(
    means: Tensor,
    logweights: Tensor,
    x_src: Tensor,
    offset: Tensor,
    coefficients: Tensor,
    lengths: Tensor,
    backend: str = 'auto',
) -> Tensor:
    """Take all substeps of every sample.

    Args:
        means: Component means in velocity space, (B, K, C, *).
        logweights: Logarithms of the weights up to a constant, (B, K, 1, *).
        x_src: State at which the mixture was predicted, (B, C, *).
        offset: ``x_t - x_src`` at the start, (B, C, *).
        coefficients: From :func:`substep_coefficients`, (B, N, 6).
        lengths: Number of substeps of each sample, (B,), int64 on the host, at most N.
        backend: Name in :data:`BACKENDS`, or ``'auto'`` for the fastest that is available on the device.

    Returns:
        ``x_t - x_src`` at the end, (B, C, *). It is differentiable once, in everything but ``lengths``.

    Raises:
        ValueError: The backend is unknown or unavailable; the message says why.
    """
    wide = torch.promote_types(x_src.dtype, torch.float32)
    module = backend_module(backend, means.device)
    result = _MixtureRollout.apply(
        module,
        tuple(lengths.tolist()),
        means.flatten(3).to(wide),
        logweights.squeeze(2).flatten(2).to(wide),
        x_src.flatten(2).to(wide),
        offset.flatten(2).to(wide),
        coefficients.to(wide),
    )
    return result.reshape(offset.shape).to(offset.dtype)


def backend_module(backend: str, device: torch.device) -> ModuleType:
    """The module of a backend, see :func:`mixture_rollout`."""
    if backend == 'auto':
        preferred = PREFERRED.get(device.type)
        if preferred is not None:
            module = importlib.import_module(BACKENDS[preferred])
            if module.unavailable(device) is None:
                return module
        return importlib.import_module(BACKENDS['torch'])
    if backend not in BACKENDS:
        raise ValueError(f"rollout_backend={backend!r}: expected 'auto' or one of {', '.join(BACKENDS)}")
    module = importlib.import_module(BACKENDS[backend])
    reason = module.unavailable(device)
    if reason is not None:
        raise ValueError(f"rollout_backend={backend!r} is not available on {device}: {reason}; use 'auto'")
    return module


class _MixtureRollout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module: ModuleType, lengths: tuple[int, ...], *tensors: Tensor) -> Tensor:
        inputs = RolloutInputs(*(tensor.contiguous() for tensor in tensors))
        ctx.module, ctx.lengths = module, lengths
        ctx.save_for_backward(*inputs)
        return module.forward(inputs, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        inputs = RolloutInputs(*ctx.saved_tensors)
        return None, None, *ctx.module.backward(inputs, ctx.lengths, grad.contiguous())
