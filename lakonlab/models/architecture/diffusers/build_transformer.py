"""Transformers of the diffusers library, by the name of their class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn


def build_transformer(arguments: Mapping[str, Any]) -> nn.Module:
    """Build a transformer of the diffusers library.

    Args:
        arguments: ``type``, the name of its class, and the arguments of its constructor.

    Raises:
        ValueError: There is no such class or argument.
    """
    import diffusers

    options = dict(arguments)
    kind = options.pop('type', None)
    names = [name for name in dir(diffusers) if name.endswith(('Transformer2DModel', 'TransformerModel'))]
    transformer = getattr(diffusers, str(kind), None)
    if not isinstance(transformer, type) or not issubclass(transformer, nn.Module):
        near = get_close_matches(str(kind), names, n=2)
        hint = f'; near it: {", ".join(near)}' if near else ''
        raise ValueError(f'transformer.type={kind!r} is no model of diffusers {diffusers.__version__}{hint}')
    known = list(inspect.signature(transformer.__init__).parameters)[1:]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f'; did you mean {near[0]!r}?' if near else f'; it has {", ".join(known)}'
            raise ValueError(f'transformer.{name}: no argument of {kind}{hint}')
    return transformer(**options)
