"""Files that a data set of prompts reads, made by hand as the published tools laid them out."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from PIL import Image

from lakonlab.datasets.image_prompt import ImagePrompt

PROMPTS = [f'a picture of {number} cats' for number in range(10)]
WIDTH = 6


def text_source(folder: Path, prompts=PROMPTS) -> dict[str, Any]:
    """A file of prompts, one a line, and the argument of a data set that reads it."""
    (folder / 'prompts.txt').write_text('\n'.join(prompts) + '\n')
    return row_source(folder, 'text', 'prompts.txt')


def row_source(folder: Path, kind: str, name: str) -> dict[str, Any]:
    """Argument of a data set that reads a file by the Hugging Face library."""
    return dict(path=kind, data_files=str(folder / name), cache_dir=str(folder / 'datasets'))


def json_source(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same for rows with several columns."""
    (folder / 'prompts.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
    return row_source(folder, 'json', 'prompts.jsonl')


def quantised(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A tensor in 8 bits, its scale, and what it then stands for, by the published formula."""
    scale = (value.abs().max() / 448).clamp(min=1e-6)
    stored = (value / scale).to(torch.float8_e4m3fn)
    return stored, scale, stored.float() * scale


def embeds_of(number: int, tokens: int, masked: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Embeddings of a prompt as published, and what they mean."""
    generator = torch.Generator().manual_seed(number)
    states, scale, value = quantised(torch.randn(tokens, WIDTH, generator=generator))
    pooled = torch.randn(4, generator=generator).bfloat16()
    stored = dict(encoder_hidden_states=states, encoder_hidden_states_scale=scale, pooled_projections=pooled)
    meant = dict(encoder_hidden_states=value, pooled_projections=pooled.float())
    if masked:
        stored['encoder_hidden_states_mask'] = meant['encoder_hidden_states_mask'] = torch.ones(
            tokens, dtype=torch.int64
        )
    return stored, meant


def write_record(folder: Path, number: int, **fields: Any) -> None:
    """One record of the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    content = pickle.dumps(dict(prompt=PROMPTS[number], **fields))
    (folder / f'{number:012d}.zst').write_bytes(zstandard.ZstdCompressor().compress(content))


def write_datalist(path: Path, names, **columns) -> str:
    """A list of records or images."""
    lines = [
        json.dumps({'filename': name, **{key: values[place] for key, values in columns.items()}})
        for place, name in enumerate(names)
    ]
    content = ('\n'.join(lines) + '\n').encode()
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)
    return str(path)


def write_cache(folder: Path, tokens=(3, 5, 4), masked: bool = True, **columns) -> list[dict[str, torch.Tensor]]:
    """A whole cache of the published layout, and what its embeddings mean."""
    meant = []
    for number, length in enumerate(tokens):
        stored, value = embeds_of(number, length, masked)
        write_record(folder / 'cache', number, prompt_embed_kwargs=stored)
        meant.append(value)
    write_datalist(folder / 'cache.jsonl.gz', [f'{number:012d}' for number in range(len(tokens))], **columns)
    return meant


def write_images(folder: Path, sizes) -> list[np.ndarray]:
    """Images of given heights and widths, named by number, and their pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    for number, array in enumerate(pixels):
        Image.fromarray(array).save(folder / f'{number:03d}.png')
    return pixels


def cached(folder: Path, **arguments: Any) -> ImagePrompt:
    """The data set of :func:`write_cache`."""
    return ImagePrompt(
        str(folder), **{'cache_dir': 'cache', 'cache_datalist_path': str(folder / 'cache.jsonl.gz'), **arguments}
    )
