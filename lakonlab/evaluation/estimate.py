"""A number with its spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """Mean and standard deviation over the parts that a metric was computed of.

    Args:
        mean: The number.
        std: Standard deviation of the parts, with their count in the denominator.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate of values that were computed of parts; at least one.

        Of values that are not all finite, the deviation is NaN, and the mean is what a sum makes of them.
        """
        if not all(map(math.isfinite, values)):
            return cls(sum(values) / len(values), math.nan)
        return cls(statistics.fmean(values), statistics.pstdev(values))
