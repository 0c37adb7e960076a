"""What a cache holds of a prompt, and the 8-bit numbers that it is stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lakonlab.datasets.precisions import PRECISIONS
from lakonlab.datasets.prompt_cache.errors import CacheError

SCALE_SUFFIX = '_scale'
MASK_SUFFIX = '_mask'
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Largest number of float8_e4m3fn.
FLOAT8_MAX = 448.0
SMALLEST_SCALE = 1e-6
NAMES_OF_PRECISIONS = {torch.float8_e4m3fn: 'fp8', torch.bfloat16: 'bf16', torch.float32: 'float32'}
#: What is stored in 8 bits; the rest (pooled embeddings, masks) is small.
QUANTISED = ('encoder_hidden_states', 'cap_feats', 'latents', 'condition_latents')
#: Names of older caches, which lie beside the prompt instead of in a dict.
LEGACY_NAMES = {
    'prompt_embeds': 'encoder_hidden_states',
    'prompt_embeds_scale': 'encoder_hidden_states_scale',
    'pooled_prompt_embeds': 'pooled_projections',
    'prompt_embeds_mask': 'encoder_hidden_states_mask',
}
LATENTS = ('latents', 'condition_latents')
LONGEST_NAME, MOST_DIMENSIONS, LARGEST_NUMBER = 100, 16, 1 << 62


@dataclass
class Record:
    """A prompt with its embeddings, as they are stored.

    Args:
        prompt: The text.
        embeds: Arguments of the transformer without batch dimension; what is stored in 8 bits has a scale beside it
            under its name with ``_scale`` behind.
        latents: ``latents`` and ``condition_latents``, where there are any, and their scales.
        latent_size: Shape of the latents of a record that has none.
    """

    prompt: str
    embeds: dict[str, Tensor] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    latent_size: tuple[int, ...] | None = None

    def decoded(self) -> dict[str, Any]:
        """The record as data sets use it.

        Returns:
            ``prompt``; ``prompt_embed_kwargs``, with floating-point tensors in float32; and where the record has them
            ``latents`` and ``condition_latents`` in float32, ``latent_size``.
        """
        record: dict[str, Any] = {'prompt': self.prompt, 'prompt_embed_kwargs': dequantise(self.embeds)}
        record.update(dequantise(self.latents))
        if self.latent_size is not None:
            record['latent_size'] = self.latent_size
        return record


def record_of(content: Any, where: str) -> Record:
    """A record of the published layout, of any of its versions.

    Args:
        content: What was read: a dict with ``prompt``, and ``prompt_embed_kwargs`` or the older flat names.
        where: File and record, for messages.

    Raises:
        CacheError: It is no such dict, or what it holds is not what its name says.
    """
    if not isinstance(content, Mapping) or any(not _is_name(key) for key in content):
        raise CacheError(f'{where}: expected a dict with names as keys, found a {type(content).__name__}')
    content = dict(content)
    prompt = content.pop('prompt', None)
    if not isinstance(prompt, str):
        raise CacheError(f'{where}: expected the text of the prompt under `prompt`, found {type(prompt).__name__}')
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise CacheError(f'{where}: the prompt is no text that UTF-8 can hold') from None
    embeds = embeds_of(content, where)
    latents: dict[str, Tensor] = {}
    for name in LATENTS:
        _take_tensor(content, name, latents, where)
        if name in latents:
            _take_tensor(content, name + SCALE_SUFFIX, latents, where)
    size = content.pop('latent_size', None)
    if size is not None and not _is_size(size):
        raise CacheError(f'{where}: latent_size is expected to be a tuple of a few positive numbers')
    require_scales(latents, where)
    return Record(prompt, embeds, latents, None if size is None else tuple(size))


def embeds_of(content: dict[str, Any], where: str) -> dict[str, Tensor]:
    """Take the embeddings out of a record.

    Args:
        content: The record; what is taken is removed.
        where: File and record, for messages.

    Raises:
        CacheError: There are none, or one is no tensor or lacks its scale.
    """
    found = content.pop('prompt_embed_kwargs', None)
    if found is None:
        found = {new: content.pop(old) for old, new in LEGACY_NAMES.items() if content.get(old) is not None}
    if not isinstance(found, Mapping) or any(not _is_name(key) for key in found):
        raise CacheError(
            f'{where}: prompt_embed_kwargs is expected to be a dict with names as keys, found {type(found).__name__}'
        )
    found = {LEGACY_NAMES.get(name, name): value for name, value in found.items() if value is not None}
    if not found:
        raise CacheError(f'{where} has no embeddings: neither prompt_embed_kwargs nor prompt_embeds')
    embeds: dict[str, Tensor] = {}
    for name in list(found):
        _take_tensor(found, name, embeds, where)
    require_scales(embeds, where)
    return embeds


def _take_tensor(content: dict[str, Any], name: str, into: dict[str, Tensor], where: str) -> None:
    value = content.pop(name, None)
    if value is None:
        return
    if name.endswith(SCALE_SUFFIX) and isinstance(value, int | float) and not isinstance(value, bool):
        value = torch.tensor(float(value) if abs(value) < LARGEST_NUMBER else float('inf'))
    if not isinstance(value, Tensor):
        raise CacheError(f'{where}: {name} is expected to be a tensor, found {type(value).__name__}')
    into[name] = value


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) <= MOST_DIMENSIONS
        and all(type(number) is int and 0 < number < LARGEST_NUMBER for number in value)
    )


def _is_name(value: Any) -> bool:
    """Whether a key may be put into a message; no other one is known anyway."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and value.isidentifier()


