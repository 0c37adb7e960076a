"""What a prompt scorer is: a frozen network that says how well images show what they were asked to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.evaluation.entries import prefixed
from lakonlab.evaluation.estimate import Estimate
from lakonlab.evaluation.expected import Expected, with_prompts
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.samples import SampleBatch, finite_rows
from lakonlab.registry import PROMPT_SCORERS


class PromptScorer(nn.Module, ABC):
    """Base class; a new scorer implements :meth:`forward` and :meth:`protocol` and registers itself."""

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images.

        Args:
            images: Shape (B, 3, H, W), float in [0, 1].
            prompts: What each was asked to show.

        Returns:
            Shape (B,), float.
        """

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What must be equal for two scores to be comparable: name, hash of the weights, preparation of images."""


class PromptMetric(Metric):
    """The mean score of all samples, and its standard deviation over them.

    Class attribute: ``number``, the name of the mean; that of the deviation ends in ``_std``.

    Args:
        scorer: Config of a prompt scorer.
        prefix: Goes before the names of the numbers, with a ``_``.
    """

    number: str

    def __init__(self, scorer: Mapping[str, Any], prefix: str = ''):
        self.prefix = prefix
        self.name = prefixed(prefix, self.number)
        self.better = self.better_of(dict(prefix=prefix))
        self.scorer_config = dict(scorer)
        self.scorer: PromptScorer | None = None
        super().__init__()

    @classmethod
    def better_of(cls, arguments: Mapping[str, Any]) -> Mapping[str, str]:
        return {prefixed(arguments.get('prefix', ''), cls.number): 'higher'}

    def bind(self, extractors: ExtractorPool) -> None:
        self.scorer = extractors.build(self.scorer_config, PROMPT_SCORERS)

    def expect(self, samples: Expected) -> None:
        with_prompts(samples, type(self).__name__)

    def reset(self) -> None:
        self._scores: list[float] = []

    @torch.no_grad()
    def feed(self, batch: SampleBatch) -> None:
        """Score samples.

        Raises:
            ValueError: They have no prompts.
        """
        if batch.prompts is None:
            raise ValueError(f'{type(self).__name__} needs samples with prompts')
        scorer = self.scorer.to(batch.images.device)
        for start in range(0, len(batch.ids), batch.feed_batch_size):
            part = slice(start, start + batch.feed_batch_size)
            scores = scorer(batch.images[part], batch.prompts[part]).double()
            # a scorer that quantises takes images that are not finite for black ones
            self._scores += scores.masked_fill(~finite_rows(batch.images[part]), torch.nan).tolist()

    def compute(self) -> dict[str, float]:
        score = Estimate.of(self._scores)
        return {self.name: score.mean, f'{self.name}_std': score.std}

    def protocol(self) -> dict[str, Any]:
        return dict(num_images=len(self._scores), scorer=self.scorer.protocol())
