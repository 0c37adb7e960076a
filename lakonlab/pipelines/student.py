"""Makes a student of a transformer of diffusers and an adapter, sharing the transformer's weights.

The student is a copy of the transformer's structure around the same tensors: what the adapter replaces is its own, all
else exists once, whichever precision or quantisation it has.

``K`` components, ``N`` DX points, ``A`` pixels of a token.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.adapters import SIDES
from lakonlab.models.architecture.heads import MixtureHead
from lakonlab.models.architecture.packed_head import MixtureLayer, hand_on_condition
from lakonlab.pipelines.adapter_files import AdapterError, PiFlowAdapter
from lakonlab.pipelines.recipe import Recipe

logger = logging.getLogger(__name__)

NORM, OUTPUT = 'norm_out', 'proj_out'
MEANS, LOGWEIGHTS, LOGSTDS = (f'{OUTPUT}_{part}' for part in ('means', 'logweights', 'logstds'))
#: Arguments of a transformer that an adapter's config states otherwise than its base's.
OWN_ARGUMENTS = ('patch_size', 'out_channels')
#: ``tokens``: a pipeline's latents are (B, L, C A), as in FLUX and Qwen-Image. ``images``: (B, C, *), as in SD3.
ROW_ORDER_OF = {'tokens': 'channel_major', 'images': 'patch_major'}
#: Attributes of quantised layers that go with their weights.
QUANTISATION_STATES = ('quant_state', 'state')
#: Layer and name of its low-rank matrices -> their scale before it was changed, and after.
Scales = dict[tuple[nn.Module, str], tuple[float, float]]


@dataclass
class Student:
    """What the pipelines know about a transformer that answers with a policy; its attribute ``piflow``."""

    layout: str
    """See :data:`ROW_ORDER_OF`."""
    num_points: int
    """``K`` or ``N``."""
    area: int
    """``A``; 1 where latents are images."""
    policy_type: str
    """Name in :data:`~lakonlab.models.diffusions.piflow_policies.POLICY_CLASSES`."""
    policy_kwargs: dict[str, Any]
    """Further arguments of the policy."""
    recipe: Recipe | None
    """How it is to be sampled, if the adapter tells."""
    where: str
    """What the adapter was loaded from."""
    base: nn.Module
    """The transformer that it was made of."""
    dtype: torch.dtype | None = None
    """Precision of what the base does not share."""
    adapter_config: dict[str, Any] = field(default_factory=dict)
    """``config.json`` of the adapter."""
    parted: dict[nn.Module, dict[str, nn.Parameter]] = field(default_factory=dict)
    """Layer -> the parameters that it shares with the base, while low-rank matrices are fused."""
    scales_while_fused: Scales = field(default_factory=dict)
    """What fusing with a scale has changed."""
    scales_of_a_pass: Scales = field(default_factory=dict)
    """What a scale in the arguments of a pass has changed, while it lasts."""
    own_scheduler: Any = None
    """The scheduler that the pipeline had before."""
    scheduler: Any = None
    """The one that was set for the adapter; None if the pipeline kept its own."""
    overlay: tuple[str, ...] = ()
    """Published names of its own tensors, adapters excepted."""
    adapter_name: str | None = None
    """Name of its low-rank matrices; None if it has none."""


def make_student(
    base: nn.Module, adapter: PiFlowAdapter, layout: str, policy: Mapping[str, Any], adapter_name: str
) -> nn.Module:
    """Make a student, leaving the base as it is.

    Args:
        base: A transformer of diffusers that ends in ``norm_out`` and ``proj_out``.
        adapter: What the student has of its own.
        layout: See :data:`ROW_ORDER_OF`.
        policy: Type and arguments of the policy.
        adapter_name: Name for the low-rank matrices.

    Raises:
        AdapterError: The adapter is for another base, or none of pi-Flow.
    """
    if is_compiled(base):
        logger.warning(
            'the %s was compiled, the student of it is not: compile after loading the adapter',
            type(uncompiled(base)).__name__,
        )
    base = uncompiled(base)
    output = _own_layer(getattr(base, OUTPUT, None))
    if not isinstance(output, nn.Linear):
        raise AdapterError(
            f'{type(base).__name__} has no linear output layer {OUTPUT!r}: it cannot become a student of pi-Flow'
        )
    _check_config(base, adapter)
    num_points, area = _size_of_head(base, output, adapter, layout)
    if policy['type'] == 'DX' and policy.get('mode', 'grid') == 'grid' and 'segment_size' not in policy:
        raise AdapterError(
            f'{adapter.where!r} does not say how long its segments are: pass policy_kwargs=dict(segment_size=1 / 3.5, '
            'shift=3.2), or what it was trained with, to from_pretrained'
        )
    _check_tensors(base, adapter)
    _warn_of_lost_styles(base, adapter)
    student = _share(base)
    dtype, device = base.dtype, base.device
    head = {name: tensor for name, tensor in adapter.tensors.items() if name.startswith(OUTPUT)}
    with torch.device('meta'):
        layer = _output_layer(output, adapter, layout, num_points, area)
    state = {inner_name(name): tensor.to(device=device, dtype=dtype) for name, tensor in head.items()}
    try:
        layer.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise AdapterError(f'{adapter.where!r}: its policy head is not complete: {error}') from error
    setattr(student, OUTPUT, layer)
    _replace_layers(student, {name: t for name, t in adapter.tensors.items() if name not in head}, dtype, device)
    if isinstance(layer, MixtureLayer) and layer.logstds is not None:
        hand_on_condition(_own_layer(student.get_submodule(NORM)))
    rows = layer.out_features if isinstance(layer, nn.Linear) else num_points * (output.out_features + area) + area
    _set_out_channels(student, rows // area)
    student.piflow = Student(
        layout=layout,
        num_points=num_points,
        area=area if layout == 'tokens' else 1,
        policy_type=policy['type'],
        policy_kwargs={name: value for name, value in policy.items() if name != 'type'},
        recipe=adapter.recipe,
        where=adapter.where,
        base=base,
        dtype=dtype,
        adapter_config=dict(adapter.config),
        overlay=tuple(adapter.tensors),
    )
    if adapter.lora:
        lora = {name: tensor.to(device=device, dtype=dtype) for name, tensor in adapter.lora.items()}
        student.load_lora_adapter(lora, prefix=None, adapter_name=adapter_name)
        student.piflow.adapter_name = adapter_name
    student.register_forward_pre_hook(_round_inputs, with_kwargs=True)
    return student.requires_grad_(False).eval()


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given."""
    return getattr(module, '_orig_mod', module)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or a part of it was compiled, as a whole or in place."""
    return uncompiled(module) is not module or any(
        getattr(part, '_compiled_call_impl', None) is not None for part in module.modules()
    )


def updated_base(student: nn.Module) -> nn.Module:
    """The base of a student, with what they do not share in the precision that the student was brought to since."""
    record: Student = student.piflow
    if student.dtype != record.dtype:
        shared = {id(tensor) for tensor in (*student.parameters(), *student.buffers())}
        for tensor in (*record.base.parameters(), *record.base.buffers()):
            is_plain = type(tensor) in (Tensor, nn.Parameter)  # quantised ones are of classes of their own
            if id(tensor) not in shared and is_plain and tensor.dtype == record.dtype:
                tensor.data = tensor.data.to(student.dtype)
        record.dtype = student.dtype
    return record.base


def _own_layer(module: nn.Module | None) -> nn.Module | None:
    """A layer without the adapters of styles around it."""
    return getattr(module, 'base_layer', module)


def _share(base: nn.Module) -> nn.Module:
    """The same structure around the same tensors."""
    shared: dict[int, Any] = {}
    for module in base.modules():
        states = (vars(module).get(name) for name in QUANTISATION_STATES)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *states):
            if tensor is not None:
                shared[id(tensor)] = tensor
    return copy.deepcopy(base, shared)


def _warn_of_lost_styles(base: nn.Module, adapter: PiFlowAdapter) -> None:
    """Say which layers the adapter replaces together with the matrices that styles have there."""
    heads = {OUTPUT if name.startswith(OUTPUT) else name.rpartition('.')[0] for name in adapter.tensors}
    modules = dict(base.named_modules())
    lost = sorted(path for path in heads if path in modules and getattr(modules[path], 'lora_A', None))
    if lost:
        logger.warning(
            '%r replaces %s: what the styles that were loaded before it change there is left out',
            adapter.where,
            ', '.join(lost),
        )


def _round_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """States are in float32, the transformer takes them in its own precision."""
    states = kwargs.get('hidden_states')
    if isinstance(states, Tensor):
        kwargs = {**kwargs, 'hidden_states': states.to(module.dtype)}
    return args, kwargs


def inner_name(name: str) -> str:
    """Name below the output layer of a tensor of the head, from its published one: ``proj_out_means.weight``."""
    return name.removeprefix(OUTPUT)[1:]


def _check_config(base: nn.Module, adapter: PiFlowAdapter) -> None:
    """Refuse an adapter whose config is that of another transformer."""
    config, kind = adapter.config, type(base).__name__
    named = str(config.get('_class_name', ''))
    if named and named.removeprefix('GM').removeprefix('DX') != kind:
        raise AdapterError(
            f'{adapter.where!r} is an adapter of {named!r}, this pipeline has {kind}: load it into a pipeline of the '
            'base that it was trained on'
        )
    other = [
        f'{name} {config[name]!r}, here {base.config[name]!r}'
        for name in base.config
        if name in config and name not in OWN_ARGUMENTS and not name.startswith('_')
        if _plain(config[name]) != _plain(base.config[name])
    ]
    if other:
        raise AdapterError(f'{adapter.where!r} is an adapter of a {kind} of another size: {"; ".join(other)}')


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _size_of_head(base: nn.Module, output: nn.Linear, adapter: PiFlowAdapter, layout: str) -> tuple[int, int]:
    """``K`` or ``N``, and ``A``, from the shapes of the head's weights."""
    tensors, rows = adapter.tensors, output.out_features
    name = f'{MEANS}.weight' if f'{MEANS}.weight' in tensors else f'{OUTPUT}.weight'
    if name not in tensors:
        advice = ' (a style is loaded by load_lora_weights)' if adapter.lora else ''
        raise AdapterError(
            f'{adapter.where!r} is no adapter of pi-Flow: it has no policy head, neither {MEANS} nor {OUTPUT}{advice}'
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or shape[1] != output.in_features or shape[0] % rows:
        raise AdapterError(
            f'{adapter.where!r} is an adapter of another base: its {name} is {shape}, expected (n * {rows}, '
            f'{output.in_features})'
        )
    num_points = shape[0] // rows
    if name == f'{OUTPUT}.weight':
        if num_points == 1 and not adapter.policy:
            raise AdapterError(
                f'{adapter.where!r} is no adapter of pi-Flow: its output layer is as wide as that of the base'
            )
        return num_points, 1 if layout == 'tokens' else int(base.config.get('patch_size', 1)) ** 2
    if f'{LOGWEIGHTS}.weight' not in tensors:
        raise AdapterError(f'{adapter.where!r}: its policy head is not complete, it lacks {LOGWEIGHTS}')
    area, rest = divmod(tensors[f'{LOGWEIGHTS}.weight'].shape[0], num_points)
    if rest or area == 0 or rows % area or math.isqrt(area) ** 2 != area:
        raise AdapterError(
            f'{adapter.where!r}: {LOGWEIGHTS} with {tensors[f"{LOGWEIGHTS}.weight"].shape[0]} rows does not go with '
            f'{num_points} means of {rows} rows'
        )
    return num_points, area


def _output_layer(output: nn.Linear, adapter: PiFlowAdapter, layout: str, num_points: int, area: int) -> nn.Module:
    tensors = adapter.tensors
    if f'{MEANS}.weight' not in tensors:
        return nn.Linear(output.in_features, num_points * output.out_features, bias=f'{OUTPUT}.bias' in tensors)
    hidden = sorted(name for name in tensors if name.startswith(LOGSTDS) and name.endswith('.weight'))
    constant = adapter.config.get('constant_logstd')
    if not hidden and constant is None:
        raise AdapterError(f'{adapter.where!r}: its policy head is not complete, it lacks {LOGSTDS}')
    head = MixtureHead(
        num_points, output.out_features // area, math.isqrt(area), ROW_ORDER_OF[layout], None if hidden else constant
    )
    first = tensors[hidden[0]] if hidden else None
    condition_features = output.in_features if first is None else first.shape[1]
    inner_features = 1 if first is None else first.shape[0]
    return MixtureLayer(head, output.in_features, condition_features, inner_features, max(len(hidden), 1))


def _features(module: nn.Module | None) -> tuple[int, ...] | None:
    """Shape of a layer's weights, also of those that quantisation has packed."""
    module = _own_layer(module)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = getattr(module, 'weight', None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _check_tensors(base: nn.Module, adapter: PiFlowAdapter) -> None:
    """Refuse tensors that have no place in the base, or another shape there."""
    modules = dict(base.named_modules())
    problems = []
    layers = {name.removesuffix(side) for name in adapter.lora for side in SIDES if name.endswith(side)}
    problems += [f'{name} is no low-rank matrix' for name in adapter.lora if not name.endswith(SIDES)]
    for layer in sorted(layers):
        if layer not in modules:
            problems.append(f'there is no layer {layer}')
        elif any(f'{layer}{side}' not in adapter.lora for side in SIDES):
            problems.append(f'{layer} has one matrix of two')
        else:
            down, up = (adapter.lora[f'{layer}{side}'].shape for side in SIDES)
            expected = _features(modules[layer])
            if expected is None or len(down) != 2 or len(up) != 2 or (up[0], down[1]) != expected[:2]:
                problems.append(f'{layer} has weights {expected}, its matrices {tuple(up)} and {tuple(down)}')
            elif up[1] != down[0]:
                problems.append(f'the matrices of {layer} have the ranks {up[1]} and {down[0]}')
    for name, tensor in adapter.tensors.items():
        path, _, part = name.rpartition('.')
        if name.startswith(OUTPUT):
            continue
        module = _own_layer(modules.get(path))
        own = getattr(module, part, None)
        expected = _features(module) if part == 'weight' else tuple(own.shape) if isinstance(own, Tensor) else None
        if expected != tuple(tensor.shape):
            problems.append(f'{name} is {tuple(tensor.shape)}, here {"nothing" if expected is None else expected}')
    if problems:
        more = f'; and {len(problems) - 4} more' if len(problems) > 4 else ''
        raise AdapterError(
            f'{adapter.where!r} is no adapter of this {type(base).__name__}: {"; ".join(problems[:4])}{more}'
        )


def _replace_layers(student: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, device) -> None:
    """Give the student tensors of its own; a quantised layer becomes a plain one."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition('.')
        by_layer.setdefault(path, {})[part] = tensor.to(device=device, dtype=dtype)
    for path, parts in by_layer.items():
        module = _own_layer(student.get_submodule(path))
        if isinstance(module, nn.Linear) and 'weight' in parts:
            bias = parts.get('bias', module.bias)
            with torch.device('meta'):
                layer = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
            state = {'weight': parts['weight'], **({} if bias is None else {'bias': bias})}
            layer.load_state_dict(state, assign=True)
            student.set_submodule(path, layer)
        else:
            for part, tensor in parts.items():
                kind = nn.Parameter if part in module._parameters else (lambda value: value)
                setattr(module, part, kind(tensor))


def _set_out_channels(student: nn.Module, channels: int) -> None:
    """Let forward passes that arrange the output as images know how wide it is."""
    if hasattr(student, 'out_channels'):
        student.out_channels = channels
    if 'out_channels' in student.config:
        student.register_to_config(out_channels=channels)
