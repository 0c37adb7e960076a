"""How much samples of one prompt, or of one class, differ from each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lakonlab.config.errors import ConfigError
from lakonlab.evaluation.entries import prefixed
from lakonlab.evaluation.estimate import Estimate
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.metrics import FeatureMetric, Metric
from lakonlab.evaluation.preparation import Preparation
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.phases import beat
from lakonlab.registry import IMAGE_DISTANCES, METRICS

PAIRS_AT_ONCE = 64


def groups_of(batch: SampleBatch) -> list[str | int]:
    """What each sample was asked to show: its prompt, or its class, or the same for all."""
    if batch.prompts is not None:
        return list(batch.prompts)
    return [0] * len(batch.ids) if batch.labels is None else batch.labels.tolist()


def vendi_score(features: Tensor) -> float:
    """Effective number of different members of a set (Friedman & Dieng, 2023).

    The exponential of the entropy of the eigenvalues of the similarities divided by N: 1 if all are alike, N if none
    has anything in common with another one.

    Args:
        features: Shape (N, D); similarity is the cosine of the angle between two of them.

    Returns:
        The number; NaN if a feature is.
    """
    if not features.isfinite().all():
        return torch.nan
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    # the same eigenvalues but for zeros, of the smaller of two matrices
    similarities = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    eigenvalues = torch.linalg.eigvalsh(similarities / len(unit)).clamp(min=0)
    return (-torch.special.xlogy(eigenvalues, eigenvalues).sum()).exp().item()


@METRICS.register_module()
class VendiScore(FeatureMetric):
    """Effective number of different samples, of each prompt or class, averaged over them.

    Numbers: ``vendi`` and ``vendi_std``, over the prompts or classes. They do not tell better weights from worse ones:
    noise is diverse too.

    Args:
        extractor: Config of a feature extractor.
        per_group: If False, of all samples together.
        resize: Resize images to the extractor's size, bicubically.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    def __init__(self, extractor: Mapping[str, Any], per_group: bool = True, resize: bool = True, prefix: str = ''):
        self.per_group, self.prefix = per_group, prefix
        super().__init__(extractor, resize)

    def reset(self) -> None:
        super().reset()
        self._groups: dict[str | int, list[Tensor]] = {}

    def feed(self, batch: SampleBatch) -> None:
        embeddings = self.features(batch).embedding.float().cpu()
        groups = groups_of(batch) if self.per_group else [0] * len(batch.ids)
        for group, embedding in zip(groups, embeddings, strict=True):
            self._groups.setdefault(group, []).append(embedding)
        self.num_images += len(batch.ids)

    def compute(self) -> dict[str, float]:
        score = Estimate.of([vendi_score(torch.stack(members)) for members in self._groups.values()])
        name = prefixed(self.prefix, 'vendi')
        return {name: score.mean, f'{name}_std': score.std}

    def protocol(self) -> dict[str, Any]:
        sizes = [len(members) for members in self._groups.values()]
        return dict(
            **super().protocol(),
            num_groups=len(sizes),
            images_per_group=[min(sizes), max(sizes)],
        )


class PairwiseDistance(Metric):
    """Mean distance over all pairs of samples of a prompt or class, averaged over these.

    Class attribute: ``number``, the name of the mean; that of the deviation over prompts ends in ``_std``.

    Args:
        max_per_group: Only the first samples of each prompt or class count, because the pairs grow with their square.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    number: str

    def __init__(self, max_per_group: int = 16, prefix: str = ''):
        if max_per_group < 2:
            raise ValueError(f'{type(self).__name__}.max_per_group={max_per_group!r}: expected at least 2')
        self.max_per_group, self.prefix = max_per_group, prefix
        super().__init__()

    def reset(self) -> None:
        self.num_images = 0
        self._groups: dict[str | int, list[Tensor]] = {}
        self._means: dict[str | int, float] = {}  # of groups that are full, whose members are no longer needed

    @property
    def num_groups(self) -> int:
        """Prompts or classes so far."""
        return len(self._groups) + len(self._means)

    @torch.no_grad()
    def feed(self, batch: SampleBatch) -> None:
        for group, member in zip(groups_of(batch), self.members(batch), strict=True):
            if group in self._means:
                continue
            kept = self._groups.setdefault(group, [])
            kept.append(member.clone())
            self.num_images += 1
            if len(kept) == self.max_per_group:
                self._means[group] = self.distances(self._groups.pop(group)).mean().item()

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """The mean and its deviation.

        Raises:
            ConfigError: No prompt or class has two samples.
        """
        open_groups = [members for members in self._groups.values() if len(members) > 1]
        means = list(self._means.values())
        for members in open_groups:
            means.append(self.distances(members).mean().item())
            beat()
        if not means:
            raise ConfigError(f'{type(self).__name__} needs at least two samples of a prompt or a class')
        distance = Estimate.of(means)
        name = prefixed(self.prefix, self.number)
        return {name: distance.mean, f'{name}_std': distance.std}

    @abstractmethod
    def members(self, batch: SampleBatch) -> Sequence[Tensor]:
        """What is kept of each sample."""

    @abstractmethod
    def distances(self, members: Sequence[Tensor]) -> Tensor:
        """Distances of all pairs of members, each pair once."""


class FeatureDistance(PairwiseDistance):
    """A distance of features.

    Args:
        extractor: Config of a feature extractor.
        max_per_group: Only the first samples of each prompt or class count.
        resize: Resize images to the extractor's size, bicubically; if False, an extractor that resizes by itself does.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    def __init__(self, extractor: Mapping[str, Any], max_per_group: int = 16, resize: bool = True, prefix: str = ''):
        self.extractor_config, self.resize = dict(extractor), resize
        super().__init__(max_per_group, prefix)

    def bind(self, extractors: ExtractorPool) -> None:
        self.extractor = extractors.build(self.extractor_config)
        self.preparation = Preparation(self.extractor.input_size if self.resize else None)

    def sources(self, extractors: ExtractorPool) -> dict[str, Any]:
        self.bind(extractors)
        return dict(extractor=self.extractor.protocol())

    def members(self, batch: SampleBatch) -> Sequence[Tensor]:
        return batch.features(self.extractor, self.preparation).embedding.float().cpu()

    def protocol(self) -> dict[str, Any]:
        return dict(
            num_images=self.num_images,
            num_groups=self.num_groups,
            extractor=self.extractor.protocol(),
            preparation=self.preparation.protocol(),
        )


