"""What a source of prompts tells of one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and what belongs to it."""

    prompt: str
    """Its text, which is the name of the sample."""
    conditions: dict[str, Any]
    """``prompt_embed_kwargs``, tensors without batch dimension, or ``prompt_kwargs``, for the text encoder."""
    sample_size: tuple[int, ...] | None = None
    """Frames if any, height and width of the sample in pixels; None if it is not said."""
    latents: Tensor | None = None
    """Latents of the image, float."""
    latent_size: tuple[int, ...] | None = None
    """Shape of the latents; None if it is not said."""
    condition_latents: Tensor | None = None
    """Latents of the image to be edited, float."""
