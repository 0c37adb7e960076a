"""Low-rank matrices of a student: whether they take part, fusing them, and writing them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lakonlab.pipelines.student import OUTPUT, QUANTISATION_STATES, Scales, Student, inner_name


def shortfall(student: nn.Module) -> str | None:
    """How the low-rank matrices of a student take part otherwise than they were trained to; None if they do not."""
    name = student.piflow.adapter_name
    if name is None:
        return None
    parts = {_part_of(layer, name) for layer in student.modules() if name in getattr(layer, 'lora_A', ())}
    if parts == {1.0}:
        return None
    if parts <= {0.0}:
        state = f'is not active, so that the student is incomplete: include it in set_adapters([{name!r}, ...])'
    else:
        weights = ', '.join(f'{part:.4g}' for part in sorted(parts))
        state = (
            f'has the weight {weights} instead of 1 in all layers, so that the student is incomplete: '
            f'set_adapters([{name!r}, ...], [1.0, ...])'
        )
    return f'the adapter {name!r} of pi-Flow {state}'


def _part_of(layer: nn.Module, name: str) -> float:
    """The weight with which low-rank matrices take part in a layer."""
    taking_part = layer.merged_adapters if layer.merged else layer.active_adapters
    if layer.disable_adapters or name not in taking_part:
        return 0.0
    return round(layer.scaling[name] * layer.r[name] / layer.lora_alpha[name], 6)


def is_there(student: nn.Module, adapter_name: str) -> bool:
    """Whether any layer has these low-rank matrices."""
    return any(adapter_name in getattr(module, 'lora_A', ()) for module in student.modules())


def is_fused(student: nn.Module) -> bool:
    """Whether low-rank matrices are added to the weights of their layers."""
    return any(getattr(module, 'merged_adapters', None) for module in student.modules())


def _adapted_layers(student: nn.Module) -> Iterator[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in student.modules() if isinstance(module, BaseTunerLayer))


def part_from_base(student: nn.Module) -> None:
    """Give layers that have low-rank matrices weights of their own, since fusing changes these in place."""
    record: Student = student.piflow
    for layer in (adapted.get_base_layer() for adapted in _adapted_layers(student)):
        if layer not in record.parted:
            states = {name: vars(layer).get(name) for name in QUANTISATION_STATES}
            shared = {name: value for name, value in {**layer._parameters, **states}.items() if value is not None}
            record.parted[layer] = shared
            for name, value in record.parted[layer].items():
                setattr(layer, name, copy.deepcopy(value))


def rejoin_base(student: nn.Module) -> None:
    """Share the weights of the base again, once nothing is fused; no rounding error of fusing stays."""
    record: Student = student.piflow
    if is_fused(student):
        return
    for layer, shared in record.parted.items():
        for name, value in shared.items():
            own = getattr(layer, name)
            if isinstance(value, Tensor):
                value.data = value.data.to(device=own.device, dtype=own.dtype)
            setattr(layer, name, value)
    record.parted.clear()
    _restore_scales(record.scales_while_fused)


def guard_base(student: nn.Module) -> None:
    """Let a student part from the base when its own ``fuse_lora`` is called, by a pipeline or by a user.

    From the normalisation layers that a style overwrote in the base, too, since they are restored when styles go.
    What scales low-rank matrices, in fusing and in a call, scales those of styles only.
    """
    own_parameters(student, getattr(student, '_transformer_norm_layers', None) or ())
    student.fuse_lora = functools.partial(_fuse, student)
    student.unfuse_lora = functools.partial(_unfuse, student)
    student.register_forward_pre_hook(_scale_for_a_pass, with_kwargs=True)
    student.register_forward_hook(_scale_back, always_call=True)


def _fuse(
    student: nn.Module,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Sequence[str] | str | None = None,
) -> None:
    """As in the base class; with styles that are named, the adapter of pi-Flow is fused too, if it takes part."""
    record, own = student.piflow, student.piflow.adapter_name
    if adapter_names is not None:
        named = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        takes_part = (
            own is not None and own not in named and any(own in x.active_adapters for x in _adapted_layers(student))
        )
        adapter_names = [own, *named] if takes_part else named
    part_from_base(student)
    _scale_styles(student, lora_scale, record.scales_while_fused)
    try:
        type(student).fuse_lora(student, 1.0, safe_fusing, adapter_names)
    except Exception as error:  # of peft, whose kinds of layers each have errors of their own
        for layer in _adapted_layers(student):
            layer.merged_adapters.clear()
        rejoin_base(student)
        raise ValueError(
            f'the adapters cannot be fused with these weights, and none is ({type(error).__name__}: {error}); they are '
            'in use all the same. Where torchao has quantised the weights, peft can fuse one adapter, not two'
        ) from error


def _unfuse(student: nn.Module) -> None:
    type(student).unfuse_lora(student)
    rejoin_base(student)


def _scale_for_a_pass(student: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """``scale`` of the arguments for attention, which diffusers would apply to the matrices of pi-Flow as well."""
    for name, value in kwargs.items():
        if name.endswith('attention_kwargs') and isinstance(value, Mapping) and value.get('scale', 1.0) != 1.0:
            _scale_styles(student, value['scale'], student.piflow.scales_of_a_pass)
            kwargs = {**kwargs, name: {**value, 'scale': 1.0}}
    return args, kwargs


def _scale_back(student: nn.Module, args: tuple, output: Any) -> None:
    _restore_scales(student.piflow.scales_of_a_pass)


def _scale_styles(student: nn.Module, factor: float, changed: Scales) -> None:
    """Scale the matrices of the styles that take part, and note what was changed."""
    if factor == 1:
        return
    for layer in _adapted_layers(student):
        for name in layer.active_adapters:
            if name != student.piflow.adapter_name and name in layer.scaling:
                before, _ = changed.get((layer, name), (layer.scaling[name], None))
                layer.scaling[name] *= factor
                changed[layer, name] = before, layer.scaling[name]


def _restore_scales(changed: Scales) -> None:
    """Undo :func:`_scale_styles`, except where a scale was set since."""
    for (layer, name), (before, after) in changed.items():
        if layer.scaling.get(name) == after:
            layer.scaling[name] = before
    changed.clear()


def own_parameters(student: nn.Module, names: Iterable[str]) -> None:
    """Give the student parameters of its own, since a style writes into them; names without a parameter are ignored."""
    shared = dict(student.named_parameters())
    for name in names:
        if name in shared:
            path, _, part = name.rpartition('.')
            setattr(student.get_submodule(path), part, copy.deepcopy(shared[name]))


def own_tensors(student: nn.Module) -> dict[str, Tensor]:
    """Published name -> tensor of all that a student has of its own, low-rank matrices included."""
    from peft import get_peft_model_state_dict

    record: Student = student.piflow
    state = {name.replace('.base_layer.', '.'): value for name, value in student.state_dict().items()}
    tensors = {name: state[_state_name(name, state)] for name in record.overlay}
    if record.adapter_name is not None:
        tensors.update(get_peft_model_state_dict(student, adapter_name=record.adapter_name))
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _state_name(published: str, state: Iterable[str]) -> str:
    name = f'{OUTPUT}.{inner_name(published)}' if published.startswith(OUTPUT) else published
    return name if name in state else published
