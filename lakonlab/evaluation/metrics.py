"""Metrics of generated images.

A metric is fed batches of samples and computes named numbers. With its numbers it gives its *protocol*: how many images
it saw, through which features, against which reference, so that two numbers can be told to be comparable.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lakonlab.datasets.collate import collate
from lakonlab.evaluation.expected import Expected, at_least_two
from lakonlab.evaluation.extractor import ExtractorPool, FeatureExtractor, Features
from lakonlab.evaluation.frechet import Moments, frechet_distance
from lakonlab.evaluation.preparation import Preparation
from lakonlab.evaluation.samples import SampleBatch, extract, finite_rows, real_images
from lakonlab.phases import beat
from lakonlab.registry import DATASETS, METRICS


class Metric(ABC):
    """Base class of metrics.

    Class attributes: ``needs_reference``, whether batches must come with images to compare with one by one;
    ``needs_flops``, whether the operations of the first batch of samples must be counted; and ``better``, the numbers
    that tell which of two sets of weights is the better one -> ``'lower'`` or ``'higher'``.
    """

    needs_reference = False
    needs_flops = False
    better: Mapping[str, Literal['lower', 'higher']] = {}
    prefix = ''

    def __init__(self):
        self.reset()

    @classmethod
    def better_of(cls, arguments: Mapping[str, Any]) -> Mapping[str, str]:
        """What ``better`` of an object will be.

        Args:
            arguments: Those of its constructor.
        """
        return cls.better

    @property
    def title(self) -> str:
        """Name of the metric among those of an evaluation."""
        kind = type(self).__name__
        return f'{kind} ({self.prefix})' if self.prefix else kind

    def bind(self, extractors: ExtractorPool) -> None:  # noqa: B027 (most metrics need no network)
        """Get the networks this metric needs from a pool that other metrics share.

        Args:
            extractors: Where to build them.
        """

    def sources(self, extractors: ExtractorPool) -> dict[str, Any]:
        """The part of the protocol that tells files which can be replaced, and networks, as they are now.

        Before results are kept it is compared with what they are of; a metric whose networks take long to load leaves
        it out.

        Args:
            extractors: Where to build networks.

        Returns:
            Some of the items of :meth:`protocol`.
        """
        return {}

    def expect(self, samples: Expected) -> None:  # noqa: B027 (most metrics measure whatever comes)
        """See that the samples to come suffice, before any is made.

        Args:
            samples: What they will be.

        Raises:
            ValueError: They do not.
        """

    def prepare(self, tag: str) -> None:  # noqa: B027 (most metrics write nothing)
        """Get ready for an evaluation, before anything is sampled.

        Args:
            tag: Name of the weights that are evaluated.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all samples; what does not depend on them (networks, references) stays."""

    @abstractmethod
    def feed(self, batch: SampleBatch) -> None:
        """Take in samples.

        Args:
            batch: The samples; not kept.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers, of all samples since the last reset.

        Returns:
            Name -> value.
        """

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What must be equal for two values to be comparable.

        Returns:
            Plain data: number of images, features, reference.
        """


def build_metrics(configs: Iterable[Mapping[str, Any]], name: str) -> list[Metric]:
    """The metrics of an evaluation.

    Args:
        configs: Their configs.
        name: Of the evaluation, for messages.

    Raises:
        ValueError: Two of them would call their numbers the same.
    """
    metrics = [METRICS.build(dict(config)) for config in configs]
    titles = [metric.title for metric in metrics]
    repeated = sorted({title for title in titles if titles.count(title) > 1})
    if repeated:
        raise ValueError(
            f'{name}: metrics has {", ".join(repeated)} more than once, whose numbers would have the same names: give '
            'each a prefix of its own, or an entry of its own where it takes none'
        )
    return metrics


class FeatureMetric(Metric):
    """A metric of features.

    Attributes:
        num_broken: Samples whose features are not finite, because their pixels are not, or are far out of range; for
            subclasses that count them with :meth:`whole`.

    Args:
        extractor: Config of a feature extractor.
        resize: Resize images to the extractor's size, bicubically; if False, an extractor that resizes by itself does.
    """

    def __init__(self, extractor: Mapping[str, Any], resize: bool = True):
        super().__init__()
        self.extractor_config, self.resize = dict(extractor), resize
        self.extractor: FeatureExtractor | None = None
        self.preparation: Preparation | None = None

    def bind(self, extractors: ExtractorPool) -> None:
        self.extractor = extractors.build(self.extractor_config)
        self.preparation = Preparation(self.extractor.input_size if self.resize else None)

    def features(self, batch: SampleBatch) -> Features:
        """Features of a batch, of images that are prepared as the protocol says."""
        return batch.features(self.extractor, self.preparation)

    def sources(self, extractors: ExtractorPool) -> dict[str, Any]:
        self.bind(extractors)
        return dict(extractor=self.extractor.protocol())

    def protocol(self) -> dict[str, Any]:
        return dict(
            num_images=self.num_images,
            extractor=self.extractor.protocol(),
            preparation=self.preparation.protocol(),
        )

    def reset(self) -> None:
        self.num_images = 0
        self.num_broken = 0

    def whole(self, embedding: Tensor) -> Tensor:
        """The features that are finite; the others are counted, and make every number NaN.

        Args:
            embedding: Shape (B, D).

        Returns:
            Shape (at most B, D).
        """
        finite = finite_rows(embedding)
        self.num_broken += int((~finite).sum())
        return embedding[finite]


