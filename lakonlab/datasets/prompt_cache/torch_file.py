"""Files of ``torch.save`` of unknown origin: verified, and nothing in them is run."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import torch

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.storage import files

ARCHIVE = b'PK\x03\x04'
MOST_OF_A_REASON = 200


def read_torch_file(path: str) -> Any:
    """The content of a file of ``torch.save``, on the CPU.

    torch itself does not compare the checksums of the archives that it writes, so a flipped bit would become a number.

    Args:
        path: The file, local or a URL.

    Raises:
        CacheError: It is missing, damaged, or holds more than tensors, containers, texts and numbers.
    """
    try:
        content = files.read_bytes(path)
    except FileNotFoundError as error:
        raise CacheError(f'{path} is missing') from error
    try:
        if content.startswith(ARCHIVE):
            damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f'the checksum of {damaged[-80:]!r} in it is wrong')
        # torch reads the archives it has written since version 1.6, and nothing that could run code
        return torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds for damaged files
        reason = str(error).partition('\n')[0][:MOST_OF_A_REASON] or 'it is empty'
        raise CacheError(
            f'{path} cannot be read: it is damaged, was not written by torch.save, or holds more than tensors, '
            f'containers, texts and numbers ({type(error).__name__}: {reason})'
        ) from error


def read_published_latents(path: str) -> tuple[torch.Tensor, int]:
    """Latents and label of a file of the published layout, ``{'x': latents, 'y': label}``.

    Args:
        path: The file, local or a URL.

    Returns:
        The latents as they are stored, and the label.

    Raises:
        CacheError: It is missing, damaged, or holds something else.
    """
    record = read_torch_file(path)
    if not isinstance(record, dict) or not {'x', 'y'} <= record.keys():
        raise CacheError(f"{path}: expected a dict with 'x', the latents, and 'y', the label")
    latents, label = record['x'], record['y']
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point() or latents.dim() < 2:
        raise CacheError(f"{path}: 'x' is no tensor of latents")
    if isinstance(label, torch.Tensor) and label.numel() == 1 and not label.is_floating_point():
        label = int(label)
    if type(label) is not int:
        raise CacheError(f"{path}: 'y' is no label, a whole number")
    return latents, label
