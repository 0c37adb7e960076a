"""Making latents of labelled images: one posterior sample of an autoencoder for each, once for its mirror image."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lakonlab.datasets.imagenet import read_datalist
from lakonlab.datasets.images import adm_square, as_tensor, read_rgb
from lakonlab.datasets.latent_cache import MIRRORED, PLAIN
from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.index import LATENTS, Table, pack_texts
from lakonlab.datasets.prompt_cache.plan import keep_published_plan
from lakonlab.datasets.prompt_cache.torch_file import read_published_latents
from lakonlab.datasets.prompt_cache.writer import CacheWriter, num_threads
from lakonlab.ops.random_source import SeededSource
from lakonlab.ranks import ALONE, Ranks
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.datasets')

FLIPS = ('both', 'none', 'random')
POSTERIORS = ('sample', 'argmax')
PUBLISHED_SUFFIX = '.pth'
#: Steps of the random source: what is drawn for an image as it is, for its mirror image, and which of them is used.
STEPS = {PLAIN: 0, MIRRORED: 1, 'flip': 2}


class LabelledImages:
    """Images of a data list, as squares.

    Args:
        data_root: Their folder.
        datalist_path: A line ``relative/path label`` for each.
        image_size: Side of the squares in pixels.

    Raises:
        ValueError: An image has no label.
    """

    def __init__(self, data_root: str, datalist_path: str, image_size: int):
        self.data_root, self.image_size = str(data_root), image_size
        self.paths, labels = read_datalist(str(datalist_path))
        without = [path for path, label in zip(self.paths, labels) if label is None]
        if without:
            raise ValueError(f'{datalist_path}: {without[0]} has no label; expected lines `relative/path label`')
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, number: int) -> Tensor:
        """(3, S, S), float32 in [-1, 1]."""
        path = files.join(self.data_root, self.paths[number])
        return as_tensor(adm_square(read_rgb(path), self.image_size)) * 2 - 1

    def digest(self) -> str:
        """Digest of the list."""
        lines = '\n'.join(f'{path} {label}' for path, label in zip(self.paths, self.labels))
        return hashlib.sha256(lines.encode()).hexdigest()


class LatentEncoder:
    """Encodes images of a list.

    Args:
        images: The images.
        vae: The autoencoder, on its device.
        seed: Seed of the draws, which are functions of it and of the number of the image alone.
        posterior: ``'sample'`` or ``'argmax'``, its mode.
        dtype: Dtype of the latents.
    """

    def __init__(
        self, images: LabelledImages, vae: Any, seed: int, posterior: str = 'sample', dtype: torch.dtype = torch.float32
    ):
        self.images, self.vae, self.seed, self.posterior, self.dtype = images, vae, seed, posterior, dtype
        parameter = next(vae.parameters())
        self.device, self.vae_dtype = parameter.device, parameter.dtype

    @property
    def plan(self) -> dict[str, Any]:
        """What latents depend on, as far as it is known here."""
        return {
            'images_sha256': self.images.digest(),
            'image_size': self.images.image_size,
            'posterior': self.posterior,
            'dtype': str(self.dtype).removeprefix('torch.'),
            'seed': self.seed,
        }

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Images in [-1, 1], (B, 3, S, S), read by several threads."""
        with ThreadPoolExecutor(num_threads(), thread_name_prefix='images') as threads:
            return torch.stack(list(threads.map(self.images.read, numbers)))

    def encode(self, images: Tensor, numbers: Sequence[int], column: str) -> Tensor:
        """Latents on the CPU."""
        source = SeededSource(self.seed, STEPS[column], row_ids=numbers)
        images = images.to(self.device, self.vae_dtype)
        latents = self.vae.encode(images, sample_mode=self.posterior, source=source)
        if not bool(latents.isfinite().all()):
            raise CacheError(f'latents of images {numbers[0]} to {numbers[-1]} are not finite: try --dtype float32')
        return latents.to('cpu', self.dtype)

    def flips(self, numbers: Sequence[int]) -> Tensor:
        """Which images are mirrored where only one of both is kept, (B,), bool."""
        return SeededSource(self.seed, STEPS['flip'], row_ids=numbers).uniform('flip', (len(numbers),)) < 0.5

    def rows(self, numbers: Sequence[int], flip: str) -> Iterator[dict[str, Tensor]]:
        """Rows of a cache of ours.

        Args:
            numbers: Numbers of images.
            flip: ``'both'``, the image and its mirror image; ``'none'``; or ``'random'``, one of them.
        """
        images = self.read(numbers)
        if flip == 'random':
            chosen = self.flips(numbers)
            images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
        columns = {PLAIN: self.encode(images, numbers, PLAIN)}
        if flip == 'both':
            columns[MIRRORED] = self.encode(images.flip(-1), numbers, MIRRORED)
        for position in range(len(numbers)):
            yield {name: values[position] for name, values in columns.items()}


