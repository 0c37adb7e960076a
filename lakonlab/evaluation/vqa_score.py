"""VQAScore (Lin et al., 2024): how likely a model that answers questions says that an image shows its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from lakonlab.evaluation.clip_t5 import CLIP_MEAN, CLIP_STD, ClipT5
from lakonlab.evaluation.hub_models import SETTING_SUFFIXES, digest_of, hub_name, loaded_whole
from lakonlab.evaluation.preparation import as_rgb
from lakonlab.evaluation.prompt_scorer import PromptMetric, PromptScorer
from lakonlab.registry import METRICS, PROMPT_SCORERS

SYSTEM = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = 'Yes'
IGNORED = -100


@PROMPT_SCORERS.register_module()
class ClipT5Scorer(PromptScorer):
    """Probability that CLIP-FlanT5 answers a question about an image and a prompt with yes.

    Args:
        weights: Folder or repository of the model: T5 with a projection of image features.
        tokenizer: Folder or repository of its tokenizer.
        vision: Folder or repository of the CLIP that looks at images, with its image processor.
        torch_dtype: Dtype of the weights.
        question: Question, with ``{}`` in place of the prompt.
        answer: Answer whose probability is the score.
        max_length: Most tokens of a question.

    Raises:
        OSError: Weights cannot be had.
        ValueError: They are of another model.
    """

    def __init__(
        self,
        weights: str = 'huggingface://zhiqiulin/clip-flant5-xxl',
        tokenizer: str = 'huggingface://google/flan-t5-xxl',
        vision: str = 'huggingface://openai/clip-vit-large-patch14-336',
        torch_dtype: str = 'bfloat16',
        question: str = QUESTION,
        answer: str = ANSWER,
        max_length: int = 2048,
    ):
        super().__init__()
        from transformers import AutoTokenizer, CLIPVisionModel

        if question.count('{}') != 1:
            raise ValueError(f'ClipT5Scorer.question={question!r}: expected one {{}} in place of the prompt')
        dtype = getattr(torch, torch_dtype)
        self.net: nn.Module = loaded_whole(ClipT5, hub_name(weights), 'ClipT5Scorer.weights', dtype=dtype)
        self.vision: nn.Module = loaded_whole(CLIPVisionModel, hub_name(vision), 'ClipT5Scorer.vision', dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(hub_name(tokenizer))
        self.question, self.answer, self.max_length, self.torch_dtype = question, answer, max_length, torch_dtype
        self.size = self.vision.config.image_size
        self.digests = [digest_of(hub_name(weights), self.net), digest_of(hub_name(vision), self.vision)]
        self.tokenizer_hash = digest_of(hub_name(tokenizer), self.tokenizer, SETTING_SUFFIXES)
        self.register_buffer('mean', torch.tensor(CLIP_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(CLIP_STD).reshape(3, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise images, pad them to squares with what is then 0, and resize them.

        Args:
            images: Shape (B, 1 or 3, H, W), float in [0, 1].

        Returns:
            Shape (B, 3, size, size).
        """
        images = (as_rgb(images).float() - self.mean) / self.std
        height, width = images.shape[-2:]
        side = max(height, width)
        below, right = side - height, side - width
        square = F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))
        if side == self.size:
            return square
        return F.interpolate(square, (self.size, self.size), mode='bicubic', align_corners=False, antialias=True)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        dtype = self.net.dtype
        states = self.vision(self.prepare(images).to(dtype), output_hidden_states=True).hidden_states
        # the state before the last layer, without the class token, as LLaVA has it
        pictures = self.net.mm_projector(states[self.net.config.mm_vision_select_layer][:, 1:])
        embedded = [self._embedded(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
        length = max(len(part) for part in embedded)
        inputs = torch.stack([F.pad(part, (0, 0, 0, length - len(part))) for part in embedded])
        mask = torch.stack([torch.arange(length, device=inputs.device) < len(part) for part in embedded])
        labels = torch.tensor([self.tokenizer(self.answer).input_ids] * len(prompts), device=inputs.device)
        logits = self.net(inputs_embeds=inputs, attention_mask=mask.long(), labels=labels).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction='none')
        return (-losses.reshape(labels.shape).mean(dim=1)).exp()

    def _embedded(self, prompt: str, picture: Tensor) -> Tensor:
        """The question about an image as states (T, D), those of the image in the place where it is shown."""
        before, after = f'{SYSTEM} USER: ', f'\n{self.question.replace("{}", prompt)} ASSISTANT: '
        # each part ends with the token that ends texts, as the model was trained
        parts = [self.tokenizer(text, verbose=False).input_ids for text in (before, after)]
        parts[1] = parts[1][: self.max_length - len(parts[0]) - 1]
        first, second = (
            self.net.get_input_embeddings()(torch.tensor(tokens, device=picture.device)) for tokens in parts
        )
        return torch.cat([first, picture, second])

    def protocol(self) -> dict[str, Any]:
        return dict(
            name='CLIP-T5',
            weights_sha256=self.digests,
            tokenizer_sha256=self.tokenizer_hash,
            dtype=self.torch_dtype,
            question=self.question,
            answer=self.answer,
            images=f'padded to a square, {self.size} x {self.size}, bicubic, antialiased',
        )


@METRICS.register_module()
class VQAScore(PromptMetric):
    """Mean probability that a model says that the image shows its prompt.

    Args:
        scorer: Arguments of :class:`ClipT5Scorer`; with ``type``, of another scorer of prompts.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    number = 'vqascore'

    def __init__(self, scorer: dict[str, Any] | None = None, prefix: str = ''):
        super().__init__({'type': 'ClipT5Scorer', **(scorer or {})}, prefix)
