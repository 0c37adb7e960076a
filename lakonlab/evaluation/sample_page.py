"""The page that shows the samples of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lakonlab.evaluation.images import ImageFolder, image_name
from lakonlab.evaluation.viewer import Column, Gallery, Item, url_from

FACTS = (
    'checkpoint', 'iteration', 'model_sha256', 'num_samples', 'nfe', 'quantize', 'sample_kwargs', 'reference_kwargs',
    'sampling_seed', 'initial_noise', 'reused', 'protocol',
)  # fmt: skip


def gallery(
    title: str, results: Mapping[str, Any], weights: Mapping[str, Any], folder: ImageFolder, page: str
) -> Gallery:
    """What the page shows.

    Args:
        title: Its title.
        results: Of the evaluation.
        weights: What they are of, as far as it is known: ``checkpoint``, ``iteration``, ``model_sha256``.
        folder: Where the samples have been written.
        page: Where the page will be, beside the folder.
    """
    known = {**weights, **results}
    facts = {key: known[key] for key in FACTS if known.get(key) is not None}
    items = [
        Item(
            number,
            folder.captions[number],
            [url_from(page, str(folder.path / image_name(number)))],
            [folder.noise[number]],
        )
        for number in sorted(folder.captions)
    ]
    return Gallery(title, [Column(title, results['metrics'], facts)], items)
