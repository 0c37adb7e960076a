"""Policy heads that take the place of a transformer's output layer.

A transformer of the diffusers library ends in ``hidden = norm_out(hidden, condition)`` and
``output = proj_out(hidden)``. Its forward stays as it is; what changes is what ``proj_out`` is: a layer that answers
with all rows of a policy in one tensor ``(B, L, rows)``, so that whatever follows (unpatchifying, gathering) treats
them as channels. A mixture also needs the conditioning embedding, which :func:`hand_on_condition` lets ``norm_out``
hand on.

``B`` batch, ``L`` tokens, ``P`` patch size, ``K`` components, ``N`` DX points, ``C`` channels, ``H W`` image size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.heads import (
    SCRATCH_BIAS_NOISE,
    GridHead,
    MixtureHead,
    init_logstd_layers,
    make_logstd_layers,
    require_positive,
)
from lakonlab.ops.random_source import RandomSource

NORM, OUTPUT = 'norm_out', 'proj_out'
PARTS = ('means', 'logweights', 'logstds')


def hand_on_condition(norm: nn.Module) -> None:
    """Let a norm return ``(normalised, condition)`` instead of ``normalised``, without changing the norm."""
    norm.register_forward_hook(_with_condition, with_kwargs=True)


def _with_condition(norm: nn.Module, args: tuple, kwargs: Mapping[str, Tensor], result: Tensor):
    conditions = [*args[1:], *kwargs.values()]
    if len(conditions) != 1 or conditions[0].dim() != 2:
        found = ' and '.join(str(tuple(value.shape)) for value in conditions if isinstance(value, Tensor)) or 'nothing'
        raise TypeError(
            f'{type(norm).__name__} was called with {found} beside the tokens, expected the conditioning embedding '
            '(B, D); set constant_logstd for a transformer whose output norm has no such condition'
        )
    return result, conditions[0]


class MixtureLayer(nn.Module):
    """Output layer of a mixture policy: means, weights and one standard deviation per sample, side by side.

    Args:
        head: What it predicts.
        in_features: Width of the tokens.
        condition_features: Width of the conditioning embedding.
        inner_features: Width of the hidden layers for the standard deviation.
        num_logstd_layers: How many layers there are for the standard deviation.
    """

    def __init__(
        self, head: MixtureHead, in_features: int, condition_features: int, inner_features: int, num_logstd_layers: int
    ):
        super().__init__()
        self.head = head
        self.area = head.patch_size * head.patch_size
        self.patch_major = head.row_order == 'patch_major'
        self.constant_logstd = head.constant_logstd
        self.means = nn.Linear(in_features, head.num_gaussians * head.channels * self.area)
        self.logweights = nn.Linear(in_features, head.num_gaussians * self.area)
        self.logstds = None
        if head.constant_logstd is None:
            self.logstds = make_logstd_layers(condition_features, inner_features, num_logstd_layers)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Equal weights and a constant standard deviation; the means are left to the teacher's output layer."""
        nn.init.zeros_(self.logweights.weight)
        nn.init.zeros_(self.logweights.bias)
        if self.logstds is not None:
            init_logstd_layers(self.logstds)

    @torch.no_grad()
    def init_means(self) -> None:
        """Distinct constant means, for training without a teacher's output layer."""
        nn.init.zeros_(self.means.weight)
        self.means.bias.copy_(SCRATCH_BIAS_NOISE * self.head.bias_noise(self.means.bias))

    def forward(self, hidden: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Tokens ``(B, L, D)``, with the condition ``(B, D)`` beside them, to rows ``(B, L, rows)`` in float32."""
        tokens, condition = hidden if isinstance(hidden, tuple) else (hidden, None)
        means = self.means(tokens.to(self.means.weight.dtype))
        logits = self.logweights(tokens.to(self.logweights.weight.dtype))
        if self.logstds is None:
            logstds = means.new_full((len(means), 1, 1), self.constant_logstd, dtype=torch.float32)
        elif condition is None:
            raise TypeError('the output norm handed on no conditioning embedding: set constant_logstd')
        else:
            logstds = self.logstds(condition.detach().to(self.logstds[-1].weight.dtype)).float().reshape(-1, 1, 1)
        rows = [means, logits, logstds.expand(-1, means.shape[1], self.area)]
        dtype = torch.promote_types(torch.promote_types(means.dtype, logits.dtype), torch.float32)
        if not self.patch_major:
            return torch.cat([part.to(dtype) for part in rows], dim=-1)
        return torch.cat([part.to(dtype).unflatten(-1, (self.area, -1)) for part in rows], dim=-1).flatten(-2)


@dataclass(frozen=True)
class PlainOutput:
    """No policy: the transformer's own output layer, one prediction per pixel."""

    needs_condition = False

    def layer(self, output_layer: nn.Linear, condition_features: int) -> None:
        """The transformer keeps its own layer."""

    def published_part(self, name: str) -> str:
        """Published name of a part of the output layer, given its name below it."""
        return f'.{name}' if name else ''

    def from_output_layer(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor], output_layer: str, source=None):
        """Nothing to convert."""
        return dict(state)

    def unpack(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` as it is."""
        return images


@dataclass(frozen=True)
class MixtureOutput:
    """Head of the GMFlow policy.

    Args:
        head: Mixture per pixel.
        logstd_inner_dim: Width of the hidden layers for the standard deviation.
        gm_num_logstd_layers: How many layers there are for it.
    """

    head: MixtureHead
    logstd_inner_dim: int = 1024
    gm_num_logstd_layers: int = 2

    @property
    def needs_condition(self) -> bool:
        """Whether the layer needs the conditioning embedding."""
        return self.head.constant_logstd is None

    def layer(self, output_layer: nn.Linear, condition_features: int) -> MixtureLayer:
        """Make the layer that replaces a transformer's output layer, on its device and in its dtype."""
        return MixtureLayer(
            self.head,
            output_layer.in_features,
            condition_features,
            self.logstd_inner_dim,
            self.gm_num_logstd_layers,
        )

    def published_part(self, name: str) -> str | None:
        """Published name of a part of the output layer, given its name below it: ``proj_out_means`` and so on."""
        return f'_{name}' if name else None

    def from_output_layer(
        self,
        state: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        output_layer: str,
        source: RandomSource | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`~lakonlab.models.architecture.heads.MixtureHead.from_output_layer`."""
        return self.head.from_output_layer(state, own, output_layer, source)

    def unpack(self, images: Tensor) -> dict[str, Tensor]:
        """Split ``(B, K (C + 1) + 1, H, W)`` into the tensors of a mixture, whose weights are normalised here.

        Returns:
            ``means (B, K, C, H, W)``, ``logweights (B, K, 1, H, W)``, ``logstds (B, 1, 1, 1, 1)``.
        """
        K, C = self.head.num_gaussians, self.head.channels
        means, logits, logstds = images.split([K * C, K, 1], dim=1)
        return {
            'means': means.unflatten(1, (K, C)),
            'logweights': logits.log_softmax(dim=1).unsqueeze(2),
            'logstds': logstds[..., :1, :1].unsqueeze(1),  # the same for all pixels
        }


@dataclass(frozen=True)
class GridOutput:
    """Head of the DX policy: the transformer's output layer, N times as wide.

    Args:
        head: Predictions per pixel.
    """

    head: GridHead
    needs_condition = False

    def layer(self, output_layer: nn.Linear, condition_features: int) -> nn.Linear:
        """Make the layer that replaces a transformer's output layer, on its device and in its dtype."""
        return nn.Linear(
            output_layer.in_features,
            output_layer.out_features * self.head.num_points,
            bias=output_layer.bias is not None,
        )

    def published_part(self, name: str) -> str:
        """Published name of a part of the output layer, given its name below it."""
        return f'.{name}' if name else ''

    def from_output_layer(
        self,
        state: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        output_layer: str,
        source: RandomSource | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`~lakonlab.models.architecture.heads.GridHead.from_output_layer`."""
        return self.head.from_output_layer(state, output_layer, own[f'{output_layer}.weight'].shape[0])

    def unpack(self, images: Tensor) -> Tensor:
        """``(B, N C, H, W)`` to ``(B, N, C, H, W)``."""
        return images.unflatten(1, (self.head.num_points, -1))


def mixture_output(
    channels: int,
    patch_size: int,
    row_order: str,
    num_gaussians: int = 16,
    constant_logstd: float | None = None,
    logstd_inner_dim: int = 1024,
    gm_num_logstd_layers: int = 2,
    logweights_channels: int | None = None,
) -> MixtureOutput:
    """Head of the GMFlow policy, from the arguments of published configs.

    Args:
        channels: ``C``.
        patch_size: ``P``.
        row_order: See :data:`~lakonlab.models.architecture.heads.ROW_ORDERS`.
        num_gaussians: ``K``.
        constant_logstd: Fixed log standard deviation; None to predict it.
        logstd_inner_dim: Width of the hidden layers for the standard deviation.
        gm_num_logstd_layers: How many layers there are for it.
        logweights_channels: Weights per token and component; one per pixel, ``P * P``, is the only choice.

    Raises:
        ValueError: A count is not positive, or ``logweights_channels`` is not ``P * P``.
    """
    require_positive(num_gaussians=num_gaussians, gm_num_logstd_layers=gm_num_logstd_layers)
    if logweights_channels not in (None, patch_size * patch_size):
        raise ValueError(
            f'logweights_channels={logweights_channels}: expected {patch_size * patch_size}, one weight per pixel of a '
            f'patch of {patch_size} x {patch_size}'
        )
    head = MixtureHead(num_gaussians, channels, patch_size, row_order, constant_logstd)
    return MixtureOutput(head, logstd_inner_dim, gm_num_logstd_layers)


def grid_output(
    channels: int, patch_size: int, row_order: str, n_grid: int | None = None, p_order: int | None = None
) -> GridOutput:
    """Head of the DX policy.

    Args:
        channels: ``C``.
        patch_size: ``P``.
        row_order: See :data:`~lakonlab.models.architecture.heads.ROW_ORDERS`.
        n_grid: ``N`` points of a grid.
        p_order: ``N`` coefficients of a polynomial; give this or ``n_grid``.

    Raises:
        ValueError: Both or none of them are given, or it is not positive.
    """
    if (n_grid is None) == (p_order is None):
        raise ValueError(f'give either n_grid or p_order, found n_grid={n_grid!r}, p_order={p_order!r}')
    num_points = p_order if n_grid is None else n_grid
    require_positive(**{'p_order' if n_grid is None else 'n_grid': num_points})
    return GridOutput(GridHead(num_points, patch_size, row_order, polynomial=n_grid is None))


#: ``head.type`` -> what makes the head from the other arguments.
HEADS = {'GMFlow': mixture_output, 'DX': grid_output}


def build_head(
    head: Mapping[str, Any] | None, channels: int, patch_size: int, row_order: str
) -> PlainOutput | MixtureOutput | GridOutput:
    """The head that a config describes.

    Args:
        head: ``dict(type=<one of HEADS>, ...)``; None for the transformer's own output.
        channels: ``C``.
        patch_size: ``P``.
        row_order: See :data:`~lakonlab.models.architecture.heads.ROW_ORDERS`.

    Raises:
        ValueError: The type or an argument is unknown.
    """
    if head is None:
        return PlainOutput()
    options = dict(head)
    kind = options.pop('type', None)
    if kind not in HEADS:
        raise ValueError(f'head.type={kind!r}: expected one of {", ".join(HEADS)}')
    known = list(inspect.signature(HEADS[kind]).parameters)[3:]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f'; did you mean {near[0]!r}?' if near else f'; it has {", ".join(known)}'
            raise ValueError(f'head.{name}: no argument of a head of type {kind!r}{hint}')
    return HEADS[kind](channels, patch_size, row_order, **options)
