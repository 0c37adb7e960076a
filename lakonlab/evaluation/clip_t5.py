"""T5 that reads projected image features among its tokens, in the layout of the published CLIP-FlanT5."""

from __future__ import annotations

from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipT5Config(T5Config):
    """T5 with ``mm_hidden_size``, the dimension of image features, and ``mm_vision_select_layer``, where they are from.

    Args:
        mm_hidden_size: Dimension of image features.
        mm_vision_select_layer: Which of the hidden states of the vision model they are.
        **kwargs: Of T5.
    """

    model_type = 'clip_t5'
    mm_hidden_size: int = 1024
    mm_vision_select_layer: int = -2


class ClipT5(T5ForConditionalGeneration):
    """T5 with a projection of image features, two linear layers.

    Published files also hold a second copy of the embeddings, and may hold the vision model, which is loaded by itself.

    Args:
        config: Its configuration.
    """

    config_class = ClipT5Config
    _keys_to_ignore_on_load_unexpected = (
        r'^embed_tokens\.',
        r'^vision_tower\.',
        *(T5ForConditionalGeneration._keys_to_ignore_on_load_unexpected or ()),
    )

    def __init__(self, config: ClipT5Config):
        super().__init__(config)
        self.mm_projector = nn.Sequential(
            nn.Linear(config.mm_hidden_size, config.d_model), nn.GELU(), nn.Linear(config.d_model, config.d_model)
        )
        self.post_init()
