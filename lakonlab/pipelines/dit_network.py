"""What pipelines of class-conditional networks share: building them from the config of a folder, labels, decoding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.registry import MODULES


def build_network(config: Mapping[str, Any], where: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A network of this package for inference.

    Args:
        config: ``_class_name``, and arguments of its constructor; other keys are left out.
        where: The folder of the config, for errors.
        dtype: Of the weights.
        **options: Further arguments of the constructor.

    Raises:
        ValueError: The class is not known.
    """
    kind = str(config.get('_class_name')).lstrip('_')
    network_class = MODULES.get(kind)
    if network_class is None:
        raise ValueError(f'{where!r} holds a {kind!r}, which is not known')
    known = _arguments_of(network_class)
    arguments = {key: value for key, value in config.items() if key in known and value is not None}
    options = {**options, 'torch_dtype': str(dtype).removeprefix('torch.'), 'checkpointing': False}
    network = MODULES.build({'type': kind, **arguments, **options})
    return with_arguments(network.eval().requires_grad_(False), arguments)


def with_arguments(network: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """A network that remembers how it was built, so that a pipeline can save it.

    Args:
        network: A network of this package.
        arguments: Arguments of its constructor that say what it is.
    """
    network.build_arguments = dict(arguments)
    return network


def _arguments_of(kind: type) -> set[str]:
    names: set[str] = set()
    for base in kind.__mro__:
        if '__init__' in vars(base) and base.__module__.startswith('lakonlab'):
            names.update(inspect.signature(base.__init__).parameters)
    return names - {'self'}


def known_labels(class_labels: int | Sequence[int], num_classes: int) -> Tensor:
    """Labels that a network knows, (B,), int64.

    Args:
        class_labels: Classes, or one.
        num_classes: How many there are.

    Raises:
        ValueError: There are none, or others.
    """
    labels = torch.as_tensor(class_labels).flatten().tolist()
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < num_classes]
    if wrong or not labels:
        raise ValueError(
            f'class_labels={wrong or labels}: expected integers, at least one, from 0 to {num_classes - 1}'
        )
    return torch.tensor(labels)


def decode(vae: nn.Module | None, latents: Tensor) -> Tensor:
    """Images, about [-1, 1], of latents (B, C, H, W).

    Args:
        vae: ``AutoencoderKL`` of diffusers; None where latents are pixels.
        latents: As networks make them.
    """
    if vae is None:
        return latents
    latents = latents / vae.config.scaling_factor + (vae.config.get('shift_factor') or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample.float()
