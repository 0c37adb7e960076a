"""FLUX.1: what has to be said of it beside the generic transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lakonlab.models.architecture.diffusers.transformer import DiffusersTransformer
from lakonlab.registry import MODULES

POSITIONS = {'img_ids': {'kind': 'image', 'width': 3}, 'txt_ids': {'kind': 'text', 'width': 3}}


@MODULES.register_module()
class FluxTransformer2DModel(DiffusersTransformer):
    """FLUX.1: latents (B, C, H, W) and time in [0, 1] to velocities; students give it a head.

    Args:
        patch_size: ``P``; latents are cut into tokens of ``C * P * P`` channels.
        in_channels: Channels of a token.
        out_channels: Channels of a predicted token; None for ``in_channels``.
        num_layers: Number of blocks with separate streams for text and image.
        num_single_layers: Number of blocks with one stream.
        attention_head_dim: Width of an attention head.
        num_attention_heads: Number of attention heads.
        joint_attention_dim: Width of the text tokens.
        pooled_projection_dim: Width of the pooled text embedding.
        guidance_embeds: Whether a guidance scale is embedded, as in FLUX.1-dev.
        axes_dims_rope: Widths of the rotary embedding's axes.
        head: See :class:`~lakonlab.models.architecture.diffusers.transformer.DiffusersTransformer`.
        **options: As there.
    """

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        head: Mapping[str, Any] | None = None,
        **options,
    ):
        transformer = {
            'type': 'FluxTransformer2DModel',
            'patch_size': 1,
            'in_channels': in_channels,
            'out_channels': in_channels if out_channels is None else out_channels,
            'num_layers': num_layers,
            'num_single_layers': num_single_layers,
            'attention_head_dim': attention_head_dim,
            'num_attention_heads': num_attention_heads,
            'joint_attention_dim': joint_attention_dim,
            'pooled_projection_dim': pooled_projection_dim,
            'guidance_embeds': guidance_embeds,
            'axes_dims_rope': tuple(axes_dims_rope),
        }
        options = {'lora_converter': 'FluxLoraLoaderMixin', 'positions': POSITIONS, **options}
        super().__init__(transformer=transformer, head=head, patch_size=patch_size, **options)
