"""Text-to-image generation in the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from lakonlab.models.base_diffusion import BaseDiffusionTrainConfig
from lakonlab.models.latent_diffusion import Conditions, LatentDiffusion
from lakonlab.models.section import at_least
from lakonlab.ops.random_source import RandomSource
from lakonlab.ops.shapes import batch_size_of, map_batch
from lakonlab.registry import MODELS, MODULES


@dataclass(kw_only=True)
class TextImageTrainConfig(BaseDiffusionTrainConfig):
    """Keys of ``train_cfg`` that text-to-image training reads."""

    distilled_guidance_scale: float | None = None
    """Guidance scale that the student is told, where it has guidance embedded, as FLUX.1-dev."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, 'distilled_guidance_scale')


@MODELS.register_module()
class LatentDiffusionTextImage(LatentDiffusion):
    """A text-to-image model. See :class:`LatentDiffusion` for batches and arguments.

    A batch also holds ``prompt_embed_kwargs``, the arguments of the network as tensors with B rows
    (``encoder_hidden_states`` (B, T, D) and what belongs to it), or ``prompt_kwargs``, the arguments of the text
    encoder (``prompt``, B texts); and the same with ``negative_`` before their names where guidance needs them.

    Args:
        *args: See :class:`BaseDiffusion`.
        text_encoder: Config of the text encoder; None if batches bring embeddings.
        **kwargs: See :class:`BaseDiffusion`.
    """

    train_cfg_class = TextImageTrainConfig
    negative_hint = (
        'the batch must hold negative_prompt_embed_kwargs, or negative_prompt_kwargs for the text encoder; set '
        'negative_prompt_embeds_path, a file that tools/cache_negative_prompt.py makes, or negative_prompt_kwargs in '
        'the dataset'
    )

    def __init__(self, *args, text_encoder: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.text_encoder = MODULES.build(text_encoder) if text_encoder is not None else None
        if self.text_encoder is not None:
            self.text_encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LatentDiffusionTextImage:
        """See the base class; the text encoder is always in evaluation mode."""
        super().train(mode)
        if getattr(self, 'text_encoder', None) is not None:
            self.text_encoder.eval()
        return self

    def conditions_of(self, data: Mapping[str, Any], needs_negative: bool) -> Conditions:
        """Embedded prompts of a batch."""
        positive = self._embed(data, '')
        if positive is None:
            raise ValueError(
                f'the batch holds neither prompt_embed_kwargs nor prompt_kwargs to condition on, only {sorted(data)}'
            )
        negative = self._embed(data, 'negative_') if needs_negative else None
        if negative is None:
            return Conditions(positive, None)
        return Conditions(*_of_equal_length(positive, negative))

    @torch.no_grad()
    def _embed(self, data: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
        embedded = data.get(f'{prefix}prompt_embed_kwargs')
        if embedded is None:
            prompts = data.get(f'{prefix}prompt_kwargs')
            if prompts is None:
                return None
            if self.text_encoder is None:
                raise ValueError(
                    f'the batch holds {prefix}prompt_kwargs, but the model has no text encoder: set '
                    'model.text_encoder, or let the data bring embeddings'
                )
            embedded = self.text_encoder(**prompts)
        device = self.device
        return map_batch(lambda value: value.to(device) if isinstance(value, Tensor) else value, dict(embedded))

    def teacher_guidance(self) -> tuple[float | None, dict[str, Any]]:
        """See the base class; the embedded guidance scale is a condition here, not part of sampling."""
        scale, section = super().teacher_guidance()
        section.pop('distilled_guidance_scale', None)
        return scale, section

    def training_conditions(
        self, conditions: Conditions, data: Mapping[str, Any], source: RandomSource
    ) -> tuple[dict[str, Any], Conditions]:
        """Both are told the prompts, and each its own embedded guidance scale."""
        section = self.train_section
        student = with_distilled_guidance(conditions, section.distilled_guidance_scale)
        scale = section.teacher_section().get('distilled_guidance_scale')
        return student.positive, with_distilled_guidance(conditions, scale)

    def sampling_conditions(self, conditions: Conditions, cfg: Any, batch_size: int) -> Conditions:
        """See the base class; adds the embedded guidance scale."""
        return with_distilled_guidance(conditions, cfg.distilled_guidance_scale)


def with_distilled_guidance(conditions: Conditions, scale: float | None) -> Conditions:
    """Add the guidance scale that a network has embedded, ``guidance`` (B,) in float32; None adds nothing."""
    if scale is None:
        return conditions

    def add(arguments: dict[str, Any]) -> dict[str, Any]:
        device = next((value.device for value in arguments.values() if isinstance(value, Tensor)), None)
        return {**arguments, 'guidance': torch.full((batch_size_of(arguments),), float(scale), device=device)}

    positive, negative = conditions
    return Conditions(add(positive), None if negative is None else add(negative))


def _of_equal_length(first: dict[str, Any], second: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pad the text tokens of two batches to the longer one, with zeros and a mask that is zero there.

    Raises:
        ValueError: They differ in length and have no mask, or one has what the other lacks.
    """
    if first.keys() != second.keys():
        raise ValueError(
            f'prompts are embedded as {sorted(first)}, negative prompts as {sorted(second)}: embed both with the same '
            'text encoder (negative_prompt_embeds_path of the dataset names the embeddings of the latter)'
        )
    differ = [
        name
        for name, value in first.items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1:2] != second[name].shape[1:2]
    ]
    if not differ:
        return first, second
    if not any(name.endswith('_mask') for name in first):
        raise ValueError(
            f'{differ[0]} of prompts and negative prompts have {first[differ[0]].shape[1]} and '
            f'{second[differ[0]].shape[1]} tokens and no mask: embed both with the same length'
        )

    def pad(arguments: dict[str, Any], name: str) -> Tensor:
        value, length = arguments[name], max(first[name].shape[1], second[name].shape[1])
        return F.pad(value, (*(0, 0) * (value.dim() - 2), 0, length - value.shape[1]))

    padded = ({**arguments, **{name: pad(arguments, name) for name in differ}} for arguments in (first, second))
    return tuple(padded)
