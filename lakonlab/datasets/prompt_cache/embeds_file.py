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
from lakonlab.datasets.prompt_cache.record import dequantise, embeds_of, quantise, without_padding
from lakonlab.storage import files

COMMAND = 'python tools/cache_negative_prompt.py CONFIG'
SAFETENSORS_SUFFIX = '.safetensors'
TORCH_SUFFIXES = ('.pth', '.pt')


def read_embeds(path: str | Path) -> dict[str, Tensor]:
    """Read the embeddings of a negative prompt.

    Args:
        path: A ``.safetensors`` file that ``tools/cache_negative_prompt.py`` wrote, or a ``.pth`` file with a dict in
            the layout of a cached record; objects in it are never unpickled.

    Returns:
        Arguments of the transformer without batch dimension, floating-point ones in float32; padded no further than
        they are stored.

    Raises:
        CacheError: There is no such file, or it cannot be read.
    """
    try:
        content = files.read_bytes(path)
    except FileNotFoundError as error:
        raise CacheError(
            f'negative_prompt_embeds_path: there is no {path}; make it with `{COMMAND} --out {path}`'
        ) from error
    where = f'negative_prompt_embeds_path={str(path)!r}'
    try:
        return dequantise(embeds_of(_read(content, str(path)), where))
    except CacheError as error:
        raise CacheError(f'{error}. Make it again with `{COMMAND} --out {path}`') from error


def _read(content: bytes, path: str) -> dict[str, Any]:
    if path.endswith(SAFETENSORS_SUFFIX):
        try:
            return {'prompt_embed_kwargs': safetensors.torch.load(content)}
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise CacheError(f'{path} is damaged, or no safetensors file ({error})') from error
    try:
        # torch reads the archives it has written since version 1.6, and nothing that could run code
        found = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        reason = str(error).partition('\n')[0] or 'it is empty'
        raise CacheError(
            f'{path} cannot be read: it is damaged, was not written by torch.save, or holds more than tensors, '
            f'containers, texts and numbers ({type(error).__name__}: {reason})'
        ) from error
    if not isinstance(found, Mapping):
        raise CacheError(f'{path}: expected a dict, found a {type(found).__name__}')
    content = dict(found)
    if any(isinstance(value, Tensor) for value in content.values()) and 'prompt_embeds' not in content:
        # the arguments themselves, without the dict around them
        return {'prompt_embed_kwargs': {key: value for key, value in content.items() if isinstance(value, Tensor)}}
    return content


def write_embeds(path: str | Path, embeds: Mapping[str, Tensor], precision: str = 'bf16') -> None:
    """Write the embeddings of a prompt, in the form that the suffix of the file says.

    Args:
        path: ``.safetensors``, or ``.pth`` for a dict in the published layout.
        embeds: Arguments of the transformer without batch dimension.
        precision: See :func:`~lakonlab.datasets.prompt_cache.record.quantise`.

    Raises:
        CacheError: The suffix is unknown, or the embeddings are not finite.
    """
    fields = quantise(without_padding(embeds), precision)
    if str(path).endswith(SAFETENSORS_SUFFIX):
        content = safetensors.torch.save(fields)
    elif str(path).endswith(TORCH_SUFFIXES):
        stream = io.BytesIO()
        torch.save({'prompt_embed_kwargs': fields}, stream)
        content = stream.getvalue()
    else:
        suffixes = ', '.join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))
        raise CacheError(f'{path}: expected a file that ends in one of {suffixes}')
    files.write_bytes(path, content)
