"""What a sample costs: seconds and operations, to stand beside the number of network evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lakonlab.evaluation.expected import Expected, made_now
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.registry import METRICS


class Timing(NamedTuple):
    """How long a batch took.

    Args:
        count: Its samples.
        seconds: From its noise to its images.
        phases: Parts of that.
    """

    count: int
    seconds: float
    phases: Mapping[str, float]


class TimedMetric(Metric):
    """A metric of the time that samples take, without the first batch of each process if there are others."""

    def expect(self, samples: Expected) -> None:
        made_now(samples, type(self).__name__)

    def reset(self) -> None:
        self._warm_up: list[Timing] = []
        self._timed: list[Timing] = []

    def feed(self, batch: SampleBatch) -> None:
        """Take in a batch.

        Raises:
            ValueError: It was not generated now.
        """
        if batch.seconds is None:
            raise ValueError(
                f'{type(self).__name__} needs samples that are generated now, not real images or images in files'
            )
        timing = Timing(len(batch.ids), batch.seconds, batch.phases or {})
        (self._warm_up if batch.warm_up else self._timed).append(timing)

    def counted(self) -> list[Timing]:
        """The batches that count."""
        return self._timed or self._warm_up

    def largest(self) -> list[Timing]:
        """The largest of them, so that the rest at the end of a data set is not averaged with them."""
        most = max(timing.count for timing in self.counted())
        return [timing for timing in self.counted() if timing.count == most]

    def protocol(self) -> dict[str, Any]:
        largest = self.largest()
        return dict(
            num_timed=sum(timing.count for timing in self.counted()),
            num_batches=len(largest),
            batch_size=largest[0].count,
            includes_warm_up=not self._timed,
            num_threads=torch.get_num_threads(),
        )


@METRICS.register_module()
class SamplingSpeed(TimedMetric):
    """Samples per second of wall time of one process, and seconds of a batch.

    Numbers: ``samples_per_second``; ``network_time``, of the denoising network with its guidance, ``policy_time``, of
    the rest of the sampling loop (policies, solver), and ``total_time``, from the noise of a batch to its images, in
    seconds of a batch of ``batch_size`` of the protocol. On accelerators other than CUDA only ``total_time`` is known.

    Several processes together make about as many times more samples; if they share a machine, or wait for one another
    because a network is divided among them, the speed of each is less than it would be alone.
    """

    def compute(self) -> dict[str, float]:
        timings, largest = self.counted(), self.largest()
        names = [name for name in largest[0].phases if all(name in timing.phases for timing in largest)]
        times = {name: [timing.phases[name] for timing in largest] for name in names}
        times['total'] = [timing.seconds for timing in largest]
        return dict(
            samples_per_second=sum(timing.count for timing in timings) / sum(timing.seconds for timing in timings),
            **{f'{name}_time': sum(seconds) / len(largest) for name, seconds in times.items()},
        )


@METRICS.register_module()
class SamplingCost(TimedMetric):
    """``latency_seconds``, from the noise of a batch to its images, and ``gflops_per_sample``.

    Operations are those of matrix products, convolutions and attention, of the first batch, which is not timed unless
    it is the only one. Only the largest of the batches that are timed count; their size is ``batch_size`` of the
    protocol. For the latency of a single image, evaluate with batches of one.
    """

    needs_flops = True

    def reset(self) -> None:
        super().reset()
        self._flops: float | None = None

    def feed(self, batch: SampleBatch) -> None:
        super().feed(batch)
        self._flops = self._flops if batch.flops is None else batch.flops

    def compute(self) -> dict[str, float]:
        seconds = [timing.seconds for timing in self.largest()]
        numbers = dict(latency_seconds=sum(seconds) / len(seconds))
        if self._flops is not None:
            numbers['gflops_per_sample'] = self._flops / 1e9
        return numbers
