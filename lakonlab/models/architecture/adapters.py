"""Adapters in files: exports of trained students, and LoRA of a style or of a distilled teacher.

The export of a student holds two kinds of tensors: whole layers that replace or join those of the base, and low-rank
matrices ``<layer>.lora_A.weight`` (rank, in) and ``<layer>.lora_B.weight`` (out, rank), whose product is added with a
factor of 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.loading import PretrainedError, obtain_weights, read_weights
from lakonlab.storage.adapter_layout import published_name

TRANSFORMER_PREFIX = 'transformer.'
POLICY_KEY = 'policy_config'
SIDES = ('.lora_A.weight', '.lora_B.weight')
ALPHA = '.alpha'
#: The names of ``SIDES`` in files of other tools.
DOWN, UP = '.lora_down.weight', '.lora_up.weight'
#: Of the layers of FLUX by the names of its authors, in files of ComfyUI and ai-toolkit.
AUTHORS_PREFIXES = ('diffusion_model.', 'double_blocks.', 'single_blocks.')
#: Parts of names in files of adapters whose product is not all that they add.
UNSUPPORTED = ('dora_scale', 'lora_magnitude_vector')


class Adapter(NamedTuple):
    """What an exported student changes of its base."""

    lora: dict[str, Tensor]
    """Low-rank matrices, ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``."""
    tensors: dict[str, Tensor]
    """Tensors that replace those of the base or are new."""
    policy: dict[str, Any]
    """Type and arguments of the policy, as far as the file tells."""


def read_adapter(path: str, key: str = 'pretrained_adapter') -> Adapter:
    """Read the export of a student, or its training checkpoint.

    Args:
        path: See :func:`~lakonlab.models.architecture.loading.locate_weights`.
        key: Config key that names it, for messages.

    Raises:
        FileNotFoundError: There is nothing there.
        PretrainedError: It cannot be read.
    """
    state = {_own_name(name): tensor for name, tensor in read_weights(path, key).items()}
    lora = {name: tensor for name, tensor in state.items() if '.lora_' in name}
    tensors = {name: tensor for name, tensor in state.items() if name not in lora}
    return Adapter(lora, tensors, _policy_of(path, key))


def _own_name(name: str) -> str:
    """A name in a file, relative to the transformer and without that of the adapter in a training run."""
    return published_name(name.removeprefix(TRANSFORMER_PREFIX))


def _policy_of(path: str, key: str) -> dict[str, Any]:
    from safetensors import safe_open

    file = obtain_weights(path, key)
    if not isinstance(file, Path) or file.suffix != '.safetensors':
        return {}
    with safe_open(file, framework='pt') as content:
        text = (content.metadata() or {}).get(POLICY_KEY)
    try:
        return {} if text is None else dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise PretrainedError(f'{key}={path!r}: its metadata {POLICY_KEY} is damaged: {text!r}') from error


def read_lora(
    path: str, converter: str | None = None, key: str = 'pretrained_lora'
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read low-rank matrices in any layout that diffusers knows.

    Args:
        path: See :func:`~lakonlab.models.architecture.loading.locate_weights`.
        converter: Class of ``diffusers.loaders`` that knows the layouts of this architecture, such as
            ``'FluxLoraLoaderMixin'``; None for the layout of diffusers only.
        key: Config key that names it, for messages.

    Returns:
        ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` -> tensor, and layer -> alpha where the file has one.

    Raises:
        FileNotFoundError: There is nothing there.
        PretrainedError: It cannot be read, or holds anything but low-rank matrices of the transformer.
    """
    state = read_weights(path, key)
    unsupported = [name for name in state if any(part in name for part in UNSUPPORTED)]
    if unsupported:
        raise PretrainedError(
            f'{key}={path!r} holds magnitudes beside its low-rank matrices (DoRA), which cannot be merged: '
            f'{", ".join(unsupported[:8])}'
        )
    if converter is not None:
        state = _converted(state, converter, path, key)
    lora: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    strangers = []
    for name, tensor in state.items():
        own = _own_name(name).replace(DOWN, SIDES[0]).replace(UP, SIDES[1])
        if own.endswith(ALPHA):
            alphas[own.removesuffix(ALPHA)] = float(tensor)
        elif own.endswith(SIDES):
            lora[own] = tensor
        else:
            strangers.append(name)
    if strangers or not lora:
        raise PretrainedError(
            f'{key}={path!r} holds {len(strangers)} tensors that are no low-rank matrices of a transformer: '
            f'{", ".join(strangers[:8]) or "nothing else either"}; expected <layer>.lora_A.weight and '
            '<layer>.lora_B.weight'
        )
    return lora, alphas


