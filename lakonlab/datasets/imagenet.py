"""ImageNet: images, or latents that were computed from them before; or labelled noise for sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import PurePosixPath

import torch
from torch.utils.data import Dataset

from lakonlab.datasets.images import adm_square, as_tensor, read_rgb
from lakonlab.datasets.latent_cache import LatentCache, is_latent_cache
from lakonlab.datasets.noise import seeded_noise
from lakonlab.datasets.prompt_cache.torch_file import read_published_latents
from lakonlab.datasets.text_files import read_lines
from lakonlab.ops.random_source import RandomSource
from lakonlab.registry import DATASETS
from lakonlab.storage import files

NUM_CLASSES = 1000
LATENT_SUFFIXES = ('.pth', '.pt')
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
LABEL_SAMPLINGS = ('random', 'equal')


@DATASETS.register_module()
class ImageNet(Dataset):
    """ImageNet for training, or labelled noise for sampling.

    Args:
        data_root: Directory of the images or latents, local or a URL, as all paths here; not read in test mode. A
            directory with an ``index.json``, as ``tools/cache_imagenet_data_sdvae.py`` makes it, needs no data list.
        datalist_path: File with a line ``relative/path label`` per item. For latents, ``.pth`` files with a dict
            ``{'x': latents, 'y': label}``, the label may be left out. Not read in test mode.
        label2name_path: File with a line ``label: 'names',`` per class.
        random_flip: Mirror half of the images, drawn anew whenever the loader of a run reads them. Latents are never
            mirrored; but where a cache holds those of the mirror images too, the data set is twice as long, and its
            second half are these.
        negative_label: Label that stands for "no class" in guidance and label dropout; None to leave it out.
        image_size: Side of the square that images are brought to, in pixels.
        latent_size: Shape (C, H, W) of the noise in test mode.
        test_label_repeat: Number of consecutive samples that share a label in test mode.
        test_label_sampling: ``'random'``, labels drawn uniformly, or ``'equal'``, in turn.
        test_mode: Items hold noise to start sampling from instead of images or latents.
        num_test_images: Number of items in test mode.

    The files are read when they are first needed; what is wrong with them is said then, with the line.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        data_root: str = 'data/imagenet/train',
        datalist_path: str = 'data/imagenet/train.txt',
        label2name_path: str = 'data/imagenet/imagenet1000_clsidx_to_labels.txt',
        random_flip: bool = True,
        negative_label: int | None = NUM_CLASSES,
        image_size: int = 256,
        latent_size: Sequence[int] = (4, 32, 32),
        test_label_repeat: int = 1,
        test_label_sampling: str = 'random',
        test_mode: bool = False,
        num_test_images: int = 50000,
    ):
        if test_label_sampling not in LABEL_SAMPLINGS:
            raise ValueError(
                f'test_label_sampling={test_label_sampling!r}: expected one of {", ".join(map(repr, LABEL_SAMPLINGS))}'
            )
        sizes = dict(image_size=image_size, test_label_repeat=test_label_repeat, num_test_images=num_test_images)
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f'{name}={value}: expected a positive number')
        self.data_root = str(data_root)
        self.random_flip = random_flip
        self.negative_label = negative_label
        self.image_size = image_size
        self.latent_size = tuple(latent_size)
        self.test_label_repeat = test_label_repeat
        self.test_label_sampling = test_label_sampling
        self.test_mode = test_mode
        self.num_test_images = num_test_images
        self.datalist_path = str(datalist_path)
        self.label2name_path = str(label2name_path)

    @cached_property
    def label_names(self) -> dict[int, str]:
        """Label -> names of the class, read when first needed."""
        return read_label_names(self.label2name_path)

    @cached_property
    def _datalist(self) -> tuple[list[str], list[int | None]]:
        return read_datalist(self.datalist_path)

    @cached_property
    def _cache(self) -> LatentCache | None:
        """The shards of latents that ``data_root`` holds; None if it holds a file per image."""
        return LatentCache(self.data_root) if is_latent_cache(self.data_root) else None

    @property
    def random_item(self) -> Callable[[int, RandomSource], dict]:
        """How a loader reads an item whose random numbers come from a source; only data sets that mirror have it."""
        if self.test_mode or not self.random_flip or self.holds_latents:
            raise AttributeError('the items of this data set are not random')
        return self._mirrored_at_random

    def _mirrored_at_random(self, index: int, source: RandomSource) -> dict:
        item = self[index]
        if source.uniform('flip', (1,)).item() < 0.5:
            item['images'] = item['images'].flip(-1)
        return item

    @property
    def holds_latents(self) -> bool:
        """Whether the files hold latents, as the first one tells."""
        return self._cache is not None or suffix_of(self._datalist[0][0]) in LATENT_SUFFIXES

    def _num_images(self) -> int:
        return len(self._cache) if self._cache is not None else len(self._datalist[0])

    def __len__(self) -> int:
        if self.test_mode:
            return self.num_test_images
        mirrors = self.random_flip and self._cache is not None and self._cache.has_mirrored
        return self._num_images() * (2 if mirrors else 1)

    def __getitem__(self, index: int) -> dict:
        """Return one item.

        Args:
            index: Number of the item, ``0 <= index < len(self)``.

        Returns:
            ``ids`` int, ``name`` str, ``labels`` and ``negative_labels`` int64 scalars, and ``latents`` (C, H, W),
            ``images`` (3, S, S) in [0, 1] or, in test mode, ``noise`` (C, H, W); float32. For training also ``paths``.

        Raises:
            IndexError: ``index`` is out of range.
            CacheError: A file of latents is missing, damaged or of another kind.
            ValueError: A file holds something else than expected.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'item {index} of an ImageNet data set of {len(self)}')
        return self._completed(index, self._test_item(index) if self.test_mode else self._training_item(index))

    def __getitems__(self, indices: Sequence[int]) -> list[dict] | dict:
        """Return several items, or, of latents in shards, the batch that they make."""
        if self.test_mode or self._cache is None:
            return [self[index] for index in indices]
        size = len(self)
        for index in indices:
            if not 0 <= index < size:
                raise IndexError(f'item {index} of an ImageNet data set of {size}')
        cache, count = self._cache, len(self._cache)
        numbers = [index % count for index in indices]
        labels = cache.labels[numbers]
        batch = dict(
            paths=[f'{self.data_root}/{path}' for path in cache.paths_of(numbers)],
            latents=cache.batch(numbers, [index >= count for index in indices]),
            labels=torch.from_numpy(labels),
            ids=list(indices),
            name=[self.label_names.get(label, str(label)) for label in labels.tolist()],
        )
        if self.negative_label is not None:
            batch['negative_labels'] = torch.full((len(numbers),), self.negative_label)
        return batch

    def _completed(self, index: int, item: dict) -> dict:
        label = int(item['labels'])
        item.update(ids=index, name=self.label_names.get(label, str(label)))
        if self.negative_label is not None:
            item['negative_labels'] = torch.tensor(self.negative_label)
        return item

    def _test_item(self, index: int) -> dict:
        group = index // self.test_label_repeat
        if self.test_label_sampling == 'equal':
            label = torch.tensor(group % NUM_CLASSES)
        else:
            label = torch.randint(0, NUM_CLASSES, (), generator=torch.Generator().manual_seed(group))
        return dict(labels=label, noise=seeded_noise(index + 1000, self.latent_size))

    def _cached(self, mirrored: int, number: int, latents: torch.Tensor) -> dict:
        cache = self._cache
        path = f'{self.data_root}/{cache.path_of(number)}'
        return dict(paths=path, latents=latents, labels=torch.tensor(int(cache.labels[number])))

    def _training_item(self, index: int) -> dict:
        mirrored, number = divmod(index, self._num_images())
        if self._cache is not None:
            return self._cached(mirrored, number, self._cache.latents(number, bool(mirrored)))
        paths, labels = self._datalist
        path, label = files.join(self.data_root, paths[number]), labels[number]
        item = dict(paths=path)
        if suffix_of(path) in LATENT_SUFFIXES:
            latents, label = read_published_latents(path)
            return dict(item, latents=latents.float(), labels=torch.tensor(label))
        if label is None:
            raise ValueError(f'{path}: the data list gives no label; only files of latents may go without')
        return dict(item, images=as_tensor(adm_square(read_rgb(path), self.image_size)), labels=torch.tensor(label))


def read_label_names(path: str) -> dict[int, str]:
    """Read lines ``label: 'names',``; braces around the whole are allowed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line has another form.
    """
    names = {}
    for number, line in enumerate(_lines(path, 'label2name_path'), 1):
        text = line.strip().strip('{}').strip().removesuffix(',')
        if not text:
            continue
        label, colon, name = text.partition(':')
        if not colon or not label.strip().isdecimal():
            raise ValueError(f"{path}, line {number}: expected label: 'names', found {line.strip()!r}")
        names[int(label)] = name.strip().strip('\'"')
    return names


def read_datalist(path: str) -> tuple[list[str], list[int | None]]:
    """Read lines ``relative/path [label]``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line has another form, or there is none.
    """
    paths, labels = [], []
    for number, line in enumerate(_lines(path, 'datalist_path'), 1):
        words = line.split()
        if not words:
            continue
        if len(words) > 2 or (len(words) == 2 and not words[1].isdecimal()):
            raise ValueError(
                f'{path}, line {number}: expected a path without spaces and a label, found {line.strip()!r}'
            )
        if suffix_of(words[0]) not in LATENT_SUFFIXES + IMAGE_SUFFIXES:
            known = ', '.join(LATENT_SUFFIXES + IMAGE_SUFFIXES)
            raise ValueError(f'{path}, line {number}: {words[0]!r} ends in none of {known}')
        paths.append(words[0])
        labels.append(int(words[1]) if len(words) == 2 else None)
    if not paths:
        raise ValueError(f'{path}: the data list is empty')
    return paths, labels


def suffix_of(path: str) -> str:
    """Extension of a file, in lower case."""
    return PurePosixPath(path).suffix.lower()


def _lines(path: str, argument: str) -> list[str]:
    if not files.is_file(path):
        raise FileNotFoundError(f'{argument}={path!r}: there is no such file')
    return read_lines(path)
