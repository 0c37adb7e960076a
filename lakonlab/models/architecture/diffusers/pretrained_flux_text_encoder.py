"""The text encoders of FLUX.1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lakonlab.models.architecture.diffusers.pretrained_text_encoder import PretrainedTextEncoder
from lakonlab.registry import MODULES


@MODULES.register_module()
class PretrainedFluxTextEncoder(PretrainedTextEncoder):
    """CLIP for the pooled embedding, T5 for the tokens, which are always padded to ``max_sequence_length``.

    Args:
        model_name_or_path: Folder of a FLUX.1 pipeline, or repository of the hub.
        **options: See :class:`~lakonlab.models.architecture.diffusers.pretrained_text_encoder.PretrainedTextEncoder`.
    """

    pipeline_type = 'FluxPipeline'
    encoders = ('text_encoder', 'text_encoder_2')
    tokenizers = ('tokenizer', 'tokenizer_2')
    published_parameters = 4_885_371_136  # T5 v1.1 XXL's encoder and CLIP ViT-L's

    def __init__(self, model_name_or_path: str = 'black-forest-labs/FLUX.1-dev', **options):
        super().__init__(model_name_or_path, **options)

    def encode(self, prompt: list[str], prompt_2: list[str] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, T, D) and ``pooled_projections`` (B, D')."""
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt, prompt_2, device=self.device, max_sequence_length=self.max_sequence_length, **kwargs
        )
        return {'encoder_hidden_states': tokens, 'pooled_projections': pooled}
