"""Curves and grids of samples in Weights & Biases, over iterations."""

from __future__ import annotations

from typing import Any

from lakonlab.mmengine_parts import VISBACKENDS, WandbVisBackend


@VISBACKENDS.register_module()
class WandbBackend(WandbVisBackend):
    """mmengine's backend, which counts its calls, with the iteration as the step of every row.

    All that is logged of an iteration is one row, sent when that of a later one begins, or at the end.
    """

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        """Log a number of an iteration."""
        self.experiment.log({name: value}, step=step)

    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs: Any) -> None:
        """Log numbers of an iteration."""
        self.experiment.log(dict(scalar_dict), step=step)

    def add_image(self, name: str, image: Any, step: int = 0, **kwargs: Any) -> None:
        """Log an image (H, W, 3), uint8, of an iteration."""
        self.experiment.log({name: self.experiment.Image(image)}, step=step)
