"""Qwen-Image: what has to be said of it beside the generic transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lakonlab.models.architecture.diffusers.transformer import DiffusersTransformer
from lakonlab.registry import MODULES


@MODULES.register_module()
class QwenImageTransformer2DModel(DiffusersTransformer):
    """Qwen-Image: latents (B, C, H, W) and time in [0, 1] to velocities; students give it a head.

    Args:
        patch_size: ``P``; latents are cut into tokens of ``C * P * P`` channels.
        in_channels: Channels of a token.
        out_channels: Channels of a predicted token.
        num_layers: Number of blocks.
        attention_head_dim: Width of an attention head.
        num_attention_heads: Number of attention heads.
        joint_attention_dim: Width of the text tokens.
        axes_dims_rope: Widths of the rotary embedding's axes.
        head: See :class:`~lakonlab.models.architecture.diffusers.transformer.DiffusersTransformer`.
        **options: As there; ``attend_to_padding=True`` treats padded text as published.
    """

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int = 64,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        head: Mapping[str, Any] | None = None,
        **options,
    ):
        transformer = {
            'type': 'QwenImageTransformer2DModel',
            'patch_size': 1,
            'in_channels': in_channels,
            'out_channels': out_channels,
            'num_layers': num_layers,
            'attention_head_dim': attention_head_dim,
            'num_attention_heads': num_attention_heads,
            'joint_attention_dim': joint_attention_dim,
            'axes_dims_rope': tuple(axes_dims_rope),
        }
        options = {
            'lora_converter': 'QwenImageLoraLoaderMixin',
            'positions': {'img_shapes': {'kind': 'image_shapes'}},
            'text_mask': 'encoder_hidden_states_mask',
            **options,
        }
        super().__init__(transformer=transformer, head=head, patch_size=patch_size, **options)
