"""Images that belong to prompts, one to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lakonlab.datasets.datalist import Datalist, list_images, read_datalist
from lakonlab.datasets.images import RESAMPLING, as_tensor, cover, read_rgb
from lakonlab.storage import files


@dataclass(frozen=True)
class Scaling:
    """To which size an image is brought: near its own, or the one its list gives, times a factor.

    Args:
        factor: Of height and width.
        method: One of :data:`~lakonlab.datasets.images.RESAMPLING`.
        multiple: Height and width become multiples of these numbers of pixels, at least one of each.
    """

    factor: float = 1.0
    method: str = 'bicubic'
    multiple: tuple[int, int] = (1, 1)

    def target(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width for an image of a given height and width."""
        height, width = (
            max(1, round(length * self.factor / multiple)) * multiple for length, multiple in zip(size, self.multiple)
        )
        return height, width


class PairedImages:
    """Images in a folder, in the order of a list.

    Args:
        directory: The folder, local or a URL.
        datalist_path: Their list; None for all files of the folder with this extension, by name.
        extension: Such as ``'.png'``.
        scaling: To which size they are brought.
        setting: Argument that names the folder, for messages.

    Raises:
        FileNotFoundError: The folder, the list or all images are missing.
    """

    def __init__(self, directory: str, datalist_path: str | None, extension: str, scaling: Scaling, setting: str):
        if not files.is_directory(directory):
            raise FileNotFoundError(f'{setting}={directory!r}: there is no such folder')
        self.directory = directory
        self.extension = extension
        self.scaling = scaling
        list_setting = setting.removesuffix('dir') + 'datalist_path'
        self.datalist: Datalist = (
            list_images(directory, extension, setting)
            if datalist_path is None
            else read_datalist(datalist_path, list_setting)
        )

    def __len__(self) -> int:
        return len(self.datalist.names)

    def _read(self, index: int):
        image = read_rgb(files.join(self.directory, self.datalist.names[index] + self.extension))
        sizes = self.datalist.image_sizes
        return image, self.scaling.target((image.height, image.width) if sizes is None else sizes[index])

    def __getitem__(self, index: int) -> Tensor:
        """Image of a number, (3, H, W), float32 in [0, 1]."""
        image, size = self._read(index)
        return as_tensor(cover(image, *size, self.scaling.method))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of what :meth:`__getitem__` returns; the file is read only if the list does not say."""
        sizes = self.datalist.image_sizes
        return self._read(index)[1] if sizes is None else self.scaling.target(sizes[index])

    @property
    def bucket_ids(self) -> np.ndarray | None:
        """Bucket of every image as the list says, or by its size there; None if it says neither."""
        if self.datalist.bucket_ids is not None:
            return np.asarray(self.datalist.bucket_ids, dtype=np.int64)
        if self.datalist.image_sizes is None:
            return None
        return np.unique(np.asarray(self.datalist.image_sizes), axis=0, return_inverse=True)[1].reshape(-1)


def scaling_of(factor: float, method: str, multiple: tuple[int, int], prefix: str = '') -> Scaling:
    """Checked arguments of a data set.

    Args:
        factor: See :class:`Scaling`.
        method: As there.
        multiple: As there.
        prefix: Of the name of the factor's argument, for messages.

    Raises:
        ValueError: One is out of range.
    """
    if not factor > 0:
        raise ValueError(f'{prefix}image_scale_factor={factor!r}: expected a positive number')
    if method not in RESAMPLING:
        raise ValueError(f'image_scale_method={method!r}: expected one of {", ".join(map(repr, RESAMPLING))}')
    return Scaling(factor, method, multiple)
