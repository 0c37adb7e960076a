"""Images that samples are compared with one by one, made from the same noise and kept to be used again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.evaluation.sampling import sample


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
    """Reference images by data split and sampling arguments, each generated once.

    The samples of a frozen teacher (``role='teacher'``) are kept for good; those of weights that train are kept as long
    as the ``version`` of the weights is the same. Of several processes, each keeps those of its own samples.
    """

    def __init__(self):
        self._images: dict[str, dict[int, Tensor]] = {}
        self._version: object = None

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

        Returns:
            Shape (B, C, H, W), in [0, 1], on the CPU.
        """
        known = self._known(data, kwargs, version, seed)
        if self.lacks(batch['ids'], data, kwargs, version, seed) if make is None else make:
            known.update(zip(batch['ids'], sample(model, batch, kwargs, seed).images.cpu(), strict=True))
        return torch.stack([known[number] for number in batch['ids']])

    def _known(self, data: str, kwargs: Mapping[str, Any], version: object, seed: int) -> dict[int, Tensor]:
        if version != self._version:
            self._images = {key: images for key, images in self._images.items() if key.startswith('frozen:')}
            self._version = version
        frozen = kwargs.get('role') == 'teacher'
        key = f'{"frozen" if frozen else "training"}:{data}:{seed}:{json.dumps(kwargs, sort_keys=True, default=str)}'
        return self._images.setdefault(key, {})
