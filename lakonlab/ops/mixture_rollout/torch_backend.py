"""The backend in plain torch: available on every device, no compiler needed, traceable by torch.compile.

On the CPU the work is cut into tiles of one sample and as many pixels as fit the cache, so that the means are read from
memory once per rollout instead of once per substep. Elsewhere there is one tile: all samples in the order of their
length, from which finished ones are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lakonlab.ops.mixture_rollout import RolloutInputs

CACHE_BYTES = 2 * 1024 * 1024  # of the means of a tile: smaller ones spend their time in calling operators


def unavailable(device: torch.device) -> str | None:
    return None


def forward(inputs: RolloutInputs, lengths: tuple[int, ...]) -> Tensor:
    result = torch.empty_like(inputs.offset)
    for rows, pixels, tile, tile_lengths in _tiles(inputs, lengths):
        use_gram = _gram_is_cheaper(tile, tile_lengths)
        _put(result, rows, pixels, (_advance_gram if use_gram else _advance)(tile, tile_lengths))
    return result


def backward(inputs: RolloutInputs, lengths: tuple[int, ...], grad: Tensor) -> RolloutInputs:
    grads = RolloutInputs(*(torch.zeros_like(tensor) for tensor in inputs))
    for rows, pixels, tile, tile_lengths in _tiles(inputs, lengths):
        tile_grads = _gradient(tile, tile_lengths, _take(grad, rows, pixels))
        for total, part in zip(grads[:4], tile_grads[:4]):
            _put(total, rows, pixels, part)
        grads.coefficients[rows] += tile_grads.coefficients
    return grads


def _tiles(inputs: RolloutInputs, lengths: tuple[int, ...]) -> Iterator[tuple]:
    """Rows, pixels, inputs and lengths of each tile; within a tile, the longest sample comes first."""
    if inputs.means.device.type != 'cpu':
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        rows = slice(None) if order == list(range(len(lengths))) else torch.tensor(order, device=inputs.means.device)
        yield rows, slice(None), _tile(inputs, rows, slice(None)), [lengths[row] for row in order]
        return
    batch_size, num_components, num_channels, num_pixels = inputs.means.shape
    fitting = max(CACHE_BYTES // (num_components * num_channels * inputs.means.element_size()), 64)
    for row in range(batch_size):
        rows = slice(row, row + 1)
        for start in range(0, num_pixels, fitting):
            pixels = slice(start, start + fitting)
            yield rows, pixels, _tile(inputs, rows, pixels), [lengths[row]]


def _tile(inputs: RolloutInputs, rows, pixels: slice) -> RolloutInputs:
    *images, coefficients = inputs
    return RolloutInputs(*(_take(image, rows, pixels).contiguous() for image in images), coefficients[rows])


def _take(image: Tensor, rows, pixels: slice) -> Tensor:
    return image[rows][..., pixels]


def _put(image: Tensor, rows, pixels: slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        image[rows, ..., pixels] = values
    else:
        image[rows] = values


def _num_active(lengths: list[int]) -> list[int]:
    """Number of samples that take each substep, from lengths in decreasing order."""
    return [sum(length > i for length in lengths) for i in range(lengths[0])]


def _columns(coefficients: Tensor, i: int, active: int) -> list[Tensor]:
    """The six factors of substep ``i``, each (active, 1, 1)."""
    return list(coefficients[:active, i, :, None, None].unbind(1))


def _weights(means: Tensor, logits: Tensor, direction: Tensor) -> Tensor:
    return (logits + (means * direction[:, None]).sum(dim=2)).softmax(dim=1)


def _advance(inputs: RolloutInputs, lengths: list[int], states: list[Tensor] | None = None) -> Tensor:
    """The offset after all substeps; the offsets before each are appended to ``states``."""
    means, logweights, source, offset, coefficients = inputs
    squared_norms = means.square().sum(dim=2)
    offset = offset.clone()
    for i, n in enumerate(_num_active(lengths)):
        state, from_source, from_mean, logit_offset, logit_source, logit_norm = _columns(coefficients, i, n)
        d, x = offset[:n], source[:n]
        if states is not None:
            states.append(d.clone())
        logits = torch.addcmul(logweights[:n], logit_norm, squared_norms[:n])
        weights = _weights(means[:n], logits, torch.addcmul(logit_offset * d, logit_source, x))
        mean = (weights[:, :, None] * means[:n]).sum(dim=1)
        d.add_(torch.addcmul(state * d, from_source, x).addcmul_(from_mean, mean))
    return offset


def _gram_is_cheaper(inputs: RolloutInputs, lengths: list[int]) -> bool:
    _, num_components, num_channels, _ = inputs.means.shape
    substep = 2 * num_components * num_channels - num_components**2
    return substep * lengths[0] > num_components**2 * num_channels  # what a substep saves against the Gram matrix


def _advance_gram(inputs: RolloutInputs, lengths: list[int]) -> Tensor:
    """The same in coordinates: the offset stays in the span of its start, the source and the means.

    ``d = p * d_0 + q * x_src + sum_j b_j m_j`` with ``p`` and ``q`` decided by the schedule alone, so that a substep
    needs the Gram matrix ``m_k . m_j`` and K coordinates per pixel, but no channel.
    """
    means, logweights, source, offset, coefficients = inputs
    gram = torch.einsum('bkcp,bjcp->bjkp', means, means)
    along_offset, along_source = ((means * image[:, None]).sum(dim=2) for image in (offset, source))
    squared_norms = means.square().sum(dim=2)
    coordinates = torch.zeros_like(logweights)
    p = torch.ones_like(coefficients[:, 0, 0, None, None])
    q = torch.zeros_like(p)
    p_end, q_end = p.clone(), q.clone()
    for i, n in enumerate(_num_active(lengths)):
        state, from_source, from_mean, logit_offset, logit_source, logit_norm = _columns(coefficients, i, n)
        b, p, q = coordinates[:n], p[:n], q[:n]
        logits = torch.addcmul(logweights[:n], logit_norm, squared_norms[:n])
        logits.addcmul_(logit_offset * p, along_offset[:n])
        logits.addcmul_(logit_offset * q + logit_source, along_source[:n])
        weights = logits.addcmul_(logit_offset, (gram[:n] * b[:, :, None]).sum(dim=1)).softmax(dim=1)
        b.addcmul_(b, state).addcmul_(from_mean, weights)
        p, q = p + state * p, q + state * q + from_source
        p_end[:n], q_end[:n] = p, q
    return torch.addcmul(p_end * offset, q_end, source) + (coordinates[:, :, None] * means).sum(dim=1)


def _gradient(inputs: RolloutInputs, lengths: list[int], grad: Tensor) -> RolloutInputs:
    means, logweights, source, _, coefficients = inputs
    states: list[Tensor] = []
    _advance(inputs, lengths, states)
    squared_norms = means.square().sum(dim=2)
    d_means, d_logweights, d_source, d_coefficients = (
        torch.zeros_like(tensor) for tensor in (means, logweights, source, coefficients)
    )
    d_norms = torch.zeros_like(logweights)
    d_offset = grad.clone()
    for i, n in reversed(list(enumerate(_num_active(lengths)))):
        state, from_source, from_mean, logit_offset, logit_source, logit_norm = _columns(coefficients, i, n)
        d, x, m, d_end = states[i], source[:n], means[:n], d_offset[:n]
        direction = torch.addcmul(logit_offset * d, logit_source, x)
        weights = _weights(m, torch.addcmul(logweights[:n], logit_norm, squared_norms[:n]), direction)
        slope = (m * d_end[:, None]).sum(dim=2)
        average = (weights * slope).sum(dim=1, keepdim=True)
        d_logits = from_mean * weights * (slope - average)
        d_direction = (d_logits[:, :, None] * m).sum(dim=1)

        d_means[:n].addcmul_(weights[:, :, None], (from_mean * d_end)[:, None])
        d_means[:n].addcmul_(d_logits[:, :, None], direction[:, None])
        d_logweights[:n] += d_logits
        d_norms[:n].addcmul_(logit_norm, d_logits)
        d_source[:n].addcmul_(from_source, d_end).addcmul_(logit_source, d_direction)
        products = (
            d_end * d,
            d_end * x,
            average,
            d_direction * d,
            d_direction * x,
            d_logits * squared_norms[:n],
        )
        d_coefficients[:n, i] = torch.stack([product.flatten(1).sum(dim=1) for product in products], dim=1)
        d_offset[:n] = torch.addcmul(torch.addcmul(d_end, state, d_end), logit_offset, d_direction)
    d_means.addcmul_(means, d_norms[:, :, None], value=2)
    return RolloutInputs(d_means, d_logweights, d_source, d_offset, d_coefficients)
