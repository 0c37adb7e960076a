"""Images that samples are compared with one by one, made from the same noise and kept to be used again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.evaluation.sampling import sample


class ReferenceSamples:
    """Reference images by data split and sampling arguments, each generated once.

    The samples of a frozen teacher (``role='teacher'``) are kept for good; those of weights that train are kept as long
    as the ``version`` of the weights is the same.
    """

    def __init__(self):
        self._images: dict[str, dict[int, Tensor]] = {}
        self._version: object = None

    def get(self, model: nn.Module, batch: dict, data: str, kwargs: Mapping[str, Any], version: object) -> Tensor:
        """Reference images of one batch.

        Args:
            model: Has ``val_step``.
            batch: A batch of the split: ``ids``, noise, conditions.
            data: Name of the split.
            kwargs: Arguments of ``val_step``.
            version: What changes when the weights do, e.g. the iteration.

        Returns:
            Shape (B, C, H, W), in [0, 1].
        """
        if version != self._version:
            self._images = {key: images for key, images in self._images.items() if key.startswith('frozen:')}
            self._version = version
        frozen = kwargs.get('role') == 'teacher'
        key = f'{"frozen" if frozen else "training"}:{data}:{json.dumps(kwargs, sort_keys=True, default=str)}'
        known = self._images.setdefault(key, {})
        if any(number not in known for number in batch['ids']):
            known.update(zip(batch['ids'], sample(model, batch, kwargs).images.cpu(), strict=True))
        return torch.stack([known[number] for number in batch['ids']])
