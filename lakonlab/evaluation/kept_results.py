"""Whether the results of an earlier evaluation are still those of the files that it read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lakonlab.evaluation.entries import metric_configs
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.plain import finite
from lakonlab.registry import METRICS


def changes(entry: Mapping[str, Any], result: Mapping[str, Any], extractors: ExtractorPool) -> list[str]:
    """What the metrics of an entry would now read that is not what its result is of.

    Args:
        entry: Of the section ``evaluation``.
        result: What it gave, as it was read from a file of results.
        extractors: Where networks are built.

    Returns:
        A text for each fact that differs; none if the result can be kept.

    Raises:
        ValueError: A metric cannot be built, or what it reads does not fit any more.
        OSError: What it reads is missing.
    """
    found = []
    for config in metric_configs(entry.get('metrics')):
        metric = METRICS.build(dict(config))
        recorded = (result.get('protocol') or {}).get(metric.title) or {}
        for name, now in metric.sources(extractors).items():
            plain = finite(json.loads(json.dumps(now, default=str)))
            found += _differences(f'{metric.title}: {name}', recorded.get(name), plain)
    return found


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(f'{name}.{key}', before.get(key), now.get(key))
    elif before != now:
        yield f'{name} was {before!r} and is {now!r}'
