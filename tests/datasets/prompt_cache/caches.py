"""Caches for tests: records as published, written with Python's own pickle and zstandard; and caches of ours."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import zstandard

from lakonlab.datasets.prompt_cache.index import PROMPTS, Table
from lakonlab.datasets.prompt_cache.rows import text_tensor
from lakonlab.datasets.prompt_cache.sharded import EMBEDS, PROMPT
from lakonlab.datasets.prompt_cache.writer import CacheWriter

WIDTH = 24


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def published_fp8(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight bits and their scale, as the specification says."""
    scale = (value.float().abs().max() / 448).clamp(min=1e-6)
    return (value.float() / scale).to(torch.float8_e4m3fn), scale


def qwen_record(number: int = 0, tokens: int = 7, padded: int = 20, **more: object) -> dict:
    """A record of Qwen-Image's layout; the states of padding are zeros that the mask excludes."""
    states = torch.zeros(padded, WIDTH)
    states[:tokens] = normal(tokens, WIDTH, seed=number)
    mask = torch.zeros(padded, dtype=torch.int64)
    mask[:tokens] = 1
    values, scale = published_fp8(states)
    embeds = {
        'encoder_hidden_states': values,
        'encoder_hidden_states_scale': scale,
        'encoder_hidden_states_mask': mask,
    }
    return {'prompt': f'prompt {number}', 'prompt_embed_kwargs': embeds, 'latent_size': (16, 8, 8), **more}


def flux_record(number: int = 0, tokens: int = 20) -> dict:
    """A record of FLUX's layout: all tokens, no mask, and a pooled embedding."""
    values, scale = published_fp8(normal(tokens, WIDTH, seed=number))
    embeds = {
        'encoder_hidden_states': values,
        'encoder_hidden_states_scale': scale,
        'pooled_projections': normal(12, seed=number + 1000).bfloat16(),
    }
    return {'prompt': f'prompt {number}', 'prompt_embed_kwargs': embeds, 'latent_size': (16, 8, 8)}


def write_published(folder: Path, records: list[dict], protocol: int = 4) -> Path:
    """A folder of the published layout; streams without checksum, as published."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        (folder / f'{number:012d}.zst').write_bytes(compressed(pickle.dumps(record, protocol=protocol)))
    return folder


def compressed(content: bytes) -> bytes:
    """A zstandard stream, whose size its header does not tell."""
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=False).compressobj()
    return compressor.compress(content) + compressor.flush()


def write_ours(folder: Path, rows: list[dict[str, torch.Tensor]], rows_per_shard: int = 3, **columns) -> Path:
    """A cache of ours with given fields."""
    writer = CacheWriter(str(folder), PROMPTS, len(rows), {EMBEDS: Table(len(rows), rows_per_shard)}, {'of': 'tests'})
    writer.start()

    def make(numbers):
        return [{PROMPT: text_tensor(f'prompt {number}'), **rows[number]} for number in numbers]

    writer.fill(EMBEDS, make, 2, 'rows')
    writer.finish({}, columns)
    return folder


def raw(tensor: torch.Tensor) -> bytes:
    """Bytes of a tensor, with its form."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b''
    return f'{tensor.dtype} {tuple(tensor.shape)} '.encode() + content


def same_fields(first: dict, second: dict) -> bool:
    """Whether two dicts of tensors agree bit for bit."""
    return first.keys() == second.keys() and all(raw(first[name]) == raw(second[name]) for name in first)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but those whose names begin with a dot: locks."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name[0] != '.'}
