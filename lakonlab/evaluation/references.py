"""Images that samples are compared with one by one, made from the same noise and kept to be used again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.evaluation.sampling import sample

logger = logging.getLogger('lakonlab.evaluation')

LIMIT = 2 * 2**30
"""Bytes of reference images that a process keeps: 43,000 of 64 x 64, 2,700 of 256 x 256, 170 of 1024 x 1024 pixels."""


def needs_reference_kwargs(name: str, titles: Sequence[str]) -> str:
    """Why an evaluation cannot be made.

    Args:
        name: Config key of the entry.
        titles: Its metrics that compare with reference samples.
    """
    return (
        f'{name}: {", ".join(titles)} compare{"s" if len(titles) == 1 else ""} with reference samples, but '
        "reference_kwargs is not set; set it, for example to dict(role='teacher')"
    )


class ReferenceSamples:
    """Reference images by data split and sampling arguments, generated once as long as there is room for them.

    The samples of a frozen teacher (``role='teacher'``) are kept until they are said to be asked for no more; those of
    weights that train only as long as the ``version`` of the weights is the same. Of several processes, each keeps
    those of its own samples.

    Args:
        limit: Bytes of images that are kept; those beyond are made again whenever they are asked for.

    Attributes:
        kept_bytes: Bytes of images that are kept now.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.kept_bytes = 0
        self._images: dict[str, dict[int, Tensor]] = {}
        self._version: object = None
        self._is_full = False

    def lacks(self, ids: Sequence[int], data: str, kwargs: Mapping[str, Any], version: object, seed: int = 0) -> bool:
        """Whether a batch has samples whose reference images are still to be made.

        Args:
            ids: Numbers of the samples.
            data: Name of the split.
            kwargs: Arguments of ``val_step``.
            version: What changes when the weights do, e.g. the iteration.
            seed: Seed of what the sampler draws beyond the data set's noise.
        """
        known = self._known(data, kwargs, version, seed)
        return any(number not in known for number in ids)

    def get(
        self,
        model: nn.Module,
        batch: dict,
        data: str,
        kwargs: Mapping[str, Any],
        version: object,
        make: bool | None = None,
        seed: int = 0,
        keep: bool = True,
    ) -> Tensor:
        """Reference images of one batch.

        Args:
            model: Has ``val_step``.
            batch: A batch of the split: ``ids``, noise, conditions.
            data: Name of the split.
            kwargs: Arguments of ``val_step``.
            version: What changes when the weights do, e.g. the iteration.
            make: Whether to generate the images; None to do so if :meth:`lacks`. Processes that share a network have to
                decide it together.
            seed: Seed of what the sampler draws beyond the data set's noise.
            keep: Whether these images will be asked for again.

        Returns:
            Shape (B, C, H, W), in [0, 1], on the CPU.
        """
        known = self._known(data, kwargs, version, seed)
        if self.lacks(batch['ids'], data, kwargs, version, seed) if make is None else make:
            images = sample(model, batch, kwargs, seed).images.cpu()
        else:
            images = torch.stack([known[number] for number in batch['ids']])
        for number, image in zip(batch['ids'], images, strict=True):
            if not keep:
                dropped = known.pop(number, None)
                self.kept_bytes -= 0 if dropped is None else dropped.nbytes
            elif number not in known and self._has_room_for(image):
                known[number] = image.clone()  # of its own, not a part of its batch
                self.kept_bytes += image.nbytes
        return images

    def _has_room_for(self, image: Tensor) -> bool:
        if self.kept_bytes + image.nbytes <= self.limit:
            return True
        if not self._is_full:
            self._is_full = True
            logger.warning(
                'reference samples: %d MiB of images are kept, which is the limit; the others are made again in every '
                'evaluation: compare fewer or smaller samples to make each only once',
                self.kept_bytes // 2**20,
            )
        return False

    def _known(self, data: str, kwargs: Mapping[str, Any], version: object, seed: int) -> dict[int, Tensor]:
        if version != self._version:
            self._images = {key: images for key, images in self._images.items() if key.startswith('frozen:')}
            self.kept_bytes = sum(image.nbytes for images in self._images.values() for image in images.values())
            self._version = version
        kind = 'frozen' if is_frozen(kwargs) else 'training'
        key = f'{kind}:{data}:{seed}:{json.dumps(kwargs, sort_keys=True, default=str)}'
        return self._images.setdefault(key, {})


def is_frozen(kwargs: Mapping[str, Any]) -> bool:
    """Whether samples are made with weights that do not train.

    Args:
        kwargs: Arguments of ``val_step``.
    """
    return kwargs.get('role') == 'teacher'
