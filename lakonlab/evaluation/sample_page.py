"""The page that shows the samples of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lakonlab.evaluation.images import ImageFolder, image_name
from lakonlab.evaluation.viewer import Column, Gallery, Item, url_from

FACTS = ('num_samples', 'nfe', 'quantize', 'sample_kwargs', 'sampling_seed', 'protocol')


def gallery(title: str, results: Mapping[str, Any], folder: ImageFolder, page: str) -> Gallery:
    """What the page shows.

    Args:
        title: Its title.
        results: Of the evaluation.
        folder: Where the samples have been written.
        page: Where the page will be, beside the folder.
    """
    facts = {key: results[key] for key in FACTS if results.get(key) is not None}
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
