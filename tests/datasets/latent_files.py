"""Caches of latents that no autoencoder made."""

from __future__ import annotations

import numpy as np
import torch

from lakonlab.datasets.latent_cache import MIRRORED, PLAIN
from lakonlab.datasets.latent_making import make_latent_cache


class GivenImages:
    """A list of images that do not exist; image ``n`` has label ``n % 1000``."""

    image_size = 256

    def __init__(self, count: int):
        self.paths = [f'n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG' for number in range(count)]
        self.labels = np.arange(count) % 1000

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """Digest of the list."""
        return f'{len(self)} images'


class GivenLatents:
    """Gives latents out as if it had encoded images; those of mirror images are the mirrored ones.

    Args:
        latents: (N, C, H, W).
    """

    def __init__(self, latents: torch.Tensor):
        self.latents, self.dtype, self.images = latents, latents.dtype, GivenImages(len(latents))

    @property
    def plan(self):
        """What the rows depend on."""
        return {'images_sha256': self.images.digest(), 'dtype': str(self.dtype).removeprefix('torch.')}

    def rows(self, numbers, flip):
        """Rows of a cache."""
        for number in numbers:
            columns = {PLAIN: self.latents[number]}
            yield {**columns, MIRRORED: self.latents[number].flip(-1)} if flip == 'both' else columns


def write_latents(folder, latents: torch.Tensor, flip: str = 'none', rows_per_shard: int = 4096) -> None:
    """Write a cache of given latents.

    Args:
        folder: Where to, local or a URL.
        latents: (N, C, H, W).
        flip: ``'both'`` or ``'none'``.
        rows_per_shard: Images of a shard.
    """
    make_latent_cache(
        GivenLatents(latents), str(folder), flip=flip, batch_size=256, rows_per_shard=rows_per_shard, plan={}
    )