@METRICS.register_module()
class FrechetDistance(FeatureMetric):
    """Fréchet distance of features to those of real images (Heusel et al., 2017).

    Args:
        extractor: Config of a feature extractor.
        reference: Config of a data set of real images.
        resize: Resize images to the extractor's size, bicubically; if False, an extractor that resizes by itself does.
    """

    better = {'frechet_distance': 'lower'}

    def __init__(self, extractor: Mapping[str, Any], reference: Mapping[str, Any], resize: bool = True):
        super().__init__(extractor, resize)
        self.reference_config = dict(reference)
        self._real: Dataset | None = None
        self._reference: Moments | None = None
        self._reference_hash = ''

    def bind(self, extractors: ExtractorPool) -> None:
        """Get the network, and see that the data set has real images.

        Raises:
            ValueError: It has none, or there is no such data set.
        """
        super().bind(extractors)
        if self._real is not None:
            return
        try:
            real = DATASETS.build(dict(self.reference_config))
            if len(real) < 2:
                raise ValueError(f'it has {len(real)} images, expected at least 2')
            real_images(collate([real[0]]))
        except ValueError as error:
            raise ValueError(f'FrechetDistance.reference={self.reference_config}: {error}') from error
        self._real = real

    def expect(self, samples: Expected) -> None:
        at_least_two(samples, 'FrechetDistance')

    def reset(self) -> None:
        super().reset()
        self.moments = Moments()

    def feed(self, batch: SampleBatch) -> None:
        self.moments.update(self.whole(self.features(batch).embedding))
        _ = self.reference  # what is wrong with real images shows before all samples are made
        self.num_images += len(batch.ids)

    @property
    def reference(self) -> Moments:
        """Moments of the real images' features, computed at first use."""
        if self._reference is None:
            from lakonlab.datasets.loader import build_dataloader

            device = next((parameter.device for parameter in self.extractor.parameters()), torch.device('cpu'))
            moments, digest = Moments(), hashlib.sha256()
            progress = tqdm(
                total=len(self._real), desc='features of real images', unit='image', leave=False, disable=None
            )
            with progress:
                for batch in build_dataloader(self._real, 256):
                    images = real_images(batch)
                    digest.update(f'{tuple(images.shape[1:])}'.encode())
                    digest.update(images.float().contiguous().cpu().numpy().tobytes())
                    moments.update(extract(self.extractor, images.to(device), 256, self.preparation).embedding)
                    progress.update(len(images))
                    beat()
            self._reference, self._reference_hash = moments, digest.hexdigest()
        return self._reference

    def compute(self) -> dict[str, float]:
        if self.num_broken:
            return dict(frechet_distance=torch.nan)
        mine, real = self.moments, self.reference
        return dict(frechet_distance=frechet_distance(mine.mean(), mine.covariance(), real.mean(), real.covariance()))

    def protocol(self) -> dict[str, Any]:
        reference = dict(**self.reference_config, num_images=self.reference.count, images_sha256=self._reference_hash)
        return dict(**super().protocol(), reference=reference)


@METRICS.register_module()
class ClassAccuracy(FeatureMetric):
    """Fraction of samples that a classifier takes for the class they were asked to show.

    Args:
        extractor: Config of a feature extractor that classifies.
        resize: Resize images to the extractor's size, bicubically; if False, an extractor that resizes by itself does.
    """

    better = {'class_accuracy': 'higher'}

    def bind(self, extractors: ExtractorPool) -> None:
        """Get the network.

        Raises:
            ValueError: It does not classify.
        """
        super().bind(extractors)
        if self.extractor.classifies is False:
            raise ValueError(f'ClassAccuracy.extractor: {type(self.extractor).__name__} does not classify')

    def expect(self, samples: Expected) -> None:
        if not samples.has_labels:
            raise ValueError('ClassAccuracy needs samples with labels')

    def reset(self) -> None:
        super().reset()
        self._correct = 0

    def feed(self, batch: SampleBatch) -> None:
        if batch.labels is None:
            raise ValueError('ClassAccuracy needs samples with labels')
        logits = self.features(batch).logits
        if logits is None:
            raise ValueError(f'ClassAccuracy.extractor: {type(self.extractor).__name__} does not classify')
        is_right = logits.argmax(dim=1) == batch.labels.to(logits.device)
        self._correct += int((is_right & finite_rows(logits)).sum())
        self.num_images += len(batch.ids)

    def compute(self) -> dict[str, float]:
        return dict(class_accuracy=self._correct / self.num_images)


@METRICS.register_module()
class ReferenceRMSE(Metric):
    """Root mean squared difference, over pixels and samples, to reference images made from the same noise.

    Args:
        pixel_range: Width of the range in which the difference is measured: 2 for pixels in [-1, 1].
    """

    needs_reference = True
    better = {'reference_rmse': 'lower'}

    def __init__(self, pixel_range: float = 2.0):
        super().__init__()
        self.pixel_range = pixel_range

    def reset(self) -> None:
        self._sum, self._numel, self.num_images = 0.0, 0, 0

    def feed(self, batch: SampleBatch) -> None:
        if batch.reference is None:
            raise ValueError('ReferenceRMSE needs reference images: set reference_kwargs in the evaluation entry')
        difference = batch.images.double() - batch.reference.double()
        self._sum += difference.square().sum().item()
        self._numel += difference.numel()
        self.num_images += len(batch.ids)

    def compute(self) -> dict[str, float]:
        return dict(reference_rmse=self.pixel_range * (self._sum / self._numel) ** 0.5)

    def protocol(self) -> dict[str, Any]:
        return dict(num_images=self.num_images, pixel_range=self.pixel_range)
