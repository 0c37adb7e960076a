"""Low-rank matrices of a student: whether they take part, fusing them, and writing them."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from lakonlab.pipelines.student import OUTPUT, QUANTISATION_STATES, Student, inner_name


def is_active(student: nn.Module, adapter_name: str) -> bool:
    """Whether low-rank matrices are there, and take part in the passes of all layers that have them."""
    layers = [module for module in student.modules() if adapter_name in getattr(module, 'lora_A', ())]
    return bool(layers) and all(
        adapter_name in layer.active_adapters and not layer.disable_adapters for layer in layers
    )


def is_there(student: nn.Module, adapter_name: str) -> bool:
    """Whether any layer has these low-rank matrices."""
    return any(adapter_name in getattr(module, 'lora_A', ()) for module in student.modules())


def is_fused(student: nn.Module) -> bool:
    """Whether low-rank matrices are added to the weights of their layers."""
    return any(getattr(module, 'merged_adapters', None) for module in student.modules())


def _adapted_layers(student: nn.Module) -> Iterator[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in student.modules():
        if isinstance(module, BaseTunerLayer):
            yield module.get_base_layer()


def part_from_base(student: nn.Module) -> None:
    """Give layers that have low-rank matrices weights of their own, since fusing changes these in place."""
    record: Student = student.piflow
    for layer in _adapted_layers(student):
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


def guard_base(student: nn.Module) -> None:
    """Let the student part from the base when its own ``fuse_lora`` is called, by a pipeline or by a user.

    From the normalisation layers that a style overwrote in the base, too, since they are restored when styles go.
    """
    own_parameters(student, getattr(student, '_transformer_norm_layers', None) or ())

    def fuse_lora(self: nn.Module, *args, **kwargs) -> None:
        part_from_base(self)
        try:
            type(self).fuse_lora(self, *args, **kwargs)
        except Exception as error:  # of peft, whose kinds of layers each have errors of their own
            for module in self.modules():
                if getattr(module, 'merged_adapters', None):
                    module.merged_adapters.clear()
            rejoin_base(self)
            raise ValueError(
                f'the adapters cannot be fused with these weights, and none is ({type(error).__name__}: {error}); they '
                'are in use all the same. Where torchao has quantised the weights, peft can fuse one adapter, not two'
            ) from error

    def unfuse_lora(self: nn.Module, *args, **kwargs) -> None:
        type(self).unfuse_lora(self, *args, **kwargs)
        rejoin_base(self)

    for method in (fuse_lora, unfuse_lora):
        setattr(student, method.__name__, types.MethodType(method, student))


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
