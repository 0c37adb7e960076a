"""Prompts whose embeddings, and perhaps latents, were computed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from lakonlab.datasets.collate import pad_tokens
from lakonlab.datasets.datalist import read_datalist
from lakonlab.datasets.prompt_cache import open_prompt_cache
from lakonlab.datasets.prompt_record import PromptRecord

STATES, MASK, POOLED = 'encoder_hidden_states', 'encoder_hidden_states_mask', 'pooled_projections'


class CachedPrompts:
    """The records of a prompt cache, in the order of its data list.

    Args:
        folder: Folder of the cache, local or a URL.
        datalist_path: List of its records; None for that of the cache itself.
        pad_seq_len: Number of text tokens to bring embeddings to; None to leave them as they are stored.
        ignore_latents: Leave out latents; their shape still counts.
    """

    def __init__(self, folder: str, datalist_path: str | None, pad_seq_len: int | None, ignore_latents: bool):
        self.datalist = None if datalist_path is None else read_datalist(datalist_path, 'cache_datalist_path')
        self.cache = open_prompt_cache(folder, None if self.datalist is None else self.datalist.names)
        self.pad_seq_len = pad_seq_len
        self.ignore_latents = ignore_latents

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> PromptRecord:
        """The record of one prompt."""
        return self.records([index])[0]

    def records(self, indices: Sequence[int]) -> list[PromptRecord]:
        """The records of several prompts, which are read together."""
        names = [self.cache.names[index] for index in indices]
        return [self._record(name, record) for name, record in zip(names, self.cache.records(names))]

    def _record(self, name: str, record: Mapping[str, Any]) -> PromptRecord:
        latents = record.get('latents')
        size = record.get('latent_size') if latents is None else latents.shape
        return PromptRecord(
            prompt=record['prompt'],
            conditions={
                'prompt_embed_kwargs': fit_embeds(
                    record['prompt_embed_kwargs'], self.pad_seq_len, f'{name!r} of the prompt cache'
                )
            },
            latents=None if self.ignore_latents else latents,
            latent_size=None if size is None else tuple(size),
            condition_latents=record.get('condition_latents'),
        )

    @cached_property
    def bucket_ids(self) -> np.ndarray | None:
        """Bucket of every record; None if neither the list, nor without one the cache, says anything of buckets."""
        if self.datalist is None:
            tell = getattr(self.cache, 'bucket_ids', None)
            ids = None if tell is None else tell()
        else:
            ids = self.datalist.bucket_ids
        return None if ids is None else np.asarray(ids, dtype=np.int64)


def fit_embeds(embeds: Mapping[str, Tensor], length: int | None, where: str) -> dict[str, Tensor]:
    """Embeddings of a prompt for a network, with a given number of text tokens.

    What lies beyond is cut off; what lacks is filled with zeros, which the mask marks as padding.

    Args:
        embeds: ``encoder_hidden_states`` (T, D), ``encoder_hidden_states_mask`` (T,), ``pooled_projections`` and what
            else the network takes.
        length: Number of tokens; None for what there are.
        where: Whose embeddings they are, for messages.

    Raises:
        ValueError: They must be padded and have no mask.
    """
    fitted = {name: value.float() if value.is_floating_point() else value for name, value in embeds.items()}
    states = fitted.get(STATES)
    if length is None or states is None:
        return fitted
    if len(states) < length and MASK not in fitted:
        raise ValueError(
            f'pad_seq_len={length}, but {where} has {len(states)} text tokens and no mask, so that the network would '
            f'attend to padding; set pad_seq_len={len(states)}, or embed the prompts with {length} tokens'
        )
    for name in (STATES, MASK):
        if name in fitted:
            fitted[name] = pad_tokens(fitted[name], length)
    return fitted