def make_latent_cache(
    encoder: LatentEncoder,
    folder: str,
    *,
    flip: str,
    batch_size: int,
    rows_per_shard: int,
    plan: Mapping[str, Any],
    ranks: Ranks = ALONE,
) -> bool:
    """Make a cache of our layout, or what it lacks.

    Args:
        encoder: Makes latents.
        folder: The cache.
        flip: See :meth:`LatentEncoder.rows`.
        batch_size: Images encoded at once.
        rows_per_shard: Images of a shard.
        plan: What else the latents depend on.
        ranks: The processes.

    Returns:
        Whether there was anything to do.

    Raises:
        CacheError: The folder holds another cache, or the latents are of no use.
    """
    images = encoder.images
    writer = CacheWriter(
        folder,
        LATENTS,
        len(images),
        {LATENTS: Table(len(images), rows_per_shard)},
        {**encoder.plan, 'flip': flip, **plan},
        ranks,
    )
    if not writer.start():
        return False
    writer.fill(LATENTS, lambda numbers: encoder.rows(numbers, flip), batch_size, 'latents', compressed=False)
    columns = {'labels': images.labels, **pack_texts(images.paths, 'paths')}
    writer.finish({'columns': [PLAIN, MIRRORED] if flip == 'both' else [PLAIN]}, columns)
    return True


def published_names(images: LabelledImages) -> list[str]:
    """Names of the files of the published layout, ``<stem>.pth`` for each image.

    Raises:
        ValueError: Two images would have the same one.
    """
    names = [path.rpartition('.')[0] + PUBLISHED_SUFFIX for path in images.paths]
    if len(set(names)) < len(names):
        raise ValueError(
            'two images of the list differ at most in their extension, so their latents would share a name'
        )
    return names


def make_published_latents(
    encoder: LatentEncoder,
    folder: str,
    out_datalist_path: str,
    *,
    flip: str,
    batch_size: int,
    plan: Mapping[str, Any],
    ranks: Ranks = ALONE,
) -> int:
    """Make latents in the published layout, a file ``<stem>.pth`` for each image, and at last their list.

    Files that are there and whole are kept, if they were begun with the same plan; where there is no plan, for another
    program made them, if label and dtype are right. Batches are the same however many are missing, so that what a file
    holds depends neither on that nor on the number of processes.

    Args:
        encoder: Makes latents.
        folder: Folder of the files.
        out_datalist_path: The list, which says that all are there.
        flip: ``'random'`` or ``'none'``.
        batch_size: Images encoded at once.
        plan: What else the latents depend on.
        ranks: The processes.

    Returns:
        Number of files written by all processes.

    Raises:
        CacheError: The folder was begun with another plan, a file that is there is of another label or dtype, or the
            list of another cache is there.
        ValueError: Two images would share a file.
    """
    images, names = encoder.images, published_names(encoder.images)
    ranks.on_main(
        lambda: keep_published_plan(
            folder, {**encoder.plan, 'flip': flip, **plan}, lambda: bool(files.list_names(folder))
        )
    )
    lines = ''.join(f'{name} {label}\n' for name, label in zip(names, images.labels)).encode()
    has_list = ranks.on_main(lambda: _has_list(out_datalist_path, lines))
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    own = batches[ranks.rank :: ranks.world_size]
    count = 0
    with (
        tqdm(total=sum(map(len, own)), desc='latents', disable=not ranks.is_main, unit='') as progress,
        ThreadPoolExecutor(num_threads(), thread_name_prefix='latents') as threads,
    ):
        for batch in own:
            paths = [files.join(folder, names[number]) for number in batch]
            whole = threads.map(
                lambda pair: _is_whole(*pair, encoder.dtype), zip(paths, images.labels[batch.start : batch.stop])
            )
            missing = [position for position, is_whole in enumerate(whole) if not is_whole]
            if missing:
                rows = [row[PLAIN] for row in encoder.rows(list(batch), flip)]
                jobs = [
                    threads.submit(_write, paths[position], rows[position], int(images.labels[batch[position]]))
                    for position in missing
                ]
                for job in jobs:
                    job.result()
                count += len(missing)
            progress.update(len(batch))
    counts = ranks.all_gather(count)
    if not has_list:
        ranks.on_main(lambda: files.write_bytes(out_datalist_path, lines))
    return sum(counts)


def _has_list(path: str, lines: bytes) -> bool:
    if not files.is_file(path):
        return False
    if files.read_bytes(path) != lines:
        raise CacheError(
            f'{path} is there and lists other files or labels than those that are to be made; nothing is overwritten: '
            'name another list, or move that one away'
        )
    return True


def _is_whole(path: str, label: int, dtype: torch.dtype) -> bool:
    if not files.is_file(path):
        return False
    try:
        latents, found = read_published_latents(path)
    except CacheError as error:
        logger.warning('%s; it is made again', error)
        return False
    if found != label:
        raise CacheError(f'{path} has label {found}, expected {label}: choose another folder; nothing is overwritten')
    if latents.dtype != dtype:
        raise CacheError(
            f'{path} is of {latents.dtype}, expected {dtype}: choose another folder; nothing is overwritten'
        )
    return True


def _write(path: str, latents: Tensor, label: int) -> None:
    stream = io.BytesIO()
    torch.save({'x': latents.clone(), 'y': torch.tensor(label)}, stream)
    files.write_bytes(path, stream.getvalue())
