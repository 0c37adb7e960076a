"""The rollout and its gradient as Triton kernels; :mod:`.triton_backend` launches them.

A program takes one sample and a block of pixels through all substeps. Its means stay in registers, so they are read
from memory once per rollout. K, C and the block are padded to powers of two: the weight of a padded component is 0,
and everything else that is padded is 0, so that sums over it add nothing.

The tile of means is (channels, components, pixels) where COMPONENT_AXIS is 1, else (components, channels, pixels).
Threads that are not needed for pixels share the middle axis; sums over the first axis need no exchange between them.

Layout of the arguments: means (batch, components, channels, pixels), logweights (batch, components, pixels), source,
offset and grad (batch, channels, pixels), coefficients (batch, substeps, 6), lengths (batch,). Arithmetic is in the
dtype of the arguments.
"""

import triton
import triton.language as tl


@triton.jit
def _block(
    lengths,
    num_programs,
    num_pixels,
    NUM_COMPONENTS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    PADDED_COMPONENTS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPONENT_AXIS: tl.constexpr,
):
    """Row and length of the program's sample; places and masks of a block of components, channels and pixels."""
    row = (tl.program_id(0) // num_programs).to(tl.int64)
    pixels = tl.program_id(0) % num_programs * BLOCK + tl.arange(0, BLOCK)
    components = tl.arange(0, PADDED_COMPONENTS)
    channels = tl.arange(0, PADDED_CHANNELS)
    flat_places = components[:, None] * num_pixels + pixels[None, :]
    flat_mask = (components < NUM_COMPONENTS)[:, None] & (pixels < num_pixels)[None, :]
    image_places = channels[:, None] * num_pixels + pixels[None, :]
    image_mask = (channels < NUM_CHANNELS)[:, None] & (pixels < num_pixels)[None, :]
    places = tl.expand_dims((components * NUM_CHANNELS * num_pixels)[:, None], 1 - COMPONENT_AXIS) + tl.expand_dims(
        image_places, COMPONENT_AXIS
    )
    mask = tl.expand_dims(flat_mask, 1 - COMPONENT_AXIS) & tl.expand_dims(image_mask, COMPONENT_AXIS)
    return row, tl.load(lengths + row), flat_places, flat_mask, image_places, image_mask, places, mask


@triton.jit
def _load_logweights(logweights, places, mask, NUM_COMPONENTS: tl.constexpr, PADDED_COMPONENTS: tl.constexpr):
    loaded = tl.load(logweights + places, mask=mask, other=0)
    return tl.where((tl.arange(0, PADDED_COMPONENTS) < NUM_COMPONENTS)[:, None], loaded, -float('inf'))


@triton.jit
def _weights(means, logweights, squared_norms, direction, logit_norm, COMPONENT_AXIS: tl.constexpr):
    along_direction = tl.sum(means * tl.expand_dims(direction, COMPONENT_AXIS), axis=1 - COMPONENT_AXIS)
    logits = logweights + logit_norm * squared_norms + along_direction
    exponentials = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return exponentials * (1 / tl.sum(exponentials, axis=0))[None, :]


@triton.jit
def _total(values):
    return tl.sum(tl.sum(values, axis=0), axis=0)


@triton.jit
def _substep(means, logweights, squared_norms, source, offset, coefficient, COMPONENT_AXIS: tl.constexpr):
    """The offset after a substep; ``coefficient`` points at its six factors."""
    direction = tl.load(coefficient + 3) * offset + tl.load(coefficient + 4) * source
    weights = _weights(means, logweights, squared_norms, direction, tl.load(coefficient + 5), COMPONENT_AXIS)
    mean = tl.sum(tl.expand_dims(weights, 1 - COMPONENT_AXIS) * means, axis=COMPONENT_AXIS)
    velocity = tl.load(coefficient) * offset + tl.load(coefficient + 1) * source + tl.load(coefficient + 2) * mean
    return offset + velocity


# Sizes are not specialised: there is one compilation for all image sizes, and a thread's pixels are not adjacent.
# Vectorised loads of adjacent pixels would leave more threads to the middle axis and triple the exchange between them.
@triton.jit(do_not_specialize=['num_programs', 'num_pixels', 'num_substeps'])
def forward_kernel(
    means,
    logweights,
    source,
    offset,
    coefficients,
    lengths,
    result,
    num_programs,
    num_pixels,
    num_substeps,
    NUM_COMPONENTS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    PADDED_COMPONENTS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPONENT_AXIS: tl.constexpr,
):
    row, length, flat_places, flat_mask, image_places, image_mask, places, mask = _block(
        lengths,
        num_programs,
        num_pixels,
        NUM_COMPONENTS,
        NUM_CHANNELS,
        PADDED_COMPONENTS,
        PADDED_CHANNELS,
        BLOCK,
        COMPONENT_AXIS,
    )
    image = row * NUM_CHANNELS * num_pixels
    m = tl.load(means + image * NUM_COMPONENTS + places, mask=mask, other=0)
    log_pi = _load_logweights(
        logweights + row * NUM_COMPONENTS * num_pixels, flat_places, flat_mask, NUM_COMPONENTS, PADDED_COMPONENTS
    )
    x = tl.load(source + image + image_places, mask=image_mask, other=0)
    d = tl.load(offset + image + image_places, mask=image_mask, other=0)
    squared_norms = tl.sum(m * m, axis=1 - COMPONENT_AXIS)
    for i in range(length):
        d = _substep(m, log_pi, squared_norms, x, d, coefficients + (row * num_substeps + i) * 6, COMPONENT_AXIS)
    tl.store(result + image + image_places, d, mask=image_mask)


@triton.jit(do_not_specialize=['num_programs', 'num_pixels', 'num_substeps'])
def backward_kernel(
    means,
    logweights,
    source,
    offset,
    coefficients,
    lengths,
    grad,
    states,  # scratch, (batch, substeps, channels, pixels): the offset before each substep
    grad_means,
    grad_logweights,
    grad_source,
    grad_offset,
    grad_coefficients,  # (batch, programs, substeps, 6), zero: the sums over a program's pixels
    num_programs,
    num_pixels,
    num_substeps,
    NUM_COMPONENTS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    PADDED_COMPONENTS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPONENT_AXIS: tl.constexpr,
):
    row, length, flat_places, flat_mask, image_places, image_mask, places, mask = _block(
        lengths,
        num_programs,
        num_pixels,
        NUM_COMPONENTS,
        NUM_CHANNELS,
        PADDED_COMPONENTS,
        PADDED_CHANNELS,
        BLOCK,
        COMPONENT_AXIS,
    )
    image = row * NUM_CHANNELS * num_pixels
    flat = row * NUM_COMPONENTS * num_pixels
    m = tl.load(means + image * NUM_COMPONENTS + places, mask=mask, other=0)
    log_pi = _load_logweights(logweights + flat, flat_places, flat_mask, NUM_COMPONENTS, PADDED_COMPONENTS)
    x = tl.load(source + image + image_places, mask=image_mask, other=0)
    d = tl.load(offset + image + image_places, mask=image_mask, other=0)
    squared_norms = tl.sum(m * m, axis=1 - COMPONENT_AXIS)
    for i in range(length):
        state = states + (row * num_substeps + i) * NUM_CHANNELS * num_pixels
        tl.store(state + image_places, d, mask=image_mask)
        d = _substep(m, log_pi, squared_norms, x, d, coefficients + (row * num_substeps + i) * 6, COMPONENT_AXIS)
    tl.debug_barrier()  # other threads of the program may have stored what a thread loads below

    d_end = tl.load(grad + image + image_places, mask=image_mask, other=0)
    d_means = tl.zeros_like(m)
    d_source = tl.zeros_like(x)
    d_logweights = tl.zeros_like(squared_norms)
    d_norms = tl.zeros_like(squared_norms)
    for j in range(length):
        i = length - 1 - j
        coefficient = coefficients + (row * num_substeps + i) * 6
        logit_offset, logit_source = tl.load(coefficient + 3), tl.load(coefficient + 4)
        logit_norm = tl.load(coefficient + 5)
        state = states + (row * num_substeps + i) * NUM_CHANNELS * num_pixels
        d = tl.load(state + image_places, mask=image_mask, other=0)
        direction = logit_offset * d + logit_source * x
        weights = _weights(m, log_pi, squared_norms, direction, logit_norm, COMPONENT_AXIS)
        d_mean = tl.load(coefficient + 2) * d_end
        slope = tl.sum(m * tl.expand_dims(d_end, COMPONENT_AXIS), axis=1 - COMPONENT_AXIS)
        average = tl.sum(weights * slope, axis=0)
        d_logits = tl.load(coefficient + 2) * weights * (slope - average[None, :])
        d_direction = tl.sum(tl.expand_dims(d_logits, 1 - COMPONENT_AXIS) * m, axis=COMPONENT_AXIS)

        d_means += tl.expand_dims(weights, 1 - COMPONENT_AXIS) * tl.expand_dims(d_mean, COMPONENT_AXIS)
        d_means += tl.expand_dims(d_logits, 1 - COMPONENT_AXIS) * tl.expand_dims(direction, COMPONENT_AXIS)
        d_logweights += d_logits
        d_norms += logit_norm * d_logits
        d_source += tl.load(coefficient + 1) * d_end + logit_source * d_direction
        sums = grad_coefficients + (tl.program_id(0).to(tl.int64) * num_substeps + i) * 6
        tl.store(sums, _total(d_end * d))
        tl.store(sums + 1, _total(d_end * x))
        tl.store(sums + 2, tl.sum(average, axis=0))
        tl.store(sums + 3, _total(d_direction * d))
        tl.store(sums + 4, _total(d_direction * x))
        tl.store(sums + 5, _total(d_logits * squared_norms))
        d_end += tl.load(coefficient) * d_end + logit_offset * d_direction
    d_means += 2 * tl.expand_dims(d_norms, 1 - COMPONENT_AXIS) * m
    tl.store(grad_means + image * NUM_COMPONENTS + places, d_means, mask=mask)
    tl.store(grad_logweights + flat + flat_places, d_logweights, mask=flat_mask)
    tl.store(grad_source + image + image_places, d_source, mask=image_mask)
    tl.store(grad_offset + image + image_places, d_end, mask=image_mask)