def require_scales(fields: Mapping[str, Tensor], where: str) -> None:
    """Refuse 8-bit tensors without a scale, scales of nothing, and scales that are not positive numbers.

    Args:
        fields: Tensors by name.
        where: File and record, for messages.

    Raises:
        CacheError: See above.
    """
    for name, value in fields.items():
        if value.dtype in FLOAT8 and name + SCALE_SUFFIX not in fields:
            raise CacheError(f'{where}: {name} is stored in 8 bits, but {name}{SCALE_SUFFIX} is missing')
        if not name.endswith(SCALE_SUFFIX):
            continue
        if name.removesuffix(SCALE_SUFFIX) not in fields:
            raise CacheError(f'{where}: {name} is the scale of nothing')
        if value.numel() != 1 or not value.is_floating_point() or not 0 < float(value) < float('inf'):
            raise CacheError(
                f'{where}: {name} is expected to be one positive number, found '
                f'{value.item() if value.numel() == 1 else f"{value.numel()} numbers"}'
            )


def quantise(fields: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Bring the large tensors of a record to the precision of a cache.

    Args:
        fields: Floating-point tensors and masks by name, without scales.
        precision: ``'fp8'``, 8 bits of which 3 are of the mantissa, times ``max|x| / 448`` of the whole tensor, as
            published; ``'bf16'``; or ``'float32'``.

    Returns:
        The tensors on the CPU, with scales under their names with ``_scale`` behind.

    Raises:
        CacheError: A tensor is not finite.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision={precision!r}: expected one of {", ".join(PRECISIONS)}')
    result: dict[str, Tensor] = {}
    for name, value in fields.items():
        value = value.detach().cpu()
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CacheError(f'{name} holds numbers that are not finite; a cache of them would be of no use')
        if name not in QUANTISED or not value.is_floating_point():
            result[name] = value.contiguous()
        elif precision == 'fp8':
            value = value.float()
            scale = (value.abs().max() / FLOAT8_MAX).clamp(min=SMALLEST_SCALE) if value.numel() else torch.tensor(1.0)
            result[name] = (value / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).contiguous()
            result[name + SCALE_SUFFIX] = scale
        else:
            result[name] = value.to(torch.bfloat16 if precision == 'bf16' else torch.float32).contiguous()
    return result


def precision_of(fields: Mapping[str, Tensor]) -> str | None:
    """The precision to which :func:`quantise` brought some fields; the dtype's name if to none of them.

    Args:
        fields: Tensors by name, as they are stored.

    Returns:
        None if there is no field that has a precision.
    """
    kinds = [value.dtype for name, value in fields.items() if name in QUANTISED]
    return None if not kinds else NAMES_OF_PRECISIONS.get(kinds[0], str(kinds[0]).removeprefix('torch.'))


def dequantise(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a record in float32, scaled; masks and other whole numbers as they are."""
    result = {}
    for name, value in fields.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        if value.is_floating_point():
            scale = fields.get(name + SCALE_SUFFIX)
            value = value.float() if scale is None else value.float() * scale.float().reshape(())
        result[name] = value
    return result


def without_padding(embeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out tokens behind the last one that a mask keeps.

    What is left out is zeros for who pads again: readers pad the states and the mask with zeros. Where there is no
    mask the network attends to every token, so all of them stay.

    Args:
        embeds: Tensors by name, tokens first; ``X_mask`` (T,) belongs to ``X`` (T, ...).
    """
    result = dict(embeds)
    for name, mask in embeds.items():
        states = embeds.get(name.removesuffix(MASK_SUFFIX))
        if not name.endswith(MASK_SUFFIX) or states is None or mask.dim() != 1 or len(mask) != len(states):
            continue
        kept = mask.nonzero().flatten()
        length = int(kept[-1]) + 1 if len(kept) else min(1, len(mask))
        result[name] = mask[:length]
        result[name.removesuffix(MASK_SUFFIX)] = states[:length]
    return result
