"""Class-conditional image generation, in the latents of an autoencoder or in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lakonlab.models.base_diffusion import BaseDiffusion, BaseDiffusionTrainConfig, needs_negative
from lakonlab.models.section import in_range
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.registry import MODELS


@dataclass(kw_only=True)
class ClassImageTrainConfig(BaseDiffusionTrainConfig):
    """Keys of ``train_cfg`` that class-conditional training reads."""

    prob_class: float = 1.0
    """Probability of keeping the class label; otherwise the network is given the negative label."""
    teacher_sees_dropped_labels: bool = False
    """Give the teacher the labels after dropout instead of the true ones (as published in autumn 2025)."""

    def __post_init__(self):
        super().__post_init__()
        in_range(self, 0, 1, 'prob_class')


@MODELS.register_module()
class LatentDiffusionClassImage(BaseDiffusion):
    """A class-conditional image model. See :class:`BaseDiffusion` for the arguments.

    A batch holds ``labels`` and ``negative_labels`` (B,), and for training ``latents`` (B, C, H, W) or ``images``
    (B, 3, H, W) in [0, 1]; for sampling ``noise`` (B, C, H, W), unless ``test_cfg.latent_size`` is given.
    """

    train_cfg_class = ClassImageTrainConfig

    def encode_batch(self, data: Mapping[str, Any]) -> Tensor:
        """Latents of a batch: given, or encoded from its images; without an autoencoder, the pixels in [-1, 1].

        Raises:
            ValueError: The batch holds neither latents nor images.
        """
        if data.get('latents') is not None:
            return self.patchify(data['latents'].to(self.device))
        if data.get('images') is None:
            raise ValueError(f'the batch holds neither latents nor images to train on, only {sorted(data)}')
        return self.patchify(self.encode_images(data['images'].to(self.device) * 2 - 1))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images in [-1, 1]; the images themselves without an autoencoder."""
        if self.vae is None:
            return images
        return self.vae.encode(images.to(next(self.vae.parameters()).dtype)).float()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images, about [-1, 1], of latents."""
        if self.vae is None:
            return latents.float()
        return self.vae.decode(latents.to(next(self.vae.parameters()).dtype)).float()

    def clamp_latents(self, x_0: Tensor) -> Tensor:
        """The nearest latents of images in the displayable range: decode, clamp, encode."""
        images = self.decode_latents(self.unpatchify(x_0)).clamp(-1, 1)
        return self.patchify(self.encode_images(images))

    def train_minibatch(
        self, data: dict[str, Any], running_status: Mapping[str, int], source: RandomSource, loss_factor: float
    ) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch; see the class for its keys."""
        cfg = self.train_section
        x_0 = self.encode_batch(data)
        labels = data['labels'].to(x_0.device)
        kept = labels
        negative = data['negative_labels'].to(x_0.device) if 'negative_labels' in data else None
        if cfg.prob_class < 1:
            if negative is None:
                raise ValueError('train_cfg.prob_class < 1 needs negative_labels: set negative_label in the dataset')
            keep = source.uniform('label_dropout', labels.shape, device=labels.device) < cfg.prob_class
            kept = torch.where(keep, labels, negative)
        kwargs: dict[str, Any] = {'class_labels': kept, 'running_status': running_status}
        if self.teacher is not None:
            teacher_labels = kept if cfg.teacher_sees_dropped_labels else labels
            scale, section = self.teacher_guidance()
            conditions = {'class_labels': _with_negative(teacher_labels, negative, scale)}
            kwargs.update(
                teacher=self.teacher,
                teacher_kwargs={**conditions, 'guidance_scale': scale, 'test_cfg': section},
            )
        return self.backward_losses(x_0, source, loss_factor, **kwargs)

    @torch.no_grad()
    def val_step(
        self,
        data: dict[str, Any],
        role: str | None = None,
        test_cfg_override: Mapping[str, Any] | None = None,
        source: RandomSource | None = None,
        show_pbar: bool = False,
    ) -> dict[str, Any]:
        """Sample the images that a batch asks for.

        Args:
            data: See the class.
            role: ``'student'``, ``'ema'`` or ``'teacher'``; None for the EMA if there is one. The teacher is guided as
                ``train_cfg.teacher_test_cfg`` says.
            test_cfg_override: Overrides of the sampling section.
            source: Source of random numbers of the batch: ``noise`` if the batch brings none, ``step_noise``.
            show_pbar: Show a progress bar.

        Returns:
            ``num_samples``, ``pred_imgs`` (B, C, H, W) in [0, 1], and ``nfe``, the network evaluations of a sample.
        """
        source = source or TorchSource()
        diffusion = self.role(role)
        override = dict(test_cfg_override or {})
        if role == 'teacher':
            override = {**self.train_section.teacher_section(), **override}
        cfg = diffusion.test_section(override)
        labels = data['labels'].to(self.device)
        if data.get('noise') is not None:
            noise = data['noise'].to(self.device)
        elif cfg.latent_size is not None:
            noise = source.normal('noise', (len(labels), *cfg.latent_size), device=self.device)
        else:
            raise ValueError('to sample, the data must bring noise or test_cfg must give latent_size')
        scale = cfg.guidance_scale
        latents = self.unpatchify(
            diffusion(
                noise=self.patchify(noise),
                class_labels=_with_negative(labels, data.get('negative_labels'), scale),
                guidance_scale=scale,
                test_cfg_override=override,
                source=source,
                show_pbar=show_pbar,
                clamp_denoised=self.clamp_latents if cfg.clamp_denoised else None,
            )
        )
        images = (self.decode_latents(latents) / 2 + 0.5).clamp(0, 1)
        nfe = diffusion.num_function_evaluations(override)
        return {'num_samples': len(labels), 'pred_imgs': images, 'nfe': nfe}


def _with_negative(labels: Tensor, negative_labels: Tensor | None, guidance_scale: float | None) -> Tensor:
    """Labels of the doubled batch that guidance needs, the negative half first."""
    if not needs_negative(guidance_scale):
        return labels
    if negative_labels is None:
        raise ValueError(f'guidance_scale={guidance_scale} needs negative_labels: set negative_label in the dataset')
    return torch.cat([negative_labels.to(labels), labels])
