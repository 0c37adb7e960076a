"""Policy heads: from the tokens of a transformer to the tensors that a policy is made of.

What all backbones share is here. They differ in how the rows of an output layer are ordered inside a token
(:data:`ROW_ORDERS`); the heads are described by small values that build layers, initialise them from a teacher's output
layer, and apply them. The layers themselves are children of the network, under their published names.

``B`` batch, ``L`` tokens, ``P`` patch size, ``K`` mixture components, ``N`` DX grid points or coefficients, ``C``
channels, ``D`` width of the transformer, ``H W`` image size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lakonlab.ops.random_source import RandomSource, TorchSource

#: ``patch_major``: rows (patch row, patch column, copy, channel), as in the DiT family.
#: ``channel_major``: rows (copy, channel, patch row, patch column), as in FLUX and Qwen-Image.
ROW_ORDERS = ('patch_major', 'channel_major')

INITIAL_STD = 0.05
TEACHER_BIAS_NOISE = 0.05
SCRATCH_BIAS_NOISE = 0.1


def cut_tokens(images: Tensor, patch_size: int, row_order: str) -> Tensor:
    """Cut (B, C, H, W) into tokens (B, L, C P P), in row-major order; the inverse of :func:`fold_tokens` for one copy.

    Args:
        images: Height and width are multiples of the patch size.
        patch_size: ``P``.
        row_order: Order of the entries of a token, see :data:`ROW_ORDERS`.
    """
    batch_size, channels, height, width = images.shape
    p = patch_size
    cells = images.reshape(batch_size, channels, height // p, p, width // p, p)
    order = (0, 2, 4, 1, 3, 5) if row_order == 'channel_major' else (0, 2, 4, 3, 5, 1)
    return cells.permute(order).reshape(batch_size, (height // p) * (width // p), channels * p * p)


def fold_tokens(tokens: Tensor, grid: tuple[int, int], patch_size: int, copies: int, row_order: str) -> Tensor:
    """Arrange the rows of all tokens as images.

    Args:
        tokens: Shape ``(B, L, copies * C * P * P)``, tokens in row-major order.
        grid: Number of token rows and columns.
        patch_size: ``P``.
        copies: ``K`` or ``N``.
        row_order: One of :data:`ROW_ORDERS`.

    Returns:
        Shape ``(B, copies, C, H, W)``.
    """
    h, w = grid
    p = patch_size
    if row_order == 'patch_major':
        images = tokens.reshape(-1, h, w, p, p, copies, tokens.shape[-1] // (p * p * copies))
        images = images.permute(0, 5, 6, 1, 3, 2, 4)
    else:
        images = tokens.reshape(-1, h, w, copies, tokens.shape[-1] // (p * p * copies), p, p)
        images = images.permute(0, 3, 4, 1, 5, 2, 6)
    return images.reshape(images.shape[0], copies, images.shape[2], h * p, w * p)


def split_rows(rows: Tensor, patch_size: int, row_order: str) -> Tensor:
    """View the rows of an output layer for one copy as ``(patch position, 1, C, ...)`` or ``(1, C, position, ...)``."""
    area = patch_size * patch_size
    if row_order == 'patch_major':
        return rows.reshape(area, 1, rows.shape[0] // area, *rows.shape[1:])
    return rows.reshape(1, rows.shape[0] // area, area, *rows.shape[1:])


def repeat_rows(rows: Tensor, copies: int, patch_size: int, row_order: str) -> Tensor:
    """Repeat every output channel of a layer ``copies`` times.

    Args:
        rows: Weight ``(C * P * P, D)`` or bias ``(C * P * P,)`` of the teacher's output layer.
        copies: ``K`` or ``N``.
        patch_size: ``P``.
        row_order: One of :data:`ROW_ORDERS`.

    Returns:
        The rows of a layer with ``copies`` times as many outputs.
    """
    split = split_rows(rows, patch_size, row_order)
    axis = 1 if row_order == 'patch_major' else 0
    return split.repeat_interleave(copies, dim=axis).reshape(copies * rows.shape[0], *rows.shape[1:])


def first_copy_only(rows: Tensor, copies: int, patch_size: int, row_order: str) -> Tensor:
    """Like :func:`repeat_rows`, with zeros in all copies but the first."""
    split = split_rows(rows, patch_size, row_order)
    axis = 1 if row_order == 'patch_major' else 0
    zeros = torch.zeros_like(split).repeat_interleave(copies - 1, dim=axis)
    return torch.cat([split, zeros], dim=axis).reshape(copies * rows.shape[0], *rows.shape[1:])


def spread_noise(noise: Tensor, patch_size: int, row_order: str) -> Tensor:
    """Give the same noise to all positions of a patch.

    Args:
        noise: Shape ``(K * C,)``.
        patch_size: ``P``.
        row_order: One of :data:`ROW_ORDERS`.

    Returns:
        Shape ``(K * C * P * P,)``, in the order of the output layer's rows.
    """
    area = patch_size * patch_size
    if row_order == 'patch_major':
        return noise.reshape(1, -1).expand(area, -1).reshape(-1)
    return noise.reshape(-1, 1).expand(-1, area).reshape(-1)


def make_logstd_layers(in_features: int, inner_features: int, num_layers: int) -> nn.Sequential:
    """Layers from the conditioning embedding to one log standard deviation per sample."""
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.SiLU(), nn.Linear(in_features, inner_features)]
        in_features = inner_features
    return nn.Sequential(*layers, nn.SiLU(), nn.Linear(in_features, 1))


@torch.no_grad()
def init_logstd_layers(layers: nn.Sequential) -> None:
    """Start from a constant standard deviation of 0.05: hidden layers Xavier uniform, last layer constant."""
    *hidden, last = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in hidden:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, math.log(INITIAL_STD))


def logstds_of(layers: nn.Sequential | None, constant: float | None, condition: Tensor) -> Tensor:
    """One log standard deviation per sample, shape ``(B, 1, 1, 1, 1)``, float32.

    The condition embedding ``(B, D)`` gets no gradient from it.
    """
    if constant is not None:
        return torch.full((condition.shape[0], 1, 1, 1, 1), constant, dtype=torch.float32, device=condition.device)
    last = layers[-1]
    value = layers(condition.detach().to(last.weight.dtype))
    return value.float().reshape(-1, 1, 1, 1, 1)


@dataclass(frozen=True)
class MixtureHead:
    """Head of a Gaussian mixture policy: K means and weights per pixel, one standard deviation per sample.

    Args:
        num_gaussians: ``K``.
        channels: ``C``.
        patch_size: ``P``, pixels per side that one token stands for.
        row_order: One of :data:`ROW_ORDERS`.
        constant_logstd: Fixed log standard deviation; None to predict it.
    """

    num_gaussians: int
    channels: int
    patch_size: int
    row_order: str
    constant_logstd: float | None = None

    def layers(self, in_features: int, condition_features: int, inner_features: int, num_logstd_layers: int):
        """Make the layers, by the names they have in the network.

        Args:
            in_features: Width of the tokens.
            condition_features: Width of the conditioning embedding.
            inner_features: Width of the hidden layers for the standard deviation.
            num_logstd_layers: How many layers there are for the standard deviation.
        """
        area = self.patch_size * self.patch_size
        layers: dict[str, nn.Module] = {
            'proj_out_means': nn.Linear(in_features, self.num_gaussians * self.channels * area),
            'proj_out_logweights': nn.Linear(in_features, self.num_gaussians * area),
        }
        if self.constant_logstd is None:
            layers['proj_out_logstds'] = make_logstd_layers(condition_features, inner_features, num_logstd_layers)
        return layers

    @torch.no_grad()
    def init(self, network: nn.Module, source: RandomSource | None = None) -> None:
        """Initialise the layers for training from scratch: distinct constant means, equal weights."""
        for layer in (network.proj_out_means, network.proj_out_logweights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        network.proj_out_means.bias += SCRATCH_BIAS_NOISE * self.bias_noise(network.proj_out_means.bias, source)
        if self.constant_logstd is None:
            init_logstd_layers(network.proj_out_logstds)

    def from_output_layer(
        self,
        state: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        output_layer: str,
        source: RandomSource | None = None,
    ) -> dict[str, Tensor]:
        """Replace a teacher's output layer by this head: every mean is the teacher's prediction, slightly apart.

        Args:
            state: The teacher's tensors.
            own: The student's tensors, for what the teacher does not determine.
            output_layer: Name of the teacher's output layer.
            source: Random source of the noise on the means' biases.

        Returns:
            The tensors of the student. If ``state`` is already one of a student, it is returned as it is.
        """
        if f'{output_layer}.weight' not in state or any(name.startswith('proj_out_means.') for name in state):
            return dict(state)
        state = dict(state)
        weight = state.pop(f'{output_layer}.weight')
        bias = state.pop(f'{output_layer}.bias', weight.new_zeros(len(weight)))  # some teachers have none
        state['proj_out_means.weight'] = repeat_rows(weight, self.num_gaussians, self.patch_size, self.row_order)
        bias = repeat_rows(bias, self.num_gaussians, self.patch_size, self.row_order)
        state['proj_out_means.bias'] = bias + TEACHER_BIAS_NOISE * self.bias_noise(bias, source)
        for name, tensor in own.items():
            if name.startswith('proj_out_logweights.'):
                state[name] = torch.zeros_like(tensor)
            elif name.startswith('proj_out_logstds.'):
                state[name] = tensor
        return state

    def bias_noise(self, like: Tensor, source: RandomSource | None = None) -> Tensor:
        """Standard normal noise for the biases ``like`` of the means, the same for all pixels of a patch."""
        count = like.numel() // (self.patch_size * self.patch_size)
        noise = (source or TorchSource()).normal('head_bias', (count,))  # on the CPU: the same on every device
        return spread_noise(noise, self.patch_size, self.row_order).to(like)

    def __call__(
        self, network: nn.Module, tokens: Tensor, condition: Tensor, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Apply the layers.

        Args:
            network: Owner of the layers.
            tokens: Shape ``(B, L, D)``.
            condition: Conditioning embedding, shape ``(B, condition_features)``.
            grid: Number of token rows and columns.

        Returns:
            ``means (B, K, C, H, W)``, ``logweights (B, K, 1, H, W)`` with the weights of a pixel summing to one,
            ``logstds (B, 1, 1, 1, 1)``.
        """
        means = network.proj_out_means(tokens.to(network.proj_out_means.weight.dtype))
        logits = network.proj_out_logweights(tokens.to(network.proj_out_logweights.weight.dtype))
        means = fold_tokens(means, grid, self.patch_size, self.num_gaussians, self.row_order)
        logits = fold_tokens(logits, grid, self.patch_size, self.num_gaussians, self.row_order)
        layers = getattr(network, 'proj_out_logstds', None)
        return {
            'means': means,
            'logweights': logits.float().log_softmax(dim=1),
            'logstds': logstds_of(layers, self.constant_logstd, condition),
        }


