"""Making reference statistics of images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lakonlab.datasets.images import as_tensor, read_rgb
from lakonlab.evaluation.extractor import FeatureExtractor
from lakonlab.evaluation.frechet import Moments
from lakonlab.evaluation.images import GRID_FILE, ORIGIN_FILE, is_image_name
from lakonlab.evaluation.preparation import Preparation
from lakonlab.evaluation.samples import extract, real_images
from lakonlab.evaluation.statistics import ReferenceStatistics
from lakonlab.storage import files

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


def make_reference(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    preparation: Preparation,
    source: Mapping[str, Any],
    num_images: int | None = None,
    total: int | None = None,
    keep_features: bool = True,
    device: torch.device | str = 'cpu',
    batch_size: int = 64,
) -> ReferenceStatistics:
    """Statistics of images.

    Args:
        batches: Images, each batch of shape (B, C, H, W), float in [0, 1].
        extractor: The network.
        preparation: How images are brought to its size.
        source: Where the images come from, as plain data.
        num_images: Only the first so many images count; None for all.
        total: How many there are, if known, for the progress bar.
        keep_features: Whether to keep their features, which KID and precision and recall need.
        device: Where the network computes.
        batch_size: Images that it is given at once.

    Returns:
        The statistics, with what they depend on.

    Raises:
        ValueError: There are fewer than two images, or fewer than ``num_images``.
    """
    moments, kept = Moments(), []
    total = num_images if total is None or num_images is None else min(total, num_images)
    with tqdm(total=total, desc='features', unit='image', leave=False, disable=None) as progress:
        for images in batches:
            if num_images is not None:
                images = images[: num_images - moments.count]
            features = extract(extractor, images.to(device), batch_size, preparation).embedding.float().cpu()
            moments.update(features)
            if keep_features:
                kept.append(features)
            progress.update(len(images))
            if moments.count == num_images:
                break
    if moments.count < max(2, num_images or 0):
        raise ValueError(f'there are only {moments.count} images, expected at least {max(2, num_images or 0)}')
    provenance = dict(
        source=dict(source),
        extractor=extractor.protocol(),
        preparation=preparation.protocol(),
        torch=torch.__version__,
    )
    features = torch.cat(kept) if keep_features else None
    return ReferenceStatistics(moments.mean(), moments.covariance(), moments.count, features, provenance)


def images_of_folder(folder: str | Path, batch_size: int = 64) -> tuple[Iterator[Tensor], dict[str, Any]]:
    """All images below a folder, in the order of their names.

    Where an evaluation wrote its samples, they are all that counts, not the grid that shows them once more.

    Args:
        folder: The folder, of any scheme.
        batch_size: Most images of a batch; those of a batch are of one size.

    Returns:
        The batches, and what the source is.

    Raises:
        FileNotFoundError: There are no images.
    """
    listed = files.list_files(folder)
    is_sample = _is_sample_of_folder(info.name for info in listed)
    found = [info for info in listed if info.name.lower().endswith(IMAGE_SUFFIXES) and is_sample(info.name)]
    if not found:
        raise FileNotFoundError(f'{folder} has no images ({", ".join(IMAGE_SUFFIXES)})')
    listing = '\n'.join(f'{info.name} {info.size}' for info in found)
    source = dict(kind='folder', path=str(folder), num_files=len(found))
    source['listing_sha256'] = hashlib.sha256(listing.encode()).hexdigest()

    def batches() -> Iterator[Tensor]:
        batch: list[Tensor] = []
        for info in found:
            image = as_tensor(read_rgb(files.join(folder, info.name)))
            if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
                yield torch.stack(batch)
                batch = []
            batch.append(image)
        yield torch.stack(batch)

    return batches(), source


def _is_sample_of_folder(names: Iterable[str]) -> Callable[[str], bool]:
    """Tells of each file what counts: in a folder with ``samples.json`` the samples; beside samples no grid."""
    recorded, with_samples = set(), set()
    for folder, _, file in (name.rpartition('/') for name in names):
        if file == ORIGIN_FILE:
            recorded.add(folder)
        elif is_image_name(file):
            with_samples.add(folder)

    def is_sample(name: str) -> bool:
        folder, _, file = name.rpartition('/')
        if folder in recorded:
            return is_image_name(file)
        return not (folder in with_samples and file == GRID_FILE)

    return is_sample


def images_of_npz(path: str | Path, batch_size: int = 64) -> tuple[Iterator[Tensor], dict[str, Any]]:
    """The images of an ``.npz`` of ADM: ``arr_0``, uint8 of shape (N, H, W, 3).

    Args:
        path: The file, of any scheme.
        batch_size: Most images of a batch.

    Returns:
        The batches, and what the source is.

    Raises:
        ValueError: It is damaged, or holds something else.
    """
    content = files.fetch(path).read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            images = archive['arr_0']
    except Exception as error:  # zip files fail in many ways
        raise ValueError(f'{path} has no images arr_0 that can be read ({type(error).__name__}: {error})') from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f'{path}: arr_0 is {images.dtype} of shape {images.shape}, expected uint8 (N, H, W, 3)')
    source = dict(kind='npz', path=str(path), num_files=len(images), sha256=hashlib.sha256(content).hexdigest())

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(images), batch_size):
            part = torch.from_numpy(images[start : start + batch_size])
            yield part.permute(0, 3, 1, 2).float() / 255

    return batches(), source


def images_of_split(data: Mapping[str, Any], split: str) -> tuple[Iterator[Tensor], dict[str, Any]]:
    """The real images of a data split.

    Args:
        data: Section ``data`` of a config.
        split: Key of a data set in it.

    Returns:
        The batches, and what the source is.
    """
    from lakonlab.evaluation.evaluate import build_evaluation_loader

    loader = build_evaluation_loader(data, split)
    source = dict(kind='data set', config=dict(data[split]), num_files=len(loader.dataset))
    return (real_images(batch) for batch in loader), source
