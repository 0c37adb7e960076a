"""The text encoder of Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from lakonlab.models.architecture.diffusers.pretrained_text_encoder import PretrainedTextEncoder
from lakonlab.registry import MODULES


@MODULES.register_module()
class PretrainedQwenImageTextEncoder(PretrainedTextEncoder):
    """Qwen2.5-VL, of whose states those of the prompt are kept, with a mask of what is padding.

    Args:
        model_name_or_path: Folder of a Qwen-Image pipeline, or repository of the hub.
        pad_seq_len: Length to pad to, with zeros that the mask excludes; None for the longest prompt of the batch.
        **options: See :class:`~lakonlab.models.architecture.diffusers.pretrained_text_encoder.PretrainedTextEncoder`.

    Raises:
        ValueError: ``pad_seq_len`` is less than ``max_sequence_length``.
    """

    pipeline_type = 'QwenImagePipeline'
    encoders = ('text_encoder',)
    tokenizers = ('tokenizer',)
    published_parameters = 8_292_166_656  # Qwen2.5-VL 7B

    def __init__(self, model_name_or_path: str = 'Qwen/Qwen-Image', pad_seq_len: int | None = None, **options):
        super().__init__(model_name_or_path, **options)
        if pad_seq_len is not None and pad_seq_len < self.max_sequence_length:
            raise ValueError(
                f'pad_seq_len={pad_seq_len} is less than max_sequence_length={self.max_sequence_length}: prompts may '
                'be longer than what they are padded to'
            )
        self.pad_seq_len = pad_seq_len

    def encode(self, prompt: list[str], **kwargs: Any) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, T, D) and ``encoder_hidden_states_mask`` (B, T), int64."""
        tokens, mask = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.max_sequence_length, **kwargs
        )
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        missing = 0 if self.pad_seq_len is None else self.pad_seq_len - tokens.shape[1]
        return {
            'encoder_hidden_states': F.pad(tokens, (0, 0, 0, missing)),
            'encoder_hidden_states_mask': F.pad(mask.long(), (0, missing)),
        }
