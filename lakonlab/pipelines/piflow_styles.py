"""Styles, that is low-rank matrices which diffusers loads, beside the adapter of pi-Flow."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from lakonlab.pipelines.student import OUTPUT, Student
from lakonlab.pipelines.student_lora import own_parameters, rejoin_base

logger = logging.getLogger(__name__)

TRANSFORMER = 'transformer'


class PiFlowStylesMixin:
    """Keeps styles from the base of a student, and the student whole when they go."""

    def unfuse_lora(self, *args, **kwargs) -> None:
        """As in the base class; the student shares the weights of the base again."""
        super().unfuse_lora(*args, **kwargs)
        for student in self._students().values():
            rejoin_base(student)

    def unload_lora_weights(self, *args, **kwargs) -> None:
        """Remove the adapters of styles, also from the text encoders; that of pi-Flow stays."""
        record: Student | None = getattr(getattr(self, 'transformer', None), 'piflow', None)
        if record is None or record.adapter_name is None:
            super().unload_lora_weights(*args, **kwargs)
            return
        self.__dict__['_lora_loadable_modules'] = [part for part in self._lora_loadable_modules if part != TRANSFORMER]
        try:
            super().unload_lora_weights(*args, **kwargs)
        finally:
            del self.__dict__['_lora_loadable_modules']
        names = list(getattr(self.transformer, 'peft_config', {}))
        self.transformer.delete_adapters([name for name in names if name != record.adapter_name])
        if record.adapter_name in names:
            self.transformer.set_adapters([record.adapter_name])

    @classmethod
    def load_lora_into_transformer(cls, *args, **kwargs):
        """As in the base class; a student has a policy head where a style may change the output layer."""
        parent = super().load_lora_into_transformer
        bound = inspect.signature(parent).bind(*args, **kwargs)
        bound.arguments['state_dict'] = _without_output(bound.arguments['state_dict'], bound.arguments['transformer'])
        return parent(*bound.args, **bound.kwargs)

    @classmethod
    def _maybe_expand_lora_state_dict(cls, transformer, lora_state_dict):
        """Of FLUX, which looks up the layers of a style before it is loaded."""
        return super()._maybe_expand_lora_state_dict(transformer, _without_output(lora_state_dict, transformer))

    @classmethod
    def _load_norm_into_transformer(cls, state_dict, transformer, *args, **kwargs):
        """Of FLUX, some of whose styles bring normalisation layers, which are written into those that are there."""
        before = getattr(transformer, '_transformer_norm_layers', None) or {}  # of another style, loaded earlier
        if getattr(transformer, 'piflow', None) is not None:
            own_parameters(transformer, (name.removeprefix('transformer.') for name in state_dict))
        return {**super()._load_norm_into_transformer(state_dict, transformer, *args, **kwargs), **before}


def _without_output(state: Mapping[str, Any], transformer: nn.Module) -> dict[str, Any]:
    """The matrices of a style, without those for an output layer that a student no longer has."""
    if getattr(transformer, 'piflow', None) is None:
        return dict(state)
    head = {name for name in state if name.removeprefix('transformer.').startswith(f'{OUTPUT}.')}
    if head:
        logger.warning(
            'the student has a policy head in place of %s: %d tensors for it are left out', OUTPUT, len(head)
        )
    return {name: tensor for name, tensor in state.items() if name not in head}