def _converted(state: dict[str, Tensor], converter: str, path: str, key: str) -> dict[str, Tensor]:
    """The same matrices in the layout of diffusers, which leaves alone what is in it already."""
    import inspect

    import diffusers.loaders

    loader = getattr(diffusers.loaders, converter, None)
    if loader is None:
        raise PretrainedError(f'lora_converter={converter!r} is no class of diffusers.loaders')
    options = {'return_alphas': True} if 'return_alphas' in inspect.signature(loader.lora_state_dict).parameters else {}
    # some layouts have alpha multiplied into the matrices, which is not to be rounded to their precision
    precise = {
        _known_name(_own_name(name), converter): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }
    try:
        result = loader.lora_state_dict(precise, **options)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PretrainedError(
            f'{key}={path!r} has no layout that {converter} knows ({type(error).__name__}: {error}); '
            f'its names are like {", ".join(sorted(state)[:3])}'
        ) from error
    if not isinstance(result, tuple):
        return result
    matrices, alphas = result
    return {**matrices, **{f'{name.removesuffix(ALPHA)}{ALPHA}': alpha for name, alpha in (alphas or {}).items()}}


def _known_name(name: str, converter: str) -> str:
    """A name as the converter of FLUX knows it: it looks for the authors' names of layers beside lora_down, lora_up."""
    if converter != 'FluxLoraLoaderMixin' or not name.startswith(AUTHORS_PREFIXES) or '.processor.' in name:
        return name
    name = name.replace(SIDES[0], DOWN).replace(SIDES[1], UP)
    return name if name.startswith(AUTHORS_PREFIXES[0]) else AUTHORS_PREFIXES[0] + name


@torch.no_grad()
def merge_lora(
    transformer: nn.Module,
    lora: Mapping[str, Tensor],
    scale: float = 1.0,
    alphas: Mapping[str, float] | None = None,
    key: str = 'pretrained_lora',
) -> None:
    """Add ``scale * alpha / rank * B A`` to the weights of the layers that the matrices are for.

    Args:
        transformer: Changed in place.
        lora: ``<layer>.lora_A.weight`` (rank, in) and ``<layer>.lora_B.weight`` (out, rank).
        scale: Factor of all.
        alphas: Layer -> alpha; the rank where there is none.
        key: Config key that they come from, for messages.

    Raises:
        PretrainedError: A layer does not exist, lacks one of its matrices, or they do not fit; nothing was changed.
    """
    layers = sorted({name.removesuffix(side) for name in lora for side in SIDES if name.endswith(side)})
    modules = dict(transformer.named_modules())
    problems = [f'{name} is no low-rank matrix' for name in lora if not name.endswith(SIDES)]
    problems += [f'{layer} has an alpha, but no matrices' for layer in sorted(set(alphas or ()) - set(layers))]
    problems += [problem for layer in layers if (problem := _misfit(modules, lora, layer)) is not None]
    if problems:
        more = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
        raise PretrainedError(
            f'{key}: {"; ".join(problems[:8])}{more}; these are no matrices for {type(transformer).__name__}'
        )
    for layer in layers:
        modules[layer].weight.copy_(merged(modules[layer].weight, lora, layer, scale, alphas))


def merged(
    weight: Tensor, lora: Mapping[str, Tensor], layer: str, scale: float, alphas: Mapping[str, float] | None = None
) -> Tensor:
    """A weight with the product of a layer's matrices, rounded once, in the precision of the weight."""
    down, up = (lora[f'{layer}{side}'].float() for side in SIDES)
    factor = scale * (alphas or {}).get(layer, down.shape[0]) / down.shape[0]
    product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape).to(weight.device)
    return (weight.float() + factor * product).to(weight.dtype)


def _misfit(modules: Mapping[str, nn.Module], lora: Mapping[str, Tensor], layer: str) -> str | None:
    """Why the matrices of a layer cannot be merged; None if they can."""
    missing = [side for side in SIDES if f'{layer}{side}' not in lora]
    if missing:
        return f'{layer} has no {missing[0][1:]}'
    if layer not in modules or not isinstance(getattr(modules[layer], 'weight', None), Tensor):
        return f'there is no layer {layer!r}'
    down, up = (lora[f'{layer}{side}'] for side in SIDES)
    weight = modules[layer].weight
    matrices_fit = min(down.dim(), up.dim(), weight.dim()) >= 2 and (
        down.shape[0] == up.shape[1:].numel()
        and (weight.shape[0], weight.shape[1:].numel()) == (up.shape[0], down.shape[1:].numel())
    )
    if not matrices_fit:
        return f'{layer} has weights {tuple(weight.shape)}, its matrices {tuple(down.shape)} and {tuple(up.shape)}'
    return None
