"""Fashion-MNIST (Xiao et al., 2017): 70,000 grey pictures of clothes, 28 x 28 pixels, in 10 classes."""

from __future__ import annotations

import struct
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lakonlab.datasets.noise import seeded_noise
from lakonlab.datasets.text_files import unzipped
from lakonlab.registry import DATASETS
from lakonlab.storage import files

CLASS_NAMES = (
    'T-shirt or top',
    'trousers',
    'pullover',
    'dress',
    'coat',
    'sandal',
    'shirt',
    'sneaker',
    'bag',
    'ankle boot',
)
SIDE = 28
FILE_PREFIXES = {'train': 'train', 'val': 't10k'}
DEBIAN_FOLDER = '/usr/share/datasets/fashion-mnist'
DEBIAN_PACKAGE = 'dataset-fashion-mnist'
UNSIGNED_BYTES = 0x08


@DATASETS.register_module()
class FashionMNIST(Dataset):
    """Pictures of clothes for training, or labelled noise for sampling.

    The pixels are the latents. The four files of the data set are read as they are distributed; on Debian and Ubuntu
    the package ``dataset-fashion-mnist`` has them.

    Args:
        split: ``'train'`` (60,000 pictures) or ``'val'`` (10,000).
        data_root: Folder of the files, local or a URL.
        image_size: Side of the pictures in pixels: 28, or less, to which they are averaged.
        negative_label: Label that stands for "no class" in guidance and label dropout; None to leave it out.
        test_mode: Items hold noise to start sampling from, and class labels in turn, instead of pictures.
        num_test_images: Number of items in test mode.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        split: str = 'train',
        data_root: str = DEBIAN_FOLDER,
        image_size: int = SIDE,
        negative_label: int | None = len(CLASS_NAMES),
        test_mode: bool = False,
        num_test_images: int = 2000,
    ):
        if split not in FILE_PREFIXES:
            raise ValueError(f'split={split!r}: expected one of {", ".join(map(repr, FILE_PREFIXES))}')
        if not 1 <= image_size <= SIDE:
            raise ValueError(f'image_size={image_size}: expected 1 to {SIDE} pixels')
        if num_test_images < 1:
            raise ValueError(f'num_test_images={num_test_images}: expected a positive number of samples')
        self.split = split
        self.data_root = data_root
        self.image_size = image_size
        self.negative_label = negative_label
        self.test_mode = test_mode
        self.num_test_images = num_test_images

    @cached_property
    def _pictures(self) -> np.ndarray:
        return self._read('images-idx3', 3)

    @cached_property
    def _labels(self) -> np.ndarray:
        labels = self._read('labels-idx1', 1)
        if len(labels) != len(self._pictures):
            raise ValueError(f'{self.data_root}: {len(self._pictures)} pictures and {len(labels)} labels')
        return labels

    def _read(self, kind: str, dimensions: int) -> np.ndarray:
        name = f'{FILE_PREFIXES[self.split]}-{kind}-ubyte.gz'
        path = files.join(self.data_root, name)
        if not files.is_file(path):
            raise FileNotFoundError(
                f'data_root={self.data_root!r}: there is no {name}; apt-get install {DEBIAN_PACKAGE} puts it into '
                f'{DEBIAN_FOLDER}, or name the folder that has it'
            )
        return read_idx(files.read_bytes(path), dimensions, path)

    def __getstate__(self) -> dict:
        # every process reads the files itself: they are smaller than what is in them
        return {key: value for key, value in vars(self).items() if key not in ('_pictures', '_labels')}

    def __len__(self) -> int:
        return self.num_test_images if self.test_mode else len(self._labels)

    def __getitem__(self, index: int) -> dict:
        """Return one item.

        Args:
            index: Number of the item, ``0 <= index < len(self)``.

        Returns:
            ``ids`` int, ``name`` str, ``labels`` and ``negative_labels`` int64 scalars, and ``latents`` in [-1, 1] or,
            in test mode, ``noise``, float32 of shape (1, ``image_size``, ``image_size``).

        Raises:
            IndexError: ``index`` is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'item {index} of a FashionMNIST data set of {len(self)}')
        if self.test_mode:
            label = index % len(CLASS_NAMES)
            item = {'noise': seeded_noise(index + 1000, (1, self.image_size, self.image_size))}
        else:
            label = int(self._labels[index])
            item = {'latents': shrink(torch.from_numpy(self._pictures[index])[None], self.image_size)}
        item.update(ids=index, labels=torch.tensor(label), name=CLASS_NAMES[label])
        if self.negative_label is not None:
            item['negative_labels'] = torch.tensor(self.negative_label)
        return item


def shrink(picture: Tensor, size: int) -> Tensor:
    """A picture averaged to ``size`` pixels and brought from 0..255 to [-1, 1].

    Args:
        picture: (C, S, S), unsigned bytes, S at least ``size``.
        size: Side of the result; its pixels average the parts of pixels that they cover.
    """
    picture = picture.double()
    if picture.shape[-1] != size:
        weights = coverage(picture.shape[-1], size)
        picture = weights @ picture @ weights.T
    return (picture / 127.5 - 1).float()


def coverage(length: int, size: int) -> Tensor:
    """Which share of each of ``size`` equal parts of a line every one of ``length`` equal parts makes up.

    Returns:
        (size, length), float64; rows add up to 1.
    """
    edges = torch.arange(length + 1, dtype=torch.float64)
    bounds = torch.arange(size + 1, dtype=torch.float64) * (length / size)
    overlap = torch.minimum(bounds[1:, None], edges[None, 1:]) - torch.maximum(bounds[:-1, None], edges[None, :-1])
    return overlap.clamp(min=0) * (size / length)


def read_idx(content: bytes, dimensions: int, where: str) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes.

    Args:
        content: The file.
        dimensions: How many it must have.
        where: Its path, for messages.

    Raises:
        ValueError: It is another kind of file, or not whole.
    """
    content = unzipped(content, where)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, UNSIGNED_BYTES, dimensions]):
        raise ValueError(f'{where}: is no IDX file of unsigned bytes with {dimensions} dimensions')
    shape = struct.unpack(f'>{dimensions}I', content[4:header])
    size = int(np.prod(shape))
    if len(content) != header + size:
        raise ValueError(f'{where}: {len(content) - header} values, expected {" x ".join(map(str, shape))}')
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
