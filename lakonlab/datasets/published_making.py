"""Making a cache of prompts in the published layout, a file for each."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.plan import keep_published_plan
from lakonlab.datasets.prompt_cache.published import (
    SUFFIX,
    list_records,
    read_published_record,
    write_published_record,
)
from lakonlab.datasets.prompt_cache.record import Record, precision_of
from lakonlab.datasets.prompt_cache.sharded import number_name
from lakonlab.datasets.prompt_cache.writer import num_threads
from lakonlab.datasets.prompt_making import IMAGES, PromptEncoder
from lakonlab.ranks import ALONE, Ranks
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.datasets')

OTHER_CACHE = 'the folder holds another cache. Choose another cache_dir; nothing is overwritten.'


def make_published_cache(
    encoder: PromptEncoder, folder: str, *, batch_size: int, plan: Mapping[str, Any], ranks: Ranks = ALONE
) -> int:
    """Make a cache in the published layout, a file for each prompt.

    Files that are there and whole are kept, if they were begun with the same plan; where there is no plan, for another
    program made them, if prompt, precision and latents are right. Batches are the same however many are missing, so
    that what a file holds depends neither on that nor on the number of processes.

    Args:
        encoder: Makes embeddings and latents.
        folder: The cache.
        batch_size: Prompts embedded at once.
        plan: What else the records depend on.
        ranks: The processes.

    Returns:
        Number of files written by all processes.

    Raises:
        CacheError: The folder was begun with another plan, or a file that is there is of another prompt.
    """
    items = encoder.items
    ranks.on_main(lambda: keep_published_plan(folder, {**encoder.plan, **plan}, lambda: bool(list_records(folder))))
    batches = [range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size)]
    own = batches[ranks.rank :: ranks.world_size]
    count = 0
    with (
        tqdm(total=sum(map(len, own)), desc='prompts', disable=not ranks.is_main, unit='') as progress,
        ThreadPoolExecutor(num_threads(), thread_name_prefix='records') as threads,
    ):
        for batch in own:
            wanted = [(files.join(folder, number_name(number) + SUFFIX), items.prompt(number)) for number in batch]
            whole = threads.map(lambda pair: _is_whole(*pair, encoder), wanted)
            missing = [place for place, is_whole in enumerate(whole) if not is_whole]
            if missing:
                records = _records(encoder, list(batch))
                jobs = [threads.submit(_write, wanted[place][0], records[place]) for place in missing]
                for job in jobs:
                    job.result()
                count += len(missing)
            progress.update(len(batch))
    return sum(ranks.all_gather(count))


def _records(encoder: PromptEncoder, numbers: list[int]) -> list[Record]:
    items = encoder.items
    latents = encoder.latents(numbers)
    return [
        Record(
            items.prompt(number),
            embeds,
            rest,
            None if 'latents' in rest else items.latent_size(number),
        )
        for number, embeds, rest in zip(numbers, encoder.embeds(numbers), latents, strict=True)
    ]


def _is_whole(path: str, prompt: str, encoder: PromptEncoder) -> bool:
    if not files.is_file(path):
        return False
    try:
        found = read_published_record(files.read_bytes(path), path)
    except CacheError as error:
        logger.warning('%s It is made again.', error)
        return False
    if found.prompt != prompt:
        raise CacheError(
            f'{path} is of the prompt {reprlib.repr(found.prompt)}, expected {reprlib.repr(prompt)}: {OTHER_CACHE}'
        )
    for what, fields, expected in (
        ('embeddings', found.embeds, encoder.precision),
        ('latents', found.latents, encoder.latents_precision),
    ):
        precision = precision_of(fields)
        if precision is not None and precision != expected:
            raise CacheError(f'{path} holds {what} in {precision}, expected {expected}: {OTHER_CACHE}')
    stored = sorted(name for name in IMAGES if name in found.latents)
    if stored != sorted(encoder.items.images):
        wanted = ' and '.join(sorted(encoder.items.images)) or 'none'
        raise CacheError(f'{path} holds {" and ".join(stored) or "no latents"}, expected {wanted}: {OTHER_CACHE}')
    return True


def _write(path: str, record: Record) -> None:
    files.write_bytes(path, write_published_record(record))
