"""Embedding the prompts of a data set, and encoding the images that belong to them, for a cache of either layout."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lakonlab.datasets.collate import collate
from lakonlab.datasets.image_prompt import ImagePrompt
from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.index import LATENTS, PROMPTS, Table
from lakonlab.datasets.prompt_cache.record import quantise, without_padding
from lakonlab.datasets.prompt_cache.rows import text_tensor
from lakonlab.datasets.prompt_cache.sharded import EMBEDS, PROMPT
from lakonlab.datasets.prompt_cache.writer import CacheWriter, num_threads
from lakonlab.ops.random_source import SeededSource
from lakonlab.ranks import ALONE, Ranks

logger = logging.getLogger('lakonlab.datasets')

IMAGES = {'latents': 'images', 'condition_latents': 'condition_images'}
#: Steps of the random source, so that an image and its condition get different draws.
STEPS = {'latents': 0, 'condition_latents': 1}


class PromptItems:
    """What a data set of prompts holds, item by item and part by part.

    Args:
        dataset: The data set, which reads prompts as text.
    """

    def __init__(self, dataset: ImagePrompt):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.positions)

    def _record(self, number: int) -> Any:
        return self.dataset.source[self.dataset.positions[number]]

    def arguments(self, number: int) -> dict[str, Any]:
        """Arguments of the text encoder."""
        return self._record(number).conditions['prompt_kwargs']

    def prompt(self, number: int) -> str:
        """The text."""
        return self._record(number).prompt

    def key(self, number: int) -> list[Any]:
        """What decides what an item is embedded as."""
        record = self._record(number)
        return [record.prompt, record.conditions['prompt_kwargs']]

    def image(self, number: int, name: str) -> Tensor:
        """An image in [-1, 1], (3, H, W).

        Args:
            number: Number of the item.
            name: ``images`` or ``condition_images``.
        """
        return getattr(self.dataset, name)[self.dataset.positions[number]] * 2 - 1

    @property
    def images(self) -> dict[str, str]:
        """Name of latents -> name of the images that they are made of, where there are some."""
        return {latents: images for latents, images in IMAGES.items() if getattr(self.dataset, images) is not None}

    def latent_size(self, number: int) -> tuple[int, ...]:
        """Shape of the latents of an item that has no image."""
        return self.dataset.size_of(self.dataset.positions[number], self._record(number))

    @cached_property
    def latent_sizes(self) -> list[tuple[int, ...]] | None:
        """Shape of the latents of every item; None where there are images, whose latents tell it.

        Raises:
            ValueError: A size in pixels is of no use.
        """
        if 'latents' in self.images:
            return None
        return [self.latent_size(number) for number in tqdm(range(len(self)), desc='sizes', unit='')]

    @property
    def bucket_ids(self) -> np.ndarray | None:
        """Bucket of every item; None if the data set has none."""
        return None if self.dataset.bucket_ids is None else self.dataset.bucket_ids[:: self.dataset.repeat]


class PromptEncoder:
    """Embeds prompts and encodes images.

    Args:
        items: The data set.
        text_encoder: On its device.
        vae: On its device; None if there are no images.
        seed: Seed of draws from the autoencoder's posterior, which are functions of it and of the item's number alone.
        precision: Of embeddings, see :func:`~lakonlab.datasets.prompt_cache.record.quantise`.
        latents_precision: Of latents.
    """

    def __init__(
        self,
        items: PromptItems,
        text_encoder: Any,
        vae: Any = None,
        seed: int = 0,
        precision: str = 'fp8',
        latents_precision: str = 'fp8',
    ):
        self.items, self.text_encoder, self.vae, self.seed = items, text_encoder, vae, seed
        self.precision, self.latents_precision = precision, latents_precision
        if items.images and vae is None:
            raise ValueError(f'the data set has {", ".join(items.images.values())}, but model.vae is missing')

    @property
    def plan(self) -> dict[str, Any]:
        """What records depend on, as far as it is known here."""
        images = {'latents_precision': self.latents_precision, 'seed': self.seed} if self.items.images else {}
        return {'precision': self.precision, 'latents': sorted(self.items.images), **images}

    def embeds(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Embeddings of items as they are stored, without padding that a mask excludes."""
        arguments = collate([self.items.arguments(number) for number in numbers])
        for row in rows_of(self.text_encoder(**arguments), len(numbers)):
            yield quantise(without_padding(row), self.precision)

    def embeds_rows(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Rows of the table of embeddings."""
        for number, row in zip(numbers, self.embeds(numbers), strict=True):
            yield {PROMPT: text_tensor(self.items.prompt(number)), **row}

    def latents(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """Latents of the images of items as they are stored; images of one size are encoded together."""
        result: list[dict[str, Tensor]] = [{} for _ in numbers]
        parameter = next(self.vae.parameters()) if self.items.images else None
        for name, images in self.items.images.items():
            with ThreadPoolExecutor(num_threads(), thread_name_prefix='images') as threads:
                read = list(threads.map(lambda number, images=images: self.items.image(number, images), numbers))
            for shape in dict.fromkeys(image.shape for image in read):
                places = [place for place, image in enumerate(read) if image.shape == shape]
                source = SeededSource(self.seed, STEPS[name], row_ids=[numbers[place] for place in places])
                batch = torch.stack([read[place] for place in places]).to(parameter.device, parameter.dtype)
                encoded = self.vae.encode(batch, sample_mode='sample', source=source).float()
                for place, row in zip(places, encoded, strict=True):
                    result[place].update(quantise({name: row}, self.latents_precision))
        return result


def rows_of(embeds: Mapping[str, Any], count: int) -> list[dict[str, Tensor]]:
    """What a text encoder returns, prompt by prompt, on the CPU.

    Args:
        embeds: Tensors with ``count`` rows; None is left out.
        count: Number of prompts.

    Raises:
        CacheError: A value is no such tensor.
    """
    found = {name: value for name, value in embeds.items() if value is not None}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != count:
            raise CacheError(f'the text encoder returned a {name} that is no tensor with a row for each prompt')
    cpu = {name: value.detach().cpu() for name, value in found.items()}
    return [{name: value[number] for name, value in cpu.items()} for number in range(count)]


@dataclass(frozen=True)
class UniquePrompts:
    """Which items have the same prompt.

    Args:
        first: Number of the first item of every different prompt, in order.
        row: Number of the prompt among the different ones, of every item.
        digest: Digest of all prompts in order.
    """

    first: np.ndarray
    row: np.ndarray
    digest: str


def unique_prompts(items: PromptItems, show: bool = True) -> UniquePrompts:
    """Find equal prompts.

    Args:
        items: The data set.
        show: Whether to show a progress bar.
    """
    known: dict[bytes, int] = {}
    first: list[int] = []
    row = np.empty(len(items), dtype=np.int64)
    whole = hashlib.sha256()
    for number in tqdm(range(len(items)), desc='reading prompts', disable=not show, unit=''):
        text = json.dumps(items.key(number), sort_keys=True, default=str).encode()
        key = hashlib.blake2b(text, digest_size=16).digest()
        whole.update(key)
        row[number] = known.setdefault(key, len(first))
        if row[number] == len(first):
            first.append(number)
    return UniquePrompts(np.asarray(first, dtype=np.int64), row, whole.hexdigest())


def make_prompt_cache(
    encoder: PromptEncoder,
    folder: str,
    *,
    batch_size: int,
    rows_per_shard: int,
    plan: Mapping[str, Any],
    ranks: Ranks = ALONE,
) -> bool:
    """Make a cache of our layout, or what it lacks.

    Args:
        encoder: Makes embeddings and latents.
        folder: The cache.
        batch_size: Prompts embedded at once.
        rows_per_shard: Rows of a shard.
        plan: What else the rows depend on.
        ranks: The processes.

    Returns:
        Whether there was anything to do.

    Raises:
        CacheError: The folder holds another cache, or what was made is of no use.
    """
    items = encoder.items
    unique = unique_prompts(items, ranks.is_main)
    tables = {EMBEDS: Table(len(unique.first), rows_per_shard)}
    if items.images:
        tables[LATENTS] = Table(len(items), rows_per_shard)
    writer = CacheWriter(
        folder,
        PROMPTS,
        len(items),
        tables,
        {'prompts_sha256': unique.digest, **encoder.plan, **plan},
        ranks,
    )
    if not writer.start():
        return False
    facts, columns = ranks.on_main(lambda: _sizes(items))
    if ranks.is_main and len(unique.first) < len(items):
        logger.info('%d different prompts among %d', len(unique.first), len(items))
    writer.fill(
        EMBEDS, lambda rows: encoder.embeds_rows([int(unique.first[row]) for row in rows]), batch_size, 'embeddings'
    )
    if items.images:
        writer.fill(LATENTS, encoder.latents, batch_size, 'latents', compressed=False)
    if len(unique.first) < len(items):
        columns['embeds_row'] = unique.row
    if items.bucket_ids is not None:
        columns['bucket_ids'] = np.asarray(items.bucket_ids, dtype=np.int64)
    writer.finish(facts, columns)
    return True


def _sizes(items: PromptItems) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Shape of the latents of items without images: one for all, or a column."""
    sizes = items.latent_sizes
    if sizes is None:
        return {}, {}
    if len(set(sizes)) == 1:
        return {'latent_size': list(sizes[0])}, {}
    column = np.zeros((len(sizes), max(map(len, sizes))), dtype=np.int64)
    for number, size in enumerate(sizes):
        column[number, : len(size)] = size
    return {}, {'latent_size': column}
