"""FID, KID, inception score, precision and recall of generated images, of one pass through one network."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lakonlab.evaluation.entries import prefixed
from lakonlab.evaluation.expected import Expected, at_least_two
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.frechet import Moments, frechet_distance
from lakonlab.evaluation.inception_score import inception_score
from lakonlab.evaluation.kernel_distance import SEED, kernel_distance
from lakonlab.evaluation.manifold import precision_recall
from lakonlab.evaluation.metrics import FeatureMetric
from lakonlab.evaluation.preparation import Preparation
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.evaluation.statistics import ReferenceStatistics, read_reference
from lakonlab.registry import METRICS

logger = logging.getLogger('lakonlab.evaluation')

KID_SCALE = 1000
"""KID is reported in thousandths, as it usually is."""
BETTER = {'fid': 'lower', 'kid': 'lower', 'is': 'higher'}


@METRICS.register_module()
class InceptionMetrics(FeatureMetric):
    """FID, KID, IS, precision and recall against statistics of reference images.

    Numbers: ``fid``; ``kid`` and ``kid_std``, times 1000; ``precision``, ``recall``; ``is`` and ``is_std``.

    Args:
        reference: File of reference statistics, see :func:`lakonlab.evaluation.statistics.read_reference`.
        reference_pkl: The same; the published name of this argument.
        num_images: Only the first so many samples count; None for all.
        center_crop: Cut out the middle at the extractor's size, at full resolution ("patch FID"), instead of resizing.
        resize: Resize to the extractor's size; if False, an extractor that resizes by itself does.
        resize_mode: ``'bicubic'``, antialiased, or ``'bilinear'``, not antialiased.
        extractor: Config of a feature extractor.
        use_kid: Whether to compute KID; the reference must hold features.
        use_pr: Whether to compute precision and recall; the same.
        use_is: Whether to compute IS; the extractor must classify.
        kid_num_subsets: Pairs of subsets that KID is averaged over.
        kid_max_subset_size: Members of a subset, if there are as many.
        pr_k: Which neighbour the balls of precision and recall reach to.
        is_splits: Parts that IS is averaged over.
        is_shuffle: Draw the members of the parts at random instead of taking consecutive samples.
        seed: Seed of these draws.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    def __init__(
        self,
        reference: str | None = None,
        num_images: int | None = None,
        center_crop: bool = False,
        resize: bool = True,
        resize_mode: str = 'bicubic',
        extractor: Mapping[str, Any] | None = None,
        use_kid: bool = False,
        use_pr: bool = True,
        use_is: bool = True,
        kid_num_subsets: int = 100,
        kid_max_subset_size: int = 1000,
        pr_k: int = 3,
        is_splits: int = 10,
        is_shuffle: bool = False,
        seed: int = SEED,
        prefix: str = '',
        reference_pkl: str | None = None,
    ):
        if (reference is None) == (reference_pkl is None):
            raise ValueError(
                'InceptionMetrics.reference: name one file of reference statistics (here or reference_pkl)'
            )
        for name, value, least in (
            ('num_images', num_images, 2),
            ('kid_num_subsets', kid_num_subsets, 1),
            ('kid_max_subset_size', kid_max_subset_size, 2),
            ('pr_k', pr_k, 1),
            ('is_splits', is_splits, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f'InceptionMetrics.{name}={value!r}: expected at least {least}')
        Preparation(1, center_crop, resize_mode)  # refuses what is impossible
        super().__init__(extractor or dict(type='InceptionV3'), resize)
        self.reference_path = str(reference or reference_pkl)
        self.wanted_images = num_images
        self.center_crop, self.resize_mode = center_crop, resize_mode
        self.use_kid, self.use_pr, self.use_is = use_kid, use_pr, use_is
        self.kid_num_subsets, self.kid_max_subset_size = kid_num_subsets, kid_max_subset_size
        self.pr_k, self.is_splits, self.is_shuffle, self.seed = pr_k, is_splits, is_shuffle, seed
        self.prefix = prefix
        self.better = self.better_of(dict(prefix=prefix, use_kid=use_kid, use_is=use_is))
        self.reference: ReferenceStatistics | None = None

    @classmethod
    def better_of(cls, arguments: Mapping[str, Any]) -> Mapping[str, str]:
        used = {'fid': True, 'kid': arguments.get('use_kid', False), 'is': arguments.get('use_is', True)}
        prefix = arguments.get('prefix', '')
        return {prefixed(prefix, name): better for name, better in BETTER.items() if used[name]}

    def bind(self, extractors: ExtractorPool) -> None:
        """Get the network and the reference statistics.

        Raises:
            ValueError: They do not fit each other, or what is to be computed.
        """
        super().bind(extractors)
        size = self.extractor.input_size if self.resize or self.center_crop else None
        self.preparation = Preparation(size, self.center_crop, self.resize_mode)
        if self.reference is not None:
            return
        reference = read_reference(self.reference_path, 'InceptionMetrics.reference')
        if reference.features is None and (self.use_kid or self.use_pr):
            raise ValueError(
                f'InceptionMetrics.reference={self.reference_path!r} holds no features, which KID and precision and '
                'recall need: set use_kid=False and use_pr=False, or make a reference with tools/make_reference.py'
            )
        for name, mine in (('extractor', self.extractor.protocol()), ('preparation', self.preparation.protocol())):
            theirs = reference.provenance.get(name)
            if theirs is not None and theirs != mine:
                raise ValueError(
                    f'InceptionMetrics.reference={self.reference_path!r} was made with the {name} {theirs}, but this '
                    f'metric has {mine}: their features are not comparable'
                )
        self._check_dimension(reference, self.extractor.feature_dim)
        if self.use_is and self.extractor.classifies is False:
            raise ValueError(self._no_classes())
        self.reference = reference

    def _check_dimension(self, reference: ReferenceStatistics, size: int | None) -> None:
        if size is not None and size != len(reference.mean):
            raise ValueError(
                f'InceptionMetrics.reference={self.reference_path!r} is of features of {len(reference.mean)} numbers, '
                f'but {type(self.extractor).__name__} has {size}: it was made with another extractor'
            )

    def _no_classes(self) -> str:
        return f'InceptionMetrics.extractor: {type(self.extractor).__name__} does not classify; set use_is=False'

    def expect(self, samples: Expected) -> None:
        """See that there are enough samples for what is computed, and warn if there are fewer than wanted.

        Raises:
            ValueError: There are not.
        """
        count = samples.count
        if self.wanted_images is not None and count < self.wanted_images:
            logger.warning(
                'InceptionMetrics.num_images=%d, but there will be only %d samples: the numbers will not be comparable '
                'with those of the full number',
                self.wanted_images,
                count,
            )
        count = min(count, self.wanted_images or count)
        at_least_two(samples, 'InceptionMetrics')
        if self.use_pr and self.pr_k >= min(count, len(self.reference.features)):
            raise ValueError(
                f'InceptionMetrics.pr_k={self.pr_k}: expected less than the {count} samples and the '
                f'{len(self.reference.features)} features of the reference; or set use_pr=False'
            )
        if self.use_is and self.is_splits > count:
            raise ValueError(
                f'InceptionMetrics.is_splits={self.is_splits}: expected at most the {count} samples; or set '
                'use_is=False'
            )

    def reset(self) -> None:
        super().reset()
        self._moments = Moments()
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def feed(self, batch: SampleBatch) -> None:
        count = len(batch.ids)
        if self.wanted_images is not None:
            count = min(count, self.wanted_images - self.num_images)
        if count == 0:
            return
        features = self.features(batch)
        if self.use_is and features.logits is None:
            raise ValueError(self._no_classes())
        self._check_dimension(self.reference, features.embedding.shape[1])
        embedding = self.whole(features.embedding[:count])
        self._moments.update(embedding)
        if self.use_kid or self.use_pr:
            self._features.append(embedding.float().cpu())
        if self.use_is:
            self._logits.append(features.logits[:count].float().cpu())
        self.num_images += count

    def compute(self) -> dict[str, float]:
        """The numbers; see the class.

        Raises:
            ValueError: There are too few samples for one of them.
        """
        if self.wanted_images is not None and self.num_images < self.wanted_images:
            logger.warning(
                'InceptionMetrics.num_images=%d, but there were only %d samples: these numbers are not comparable with '
                'those of the full number',
                self.wanted_images,
                self.num_images,
            )
        if self.num_broken:
            return dict.fromkeys((prefixed(self.prefix, name) for name in self._numbers()), torch.nan)
        reference, numbers = self.reference, {}
        numbers['fid'] = frechet_distance(
            self._moments.mean(), self._moments.covariance(), reference.mean, reference.covariance
        )
        if self.use_kid or self.use_pr:
            features = torch.cat(self._features)
        if self.use_kid:
            size = self._subset_size()
            kid = kernel_distance(features, reference.features, self.kid_num_subsets, size, self.seed)
            numbers.update(kid=KID_SCALE * kid.mean, kid_std=KID_SCALE * kid.std)
        if self.use_pr:
            covered = precision_recall(features, reference.features, self.pr_k)
            numbers.update(precision=covered.precision, recall=covered.recall)
        if self.use_is:
            score = inception_score(torch.cat(self._logits), self.is_splits, self.is_shuffle, self.seed)
            numbers.update({'is': score.mean, 'is_std': score.std})
        return {prefixed(self.prefix, name): value for name, value in numbers.items()}

    def _numbers(self) -> list[str]:
        """What is computed, without prefix."""
        optional = (
            (self.use_kid, ['kid', 'kid_std']),
            (self.use_pr, ['precision', 'recall']),
            (self.use_is, ['is', 'is_std']),
        )
        return ['fid', *(name for is_used, names in optional if is_used for name in names)]

    def _subset_size(self) -> int:
        return min(self.kid_max_subset_size, self.num_images, len(self.reference.features))

    def sources(self, extractors: ExtractorPool) -> dict[str, Any]:
        return dict(**super().sources(extractors), reference=self._reference_facts())

    def _reference_facts(self) -> dict[str, Any]:
        reference = self.reference
        return dict(
            path=self.reference_path,
            sha256=reference.sha256,
            num_images=reference.num_images,
            provenance=dict(reference.provenance),
        )

    def protocol(self) -> dict[str, Any]:
        reference = self.reference
        facts = dict(
            **super().protocol(),
            wanted_images=self.wanted_images,
            reference=self._reference_facts(),
        )
        if self.use_kid:
            size = self._subset_size()
            facts['kid'] = dict(num_subsets=self.kid_num_subsets, subset_size=size, seed=self.seed, scale=KID_SCALE)
        if self.use_pr:
            facts['precision_recall'] = dict(
                neighbours=self.pr_k, num_generated=self.num_images, num_real=len(reference.features)
            )
        if self.use_is:
            facts['inception_score'] = dict(
                splits=self.is_splits, shuffle=self.is_shuffle, seed=self.seed if self.is_shuffle else None
            )
        return facts