@dataclass(frozen=True)
class GridHead:
    """Head of a DX policy: the widened output layer of the teacher, N predictions side by side.

    Args:
        num_points: ``N``, grid points or polynomial coefficients.
        patch_size: ``P``.
        row_order: One of :data:`ROW_ORDERS`.
        polynomial: Whether the N predictions are coefficients, of which only the first starts as the teacher's.
    """

    num_points: int
    patch_size: int
    row_order: str
    polynomial: bool = False

    def from_output_layer(self, state: Mapping[str, Tensor], output_layer: str, num_rows: int) -> dict[str, Tensor]:
        """Widen a teacher's output layer.

        Args:
            state: The teacher's tensors.
            output_layer: Name of the output layer of teacher and student.
            num_rows: Rows of the student's output layer.

        Returns:
            The tensors of the student. If ``state`` is already one of a student, it is returned as it is.
        """
        state = dict(state)
        widen = first_copy_only if self.polynomial else repeat_rows
        for name in (f'{output_layer}.weight', f'{output_layer}.bias'):
            if name in state and state[name].shape[0] * self.num_points == num_rows:
                state[name] = widen(state[name], self.num_points, self.patch_size, self.row_order)
        return state

    def __call__(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Arrange the output layer's result ``(B, L, rows)`` as ``(B, N, C, H, W)``."""
        return fold_tokens(rows, grid, self.patch_size, self.num_points, self.row_order)


def require_positive(**values: int) -> None:
    """Raise ValueError, naming the argument, for a count that is not a positive integer."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f'{name}={value!r}: expected a positive integer')
