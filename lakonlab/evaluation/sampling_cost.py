"""What a sample costs: seconds and operations, to stand beside the number of network evaluations."""

from __future__ import annotations

from typing import Any

import torch

from lakonlab.evaluation.expected import Expected, made_now
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.registry import METRICS


@METRICS.register_module()
class SamplingCost(Metric):
    """``latency_seconds``, from the noise of a batch to its images, and ``gflops_per_sample``.

    Operations are those of matrix products, convolutions and attention, of the first batch, which is not timed unless
    it is the only one. Only the largest of the batches that are timed count, so that the rest at the end of a data set
    is not averaged with them; their size is ``batch_size`` of the protocol. For the latency of a single image, evaluate
    with batches of one.
    """

    needs_flops = True

    def expect(self, samples: Expected) -> None:
        made_now(samples, 'SamplingCost')

    def reset(self) -> None:
        self._flops: float | None = None
        self._warm_up: list[tuple[int, float]] = []
        self._timed: list[tuple[int, float]] = []

    def feed(self, batch: SampleBatch) -> None:
        """Take in a batch.

        Raises:
            ValueError: It was not generated now.
        """
        if batch.seconds is None:
            raise ValueError('SamplingCost needs samples that are generated now, not real images or images in files')
        self._flops = self._flops if batch.flops is None else batch.flops
        (self._warm_up if batch.warm_up else self._timed).append((len(batch.ids), batch.seconds))

    def _counted(self) -> tuple[int, list[float]]:
        """Samples of the largest batches that are timed, and the seconds of each of them."""
        batches = self._timed or self._warm_up
        largest = max(count for count, _ in batches)
        return largest, [seconds for count, seconds in batches if count == largest]

    def compute(self) -> dict[str, float]:
        _, seconds = self._counted()
        numbers = dict(latency_seconds=sum(seconds) / len(seconds))
        if self._flops is not None:
            numbers['gflops_per_sample'] = self._flops / 1e9
        return numbers

    def protocol(self) -> dict[str, Any]:
        size, seconds = self._counted()
        return dict(
            num_batches=len(seconds),
            batch_size=size,
            includes_warm_up=not self._timed,
            num_threads=torch.get_num_threads(),
        )
