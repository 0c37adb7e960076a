"""A batch of generated images with all that metrics may ask about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lakonlab.evaluation.extractor import FeatureExtractor, Features
from lakonlab.evaluation.preparation import AS_THEY_ARE, Preparation


@dataclass
class SampleBatch:
    """Generated images and how they came about.

    Args:
        images: Shape (B, C, H, W), float in [0, 1].
        ids: Number of each sample in its data set.
        labels: Class each sample was asked to show, shape (B,), int64; None without classes.
        reference: Images to compare with one by one, shape of ``images``; None if no metric needs them.
        seconds: Wall time of generating the batch; None if it was not generated.
        feed_batch_size: Largest batch given to a feature extractor.
        warm_up: Whether ``seconds`` include what happens once, because the process made no samples before.
        prompts: Text each sample was asked to show; None without texts.
        flops: Floating-point operations of one sample; None where they were not counted.
        noise: Hash of the noise that each sample started from; None for one of which it is not known.
        phases: Parts of ``seconds``: of the network, and of the sampling loop beside it; None where not measured.
    """

    images: Tensor
    ids: list[int]
    labels: Tensor | None = None
    reference: Tensor | None = None
    seconds: float | None = None
    feed_batch_size: int = 512
    warm_up: bool = False
    prompts: list[str] | None = None
    flops: float | None = None
    noise: list[str | None] | None = None
    phases: Mapping[str, float] | None = None
    _features: dict[tuple[int, Preparation], Features] = field(default_factory=dict, repr=False)

    def features(self, extractor: FeatureExtractor, preparation: Preparation = AS_THEY_ARE) -> Features:
        """Features of the images, computed once however many metrics ask.

        Args:
            extractor: The network, on the device of the images.
            preparation: How images are brought to its size.

        Returns:
            Features of the batch.
        """
        key = id(extractor), preparation
        if key not in self._features:
            self._features[key] = extract(extractor, self.images, self.feed_batch_size, preparation)
        return self._features[key]


@torch.no_grad()
def extract(
    extractor: FeatureExtractor, images: Tensor, batch_size: int, preparation: Preparation = AS_THEY_ARE
) -> Features:
    """Run an extractor in parts of limited size.

    Args:
        extractor: The network; moved to the device of the images.
        images: Shape (B, C, H, W), float in [0, 1].
        batch_size: Largest part.
        preparation: How images are brought to its size.

    Returns:
        Features of all images; NaN for images that are not finite.
    """
    parts = [extractor.to(images.device)(preparation(part)) for part in images.split(batch_size)]
    embedding = torch.cat([part.embedding for part in parts])
    logits = None if parts[0].logits is None else torch.cat([part.logits for part in parts])
    broken = ~finite_rows(images)
    if broken.any():  # an extractor that quantises takes them for black ones
        embedding = embedding.masked_fill(broken[:, None], torch.nan)
        logits = None if logits is None else logits.masked_fill(broken[:, None], torch.nan)
    return Features(embedding, logits)


def finite_rows(tensor: Tensor) -> Tensor:
    """Which rows of a tensor (B, ...) have finite numbers only, shape (B,), bool."""
    return tensor.isfinite().flatten(1).all(dim=1)


def marked(images: Tensor) -> Tensor:
    """Images of which those that are not finite are NaN throughout, so that no step on the way makes them finite."""
    broken = ~finite_rows(images)
    return images.masked_fill(broken[:, None, None, None], torch.nan) if broken.any() else images


def real_images(batch: dict) -> Tensor:
    """The images of a batch of a data set.

    Args:
        batch: Has ``images`` in [0, 1], or pixels in [-1, 1] as ``latents`` of one or three channels.

    Returns:
        Shape (B, C, H, W), float in [0, 1].

    Raises:
        ValueError: The batch holds no images.
    """
    if 'images' in batch:
        return batch['images']
    latents = batch.get('latents')
    if latents is None or latents.shape[1] not in (1, 3):
        found = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
        raise ValueError(f'real images need a data set with images or pixels, not test_mode=True; found {found}')
    return latents / 2 + 0.5


def prompts_of(batch: dict) -> list[str] | None:
    """The prompts of a batch of a data set: ``name``, or ``prompt``; None if it has none."""
    for key in ('name', 'prompt'):
        texts = batch.get(key)
        if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
            return list(texts)
    return None


def captions_of(batch: SampleBatch) -> list[str]:
    """What a page of samples says about each: its prompt, or its class."""
    if batch.prompts is not None:
        return batch.prompts
    return [''] * len(batch.ids) if batch.labels is None else [f'class {label}' for label in batch.labels.tolist()]
