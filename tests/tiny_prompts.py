"""A data set of a few prompts, for configs of text-to-image runs in tests (``custom_imports``)."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from lakonlab.registry import DATASETS

PROMPTS = ('a small house', 'two red apples on a table', 'the sea at night', 'a photo of a brown bear')


@DATASETS.register_module()
class TinyPrompts(Dataset):
    """Prompts with random latents, or with noise to sample from.

    Args:
        latent_size: Size of the latents, (C, H, W).
        negative: Whether items have a negative prompt.
        test_mode: Whether items have noise instead of latents.
    """

    def __init__(self, latent_size=(4, 4, 6), negative: bool = False, test_mode: bool = False):
        self.latent_size, self.negative, self.test_mode = tuple(latent_size), negative, test_mode

    def __len__(self) -> int:
        return len(PROMPTS)

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        item = {
            'ids': index,
            'name': PROMPTS[index],
            'prompt_kwargs': {'prompt': PROMPTS[index]},
            'noise' if self.test_mode else 'latents': torch.randn(self.latent_size, generator=generator),
        }
        return {**item, 'negative_prompt_kwargs': {'prompt': ' '}} if self.negative else item
