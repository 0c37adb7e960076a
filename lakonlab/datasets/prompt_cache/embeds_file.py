"""A file of one prompt's embeddings, as ``negative_prompt_embeds_path`` of a data set names it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.record import (
    LEGACY_NAMES,
    MASK_SUFFIX,
    dequantise,
    embeds_of,
    quantise,
    without_padding,
)
from lakonlab.datasets.prompt_cache.torch_file import read_torch_file
from lakonlab.storage import files

#: What the tools that embed prompts are called with; the option may be left out where the config has a text encoder.
CACHE_ARGUMENTS = 'CONFIG [--text-encoder CONFIG]'
COMMAND = f'python tools/cache_negative_prompt.py {CACHE_ARGUMENTS}'
SAFETENSORS_SUFFIX = '.safetensors'
TORCH_SUFFIXES = ('.pth', '.pt')
#: What a dict has that is a record, and not the embeddings themselves.
RECORD_KEYS = ('prompt_embed_kwargs', *LEGACY_NAMES)
STATES = 'encoder_hidden_states'


def read_embeds(path: str | Path) -> dict[str, Tensor]:
    """Read the embeddings of a negative prompt.

    Args:
        path: A ``.safetensors`` file that ``tools/cache_negative_prompt.py`` wrote, or a ``.pth`` file with a dict in
            the layout of a cached record; objects in it are never unpickled.

    Returns:
        Arguments of the transformer without batch dimension, floating-point ones in float32; padded no further than
        they are stored.

    Raises:
        CacheError: There is no such file, it cannot be read, or holds something else than embeddings of one prompt.
    """
    if not files.is_file(path):
        raise CacheError(f'negative_prompt_embeds_path: there is no {path}; make it with `{COMMAND} --out {path}`')
    where = f'negative_prompt_embeds_path={str(path)!r}'
    try:
        embeds = dequantise(embeds_of(_read(str(path)), where))
        _require_one_prompt(embeds, where)
    except CacheError as error:
        raise CacheError(f'{error}. Make it again with `{COMMAND} --out {path}`') from error
    return embeds


def _read(path: str) -> dict[str, Any]:
    if path.endswith(SAFETENSORS_SUFFIX):
        try:
            return {'prompt_embed_kwargs': safetensors.torch.load(files.read_bytes(path))}
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise CacheError(f'{path} is damaged, or no safetensors file ({type(error).__name__})') from error
    found = read_torch_file(path)
    if not isinstance(found, Mapping):
        raise CacheError(f'{path}: expected a dict, found a {type(found).__name__}')
    if any(name in found for name in RECORD_KEYS):
        return dict(found)
    # the arguments themselves, without the dict around them
    return {'prompt_embed_kwargs': {key: value for key, value in found.items() if isinstance(value, Tensor)}}


def _require_one_prompt(embeds: Mapping[str, Tensor], where: str) -> None:
    """Refuse states that are not those of one prompt without batch dimension.

    Raises:
        CacheError: See above.
    """
    for name, value in embeds.items():
        states = embeds.get(name.removesuffix(MASK_SUFFIX))
        if name == STATES and value.dim() != 2:
            raise CacheError(
                f'{where}: {name} has the shape {tuple(value.shape)}, expected (tokens, channels) of one prompt, '
                'without a batch dimension'
            )
        if name.endswith(MASK_SUFFIX) and states is not None and tuple(value.shape) != tuple(states.shape[:1]):
            raise CacheError(
                f'{where}: {name} has the shape {tuple(value.shape)}, expected {tuple(states.shape[:1])} as the states'
            )


def require_embeds_suffix(path: str | Path) -> None:
    """Refuse a file whose suffix says of no form how it is to be written.

    Raises:
        CacheError: See above.
    """
    suffixes = (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)
    if not str(path).endswith(suffixes):
        raise CacheError(f'{path}: expected a file that ends in one of {", ".join(suffixes)}')


def write_embeds(path: str | Path, embeds: Mapping[str, Tensor], precision: str = 'bf16') -> None:
    """Write the embeddings of a prompt, in the form that the suffix of the file says.

    Args:
        path: ``.safetensors``, or ``.pth`` for a dict in the published layout.
        embeds: Arguments of the transformer without batch dimension.
        precision: See :func:`~lakonlab.datasets.prompt_cache.record.quantise`.

    Raises:
        CacheError: The suffix is unknown, or the embeddings are not finite.
    """
    require_embeds_suffix(path)
    fields = quantise(without_padding(embeds), precision)
    if str(path).endswith(SAFETENSORS_SUFFIX):
        content = safetensors.torch.save(fields)
    else:
        stream = io.BytesIO()
        torch.save({'prompt_embed_kwargs': fields}, stream)
        content = stream.getvalue()
    files.write_bytes(path, content)
