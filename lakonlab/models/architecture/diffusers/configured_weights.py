"""The weights that a config names for a transformer: a base, styles merged into it, an export of a trained student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lakonlab.models.architecture.loading import PretrainedError, locate_weights, read_weights
from lakonlab.models.architecture.packed_head import OUTPUT, MixtureLayer, PlainOutput

if TYPE_CHECKING:
    from lakonlab.models.architecture.adapters import Adapter
    from lakonlab.models.architecture.diffusers.transformer import DiffusersTransformer


def load_configured(network: DiffusersTransformer) -> Adapter | None:
    """Read what the config names, straight into place: a transformer that is loaded is built without memory.

    Args:
        network: Built, with its head in place, without memory for weights that are loaded.

    Returns:
        The export whose matrices have yet to become those of the student's adapters.
    """
    named = {'pretrained': [network.pretrained], 'pretrained_adapter': [network.pretrained_adapter]}
    named['pretrained_lora'] = network.pretrained_lora
    changes = [key for key, paths in named.items() if key != 'pretrained' and any(paths)]
    if network.pretrained is None and changes:
        raise ValueError(f'{" and ".join(changes)} need pretrained, the weights that they change')
    if torch.get_default_device().type == 'meta':
        for key, paths in named.items():
            for path in paths:
                if path is not None:
                    locate_weights(path, key)
        return None
    if network.pretrained is None:
        output = network.transformer.get_submodule(OUTPUT)
        if isinstance(output, MixtureLayer):
            output.init_means()
        return None
    state = read_weights(network.pretrained)
    if not changes:
        network.load_published(network.remap_pretrained(state), network.pretrained)
        return None
    from lakonlab.models.architecture.adapters import merge_lora, read_adapter, read_lora

    styles = [read_lora(path, network.lora_converter) for path in network.pretrained_lora]
    if not isinstance(network.head, PlainOutput):
        styles = [
            _merge_into_output(state, *style, scale)
            for style, scale in zip(styles, network.pretrained_lora_scale, strict=True)
        ]
    adapter = None if network.pretrained_adapter is None else read_adapter(network.pretrained_adapter)
    if adapter is not None:
        state = _overlay(network, state, adapter.tensors)
    network.load_published(network.remap_pretrained(state), network.pretrained)
    # files are mapped privately: changing the weights below never reaches them
    network.to(network.torch_dtype)
    if adapter is not None and not network.uses_lora:
        merge_lora(network.transformer, adapter.lora, key=f'pretrained_adapter={network.pretrained_adapter!r}')
    for path, (lora, alphas), scale in zip(network.pretrained_lora, styles, network.pretrained_lora_scale, strict=True):
        merge_lora(network.transformer, lora, scale, alphas, key=f'pretrained_lora={path!r}')
    return adapter if network.uses_lora else None


def load_adapter(network: DiffusersTransformer, adapter: Adapter | None, own: Mapping[str, Tensor]) -> None:
    """Put an export into the student's adapters and own layers.

    Args:
        network: The student, with its adapters.
        adapter: The export; None for nothing.
        own: Published name -> tensor that the export may change, and, if it is an adapter or of the head, must.
    """
    if adapter is None:
        return
    lora = {_with_adapter_name(name): tensor for name, tensor in adapter.lora.items()}
    state = {**adapter.tensors, **lora}
    everything = network.role_state()
    problems = {
        'are of the base that the student shares with its teacher (name their modules in freeze_exclude, or set '
        'tie_teacher=False)': [name for name in state if name in everything and name not in own],
        'are none of this student': [name for name in state if name not in everything],
        'are missing': [n for n in own if n not in state and ('.lora_' in n or n.startswith(OUTPUT))],
        'have another shape': [n for n in state if n in own and own[n].shape != state[n].shape],
    }
    if any(problems.values()):
        listed = '; '.join(f'{len(names)} {what}: {_some(names)}' for what, names in problems.items() if names)
        raise PretrainedError(
            f'pretrained_adapter={network.pretrained_adapter!r}: of its tensors {listed}. The head and '
            'lora_target_modules and lora_rank must be those that it was trained with.'
        )
    fill(own, state)


def _merge_into_output(
    state: dict[str, Tensor], lora: dict[str, Tensor], alphas: dict[str, float], scale: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Merge matrices for the output layer while it is still the base's, before it becomes a head.

    Returns:
        The other matrices, and their alphas.
    """
    from lakonlab.models.architecture.adapters import SIDES, merged

    names = [OUTPUT + side for side in SIDES]
    weight = f'{OUTPUT}.weight'
    if not all(name in lora for name in names) or weight not in state:
        return lora, alphas
    state[weight] = merged(state[weight], lora, OUTPUT, scale, alphas)
    others = {name: tensor for name, tensor in lora.items() if name not in names}
    return others, {layer: alpha for layer, alpha in alphas.items() if layer != OUTPUT}


def _overlay(
    network: DiffusersTransformer, state: dict[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A base with the layers of an adapter; what the base's output layer was is gone."""
    own = network.role_state()
    foreign = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    head = [name for name in own if name.startswith(OUTPUT)]
    missing = [name for name in head if name not in tensors] if any(name in tensors for name in head) else []
    if missing:
        raise PretrainedError(
            f'pretrained_adapter={network.pretrained_adapter!r} lacks {len(missing)} tensors of the head: '
            f'{_some(missing)}'
        )
    if foreign:
        raise PretrainedError(
            f'pretrained_adapter={network.pretrained_adapter!r} holds {len(foreign)} tensors that are none of this '
            f'student, or have another shape there: {_some(foreign)}'
        )
    replaced = {name for name in state if name.startswith(f'{OUTPUT}.')}
    if not any(name.startswith(OUTPUT) for name in tensors):
        replaced = set()
    return {**{name: tensor for name, tensor in state.items() if name not in replaced}, **tensors}


def fill(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names, in place."""
    for name, tensor in state.items():
        own[name].data.copy_(tensor)


def _with_adapter_name(name: str) -> str:
    """``x.lora_A.weight`` of a file as ``x.lora_A.default.weight``."""
    head, _, tail = name.rpartition('.')
    return f'{head}.default.{tail}'


def _some(names: Sequence[str], most: int = 8) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
