"""Pretrained autoencoders between images and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lakonlab.models.architecture.diffusers.pretrained import (
    PretrainedPart,
    is_planned,
    load_part,
    local_folder,
    note_unknown,
    obtain_parts,
    read_json,
    repository,
)
from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.registry import MODULES

SAMPLE_MODES = ('sample', 'argmax')
ENCODER_PARTS = ('encoder', 'quant_conv')
DECODER_PARTS = ('decoder', 'post_quant_conv')


@MODULES.register_module()
class PretrainedVAE(PretrainedPart):
    """A variational autoencoder of the diffusers library.

    Latents are scaled as its pipelines scale them: ``(z - shift_factor) * scaling_factor``, or by the mean and standard
    deviation of every channel where the autoencoder has them.

    Args:
        model_name_or_path: Local folder, or repository of the hub.
        from_pretrained: Older name of ``model_name_or_path``.
        subfolder: Folder of the autoencoder in it.
        del_encoder: Keep no encoder.
        del_decoder: Keep no decoder.
        use_slicing: Encode and decode image by image inside the autoencoder.
        max_bs: Largest number of images that are encoded or decoded at once.
        freeze: Whether its parameters get no gradient.
        eval_mode: Whether it stays in evaluation mode.
        torch_dtype: Dtype of its weights.
        variant: Variant of the files, such as ``'fp16'``.
        revision: Revision of the repository.

    Raises:
        PretrainedError: It cannot be loaded.
        ValueError: Both names are given, or ``max_bs`` is not positive.
    """

    published_parameters = 83_819_683  # that of FLUX.1; Stable Diffusion's differs by a fifth of a percent

    def __init__(
        self,
        model_name_or_path: str | None = None,
        from_pretrained: str | None = None,
        subfolder: str | None = None,
        del_encoder: bool = False,
        del_decoder: bool = False,
        use_slicing: bool = False,
        max_bs: int = 64,
        freeze: bool = True,
        eval_mode: bool = True,
        torch_dtype: str = 'float32',
        variant: str | None = None,
        revision: str | None = None,
    ):
        super().__init__(freeze, eval_mode, torch_dtype)
        if model_name_or_path is not None and from_pretrained is not None:
            raise ValueError('from_pretrained is the older name of model_name_or_path; give only the latter')
        if max_bs < 1:
            raise ValueError(f'max_bs={max_bs}: expected at least 1')
        self.max_bs = max_bs
        name = repository(model_name_or_path or from_pretrained)
        what = f'model_name_or_path={name!r}, subfolder={subfolder!r}'
        dtype = self.torch_dtype
        options = {'subfolder': subfolder, 'variant': variant, 'revision': revision}
        options = {key: value for key, value in options.items() if value is not None}
        self.vae = self._plan(name, subfolder, dtype, what) if is_planned() else self._load(name, dtype, what, options)
        if self.vae is None:
            return
        for part in (*(ENCODER_PARTS if del_encoder else ()), *(DECODER_PARTS if del_decoder else ())):
            if isinstance(getattr(self.vae, part, None), nn.Module):
                delattr(self.vae, part)
        if use_slicing:
            self.vae.enable_slicing()
        self.prepare()

    def _load(self, name: str, dtype: torch.dtype, what: str, options: dict[str, Any]) -> nn.Module:
        from diffusers import AutoModel

        only = None if 'subfolder' not in options else [options['subfolder']]
        name, revision = obtain_parts(name, only, options.pop('revision', None))
        options = options if revision is None else {**options, 'revision': revision}
        return load_part(lambda: AutoModel.from_pretrained(name, dtype=dtype, **options), what)

    def _plan(self, name: str, subfolder: str | None, dtype: torch.dtype, what: str) -> nn.Module | None:
        folder = local_folder(name)
        if folder is None:
            note_unknown(what)
            return None
        import diffusers

        config = read_json(Path(folder, subfolder or '', 'config.json'), what)
        kind = getattr(diffusers, str(config.get('_class_name')), None)
        if kind is None:
            raise PretrainedError(f'{what}: diffusers has no class {config.get("_class_name")!r}')
        return kind.from_config(config).to(dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is subtracted from a latent, and what it is divided by."""
        config = self.vae.config
        mean, std = config.get('latents_mean'), config.get('latents_std')
        if mean is not None and std is not None:
            shape = (1, -1, *([1] * (like.dim() - 2)))
            return (torch.tensor(values, device=like.device, dtype=like.dtype).view(shape) for values in (mean, std))
        return config.get('shift_factor') or 0.0, 1 / (config.get('scaling_factor') or 1.0)

    def to_model(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the autoencoder takes them."""
        return images

    def from_model(self, values: Tensor) -> Tensor:
        """What the autoencoder gives as (B, C, H, W)."""
        return values

    @torch.no_grad()
    def encode(self, images: Tensor, sample_mode: str = 'sample', source: RandomSource | None = None) -> Tensor:
        """Latents of images.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            sample_mode: ``'sample'`` from the posterior, or its mode, ``'argmax'``.
            source: Source of the draw ``vae_noise``.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: ``sample_mode`` is unknown, or the autoencoder has no encoder.
        """
        if sample_mode not in SAMPLE_MODES:
            raise ValueError(f'sample_mode={sample_mode!r}: expected one of {", ".join(SAMPLE_MODES)}')
        self._require('encoder')
        posteriors = [self.vae.encode(part).latent_dist for part in self.to_model(images).split(self.max_bs)]
        z = torch.cat([posterior.mode() for posterior in posteriors])
        if sample_mode == 'sample':
            std = torch.cat([posterior.std for posterior in posteriors])
            z = z + std * (source or TorchSource()).normal('vae_noise', z.shape, z.dtype, z.device)
        mean, scale = self._statistics(z)
        return self.from_model((z - mean) / scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: (B, C, h, w).

        Returns:
            (B, 3, H, W), about [-1, 1].

        Raises:
            ValueError: The autoencoder has no decoder.
        """
        self._require('decoder')
        z = self.to_model(latents)
        mean, scale = self._statistics(z)
        parts = [self.vae.decode(part, return_dict=False)[0] for part in (z * scale + mean).split(self.max_bs)]
        return self.from_model(torch.cat(parts))

    def _require(self, part: str) -> None:
        if self.vae is None or not hasattr(self.vae, part):
            raise ValueError(f'this autoencoder has no {part}: set del_{part}=False')


@MODULES.register_module()
class PretrainedVAEEncoder(PretrainedVAE):
    """The encoder of an autoencoder alone.

    Args:
        **options: See :class:`PretrainedVAE`.
    """

    def __init__(self, **options):
        super().__init__(del_decoder=True, **options)


@MODULES.register_module()
class PretrainedVAEDecoder(PretrainedVAE):
    """The decoder of an autoencoder alone.

    Args:
        **options: See :class:`PretrainedVAE`.
    """

    def __init__(self, **options):
        super().__init__(del_encoder=True, **options)
