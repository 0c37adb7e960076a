"""Real handwritten digits: the 1,797 images of 8x8 pixels that ship with scikit-learn, scaled to [-1, 1].

They are the test part of the "Optical Recognition of Handwritten Digits" data set (Alpaydin & Kaynak, 1998). A fixed
fifth of each class is held out as the split ``val``; nothing is trained on it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lakonlab.datasets.noise import seeded_noise
from lakonlab.registry import DATASETS

NUM_CLASSES = 10
HELD_OUT_PERIOD = 5
SPLITS = ('train', 'val')


@lru_cache(maxsize=2)
def load_split(split: str) -> tuple[Tensor, Tensor]:
    """Read one split of the digits.

    Every fifth image of each class is held out, so the classes are represented alike in both splits. The images come
    writer after writer, so both splits also hold the same hands.

    Args:
        split: ``'train'`` or ``'val'``.

    Returns:
        Images, shape (N, 1, 8, 8), float32 in [-1, 1]; labels, shape (N,), int64 in 0..9.

    Raises:
        ValueError: There is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f'Digits has no split {split!r}; expected one of {", ".join(map(repr, SPLITS))}')
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    rank_in_class = np.zeros(len(labels), dtype=np.int64)
    for label in range(NUM_CLASSES):
        members = labels == label
        rank_in_class[members] = np.arange(members.sum())
    held_out = rank_in_class % HELD_OUT_PERIOD == HELD_OUT_PERIOD - 1
    chosen = held_out if split == 'val' else ~held_out
    images = torch.from_numpy(digits.images[chosen].astype(np.float32) / 8 - 1).unsqueeze(1)
    return images, torch.from_numpy(labels[chosen])


@DATASETS.register_module()
class Digits(Dataset):
    """Handwritten digits for training, or labelled noise for sampling.

    Args:
        split: ``'train'`` (1,442 images) or ``'val'`` (the 355 held-out ones).
        negative_label: Label that stands for "no class" in guidance and label dropout; None to leave it out.
        latent_size: Shape (C, H, W) of one sample; the pixels are the latents, so only (1, 8, 8) has images.
        test_mode: If True, items hold noise to start sampling from, and class labels in turn, instead of images.
        num_test_images: Number of items in test mode, independent of the number of images.

    Raises:
        ValueError: Unknown split, non-positive ``num_test_images``, or a ``latent_size`` the images do not have.
    """

    def __init__(
        self,
        split: str = 'train',
        negative_label: int | None = NUM_CLASSES,
        latent_size: tuple[int, int, int] = (1, 8, 8),
        test_mode: bool = False,
        num_test_images: int = 2000,
    ):
        if split not in SPLITS:
            raise ValueError(f'split={split!r}: expected one of {", ".join(map(repr, SPLITS))}')
        if num_test_images < 1:
            raise ValueError(f'num_test_images={num_test_images}: expected a positive number of samples')
        if not test_mode and tuple(latent_size) != (1, 8, 8):
            raise ValueError(f'latent_size={tuple(latent_size)}: the digits have shape (1, 8, 8)')
        self.split = split
        self.negative_label = negative_label
        self.latent_size = tuple(latent_size)
        self.test_mode = test_mode
        self.num_test_images = num_test_images

    def __len__(self) -> int:
        return self.num_test_images if self.test_mode else len(load_split(self.split)[1])

    def __getitem__(self, index: int) -> dict:
        """Return one item.

        Args:
            index: Number of the item, ``0 <= index < len(self)``.

        Returns:
            ``ids`` int, ``name`` str, ``labels`` and ``negative_labels`` int64 scalars, and ``latents`` (training) or
            ``noise`` (test mode), float32 of shape ``latent_size``.

        Raises:
            IndexError: ``index`` is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'item {index} of a Digits data set of {len(self)}')
        if self.test_mode:
            label = torch.tensor(index % NUM_CLASSES)
            item = dict(noise=seeded_noise(index + 1000, self.latent_size))
        else:
            images, labels = load_split(self.split)
            label = labels[index]
            item = dict(latents=images[index])
        item.update(ids=index, labels=label, name=str(int(label)))
        if self.negative_label is not None:
            item['negative_labels'] = torch.tensor(self.negative_label)
        return item