@METRICS.register_module()
class CosineDiversity(FeatureDistance):
    """Mean cosine distance of features, over pairs of samples of a prompt or class; of DINOv2, for instance.

    The arguments are those of the base class.
    """

    number = 'cosine_diversity'

    def distances(self, members: Sequence[Tensor]) -> Tensor:
        unit = torch.nn.functional.normalize(torch.stack(list(members)).double(), dim=1)
        rows, columns = torch.triu_indices(len(unit), len(unit), offset=1)
        return 1 - (unit[rows] * unit[columns]).sum(dim=1)


@METRICS.register_module()
class FeatureDiversity(FeatureDistance):
    """Mean Euclidean distance of features, over pairs of samples of a prompt or class.

    It does not tell better weights from worse ones: noise is diverse too.

    Args:
        extractor: Config of a feature extractor.
        max_per_class: Only the first samples of each prompt or class count.
        resize: Resize images to the extractor's size, bicubically; if False, an extractor that resizes by itself does.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    number = 'feature_diversity'

    def __init__(self, extractor: Mapping[str, Any], max_per_class: int = 1000, resize: bool = True, prefix: str = ''):
        super().__init__(extractor, max_per_class, resize, prefix)

    def distances(self, members: Sequence[Tensor]) -> Tensor:
        return torch.pdist(torch.stack(list(members)).double())


def _as_bytes(image: Tensor) -> Tensor:
    """An image in [0, 1] as uint8, if that loses nothing: such images need a quarter of the memory."""
    pixels = (image * 255).round().clamp(0, 255).byte()
    return pixels if torch.equal(_as_floats(pixels), image) else image


def _as_floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


@METRICS.register_module()
class LPIPSDiversity(PairwiseDistance):
    """Mean LPIPS over pairs of samples of a prompt or class.

    Args:
        network: Arguments of :class:`lakonlab.evaluation.lpips_network.LPIPSNetwork`; with ``type``, of another
            distance of images.
        max_per_group: Only the first samples of each prompt or class count.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    number = 'lpips_diversity'

    def __init__(self, network: Mapping[str, Any] | None = None, max_per_group: int = 16, prefix: str = ''):
        self.network_config = {'type': 'LPIPSNetwork', **(network or {})}
        super().__init__(max_per_group, prefix)

    def bind(self, extractors: ExtractorPool) -> None:
        self.network = extractors.build(self.network_config, IMAGE_DISTANCES)

    def sources(self, extractors: ExtractorPool) -> dict[str, Any]:
        self.bind(extractors)
        return dict(network=self.network.protocol())

    def members(self, batch: SampleBatch) -> Sequence[Tensor]:
        self.network.to(batch.images.device)
        return [_as_bytes(image) for image in batch.images.float().cpu()]

    def distances(self, members: Sequence[Tensor]) -> Tensor:
        images = torch.stack([_as_floats(member) for member in members])
        device = next(self.network.parameters()).device
        pairs = torch.combinations(torch.arange(len(images)))
        found = [
            self.network(images[part[:, 0]].to(device), images[part[:, 1]].to(device)).cpu()
            for part in pairs.split(PAIRS_AT_ONCE)
        ]
        return torch.cat(found).double()

    def protocol(self) -> dict[str, Any]:
        return dict(num_images=self.num_images, num_groups=self.num_groups, network=self.network.protocol())


@METRICS.register_module()
class ReferenceLPIPS(Metric):
    """Mean LPIPS to reference images made from the same noise.

    Args:
        network: Arguments of :class:`lakonlab.evaluation.lpips_network.LPIPSNetwork`; with ``type``, of another
            distance of images.
    """

    needs_reference = True
    better = {'reference_lpips': 'lower'}

    def __init__(self, network: Mapping[str, Any] | None = None):
        self.network_config = {'type': 'LPIPSNetwork', **(network or {})}
        super().__init__()

    def bind(self, extractors: ExtractorPool) -> None:
        self.network = extractors.build(self.network_config, IMAGE_DISTANCES)

    def sources(self, extractors: ExtractorPool) -> dict[str, Any]:
        self.bind(extractors)
        return dict(network=self.network.protocol())

    def reset(self) -> None:
        self._distances: list[float] = []

    @torch.no_grad()
    def feed(self, batch: SampleBatch) -> None:
        if batch.reference is None:
            raise ValueError('ReferenceLPIPS needs reference images: set reference_kwargs in the evaluation entry')
        network = self.network.to(batch.images.device)
        pairs = zip(batch.images.split(batch.feed_batch_size), batch.reference.split(batch.feed_batch_size))
        for images, reference in pairs:
            self._distances += network(images, reference.to(images.device)).double().tolist()

    def compute(self) -> dict[str, float]:
        distance = Estimate.of(self._distances)
        return dict(reference_lpips=distance.mean, reference_lpips_std=distance.std)

    def protocol(self) -> dict[str, Any]:
        return dict(num_images=len(self._distances), network=self.network.protocol())
