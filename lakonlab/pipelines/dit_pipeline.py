"""What pipelines of class-conditional networks share: networks from configs of folders, labels, noise, images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
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


class DiTPipeline(DiffusionPipeline):
    """What pipelines have in common whose ``transformer`` is a class-conditional network of this package."""

    @property
    def device(self) -> torch.device:
        """Of the transformer."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer."""
        return next(self.transformer.parameters()).dtype

    def noise_of(
        self,
        labels: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Where sampling starts, (B, C, H, W), float32.

        Args:
            labels: (B,).
            generator: Of all images, or one per image.
            latents: Noise that is given; None to draw it.

        Raises:
            ValueError: There is not one generator per image, or the noise has another shape.
        """
        arguments = self.transformer.build_arguments
        size = arguments.get('sample_size', 32)
        shape = (len(labels), arguments.get('in_channels', 4), size, size)
        if isinstance(generator, (list, tuple)) and len(generator) != len(labels):
            raise ValueError(f'{len(generator)} generators for {len(labels)} labels: expected one, or one per image')
        if latents is None:
            return randn_tensor(shape, generator=generator, device=labels.device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f'latents of shape {tuple(latents.shape)}: expected {shape}')
        return latents.to(labels.device)

    def output_of(self, latents: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """What a call returns.

        Args:
            latents: Samples, (B, C, H, W); pixels about [-1, 1] where there is no autoencoder.
            output_type: ``'pil'``, ``'np'``, ``'pt'`` or ``'latent'``.
            return_dict: Return an output object instead of a tuple.
        """
        images = latents
        if output_type != 'latent':
            if self.vae is not None:
                config = self.vae.config
                latents = latents / config.scaling_factor + (config.get('shift_factor') or 0.0)
                latents = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
            images = VaeImageProcessor(vae_scale_factor=1).postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
