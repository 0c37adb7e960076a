"""What a sample costs: seconds and operations, to stand beside the number of network evaluations."""

from __future__ import annotations

from typing import Any

import torch

from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.registry import METRICS


@METRICS.register_module()
class SamplingCost(Metric):
    """``latency_seconds``, from the noise of a batch to its images, and ``gflops_per_sample``.

    Operations are those of matrix products, convolutions and attention, of the first batch, which is not timed unless
    it is the only one. For the latency of a single image, evaluate with batches of one.
    """

    needs_flops = True

    def reset(self) -> None:
        self._flops: float | None = None
        self._warm_up: list[float] = []
        self._timed: list[float] = []
        self._largest = 0

    def feed(self, batch: SampleBatch) -> None:
        """Take in a batch.

        Raises:
            ValueError: It was not generated now.
        """
        if batch.seconds is None:
            raise ValueError('SamplingCost needs samples that are generated now, not real images or images in files')
        self._flops = self._flops if batch.flops is None else batch.flops
        self._largest = max(self._largest, len(batch.ids))
        (self._warm_up if batch.warm_up else self._timed).append(batch.seconds)

    def compute(self) -> dict[str, float]:
        timed = self._timed or self._warm_up
        numbers = dict(latency_seconds=sum(timed) / len(timed))
        if self._flops is not None:
            numbers['gflops_per_sample'] = self._flops / 1e9
        return numbers

    def protocol(self) -> dict[str, Any]:
        return dict(
            num_batches=len(self._timed or self._warm_up), batch_size=self._largest, num_threads=torch.get_num_threads()
        )
