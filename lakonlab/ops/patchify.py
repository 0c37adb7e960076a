"""Trading resolution for channels, as latents of patch-wise models do."""

from __future__ import annotations

from torch import Tensor


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Move patches of pixels into the channels.

    Args:
        x: (B, C, H, W) or (B, C, T, H, W); spatial (and temporal) sizes divisible by ``patch_size``.
        patch_size: Length p of a patch side, in every spatial dimension and in time.

    Returns:
        (B, C * p * p, H / p, W / p), or (B, C * p * p * p, T / p, H / p, W / p); channel-major, then the position in
        the patch in the order of the dimensions.
    """
    if patch_size == 1:
        return x
    num_dims = x.dim() - 2
    sizes = [size // patch_size for size in x.shape[2:]]
    split = x.reshape(*x.shape[:2], *[n for size in sizes for n in (size, patch_size)])
    outer, inner = range(2, 2 + 2 * num_dims, 2), range(3, 3 + 2 * num_dims, 2)
    return split.permute(0, 1, *inner, *outer).reshape(x.shape[0], -1, *sizes)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """The inverse of :func:`patchify`."""
    if patch_size == 1:
        return x
    num_dims = x.dim() - 2
    channels = x.shape[1] // patch_size**num_dims
    split = x.reshape(x.shape[0], channels, *[patch_size] * num_dims, *x.shape[2:])
    order = [axis for i in range(num_dims) for axis in (2 + num_dims + i, 2 + i)]
    return split.permute(0, 1, *order).reshape(x.shape[0], channels, *[size * patch_size for size in x.shape[2:]])
