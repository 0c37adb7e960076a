"""Class-conditional image generation, in the latents of an autoencoder or in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.random_source import RandomSource, TorchSource
from ..registry import MODELS
from .base_diffusion import BaseDiffusion, BaseDiffusionTrainConfig, needs_negative


@dataclass(kw_only=True)
class ClassImageTrainConfig(BaseDiffusionTrainConfig):
    """Keys of ``train_cfg`` that class-conditional training reads."""

    prob_class: float = 1.0
    """Probability of keeping the class label; otherwise the network is given the negative label."""
    teacher_sees_dropped_labels: bool = False
    """Give the teacher the labels after dropout instead of the true ones (as published in autumn 2025)."""


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
        images = data['images'].to(self.device) * 2 - 1
        if self.vae is not None:
            with torch.no_grad():
                images = self.vae.encode(images.to(next(self.vae.parameters()).dtype)).float()
        return self.patchify(images)

    def train_minibatch(
        self, data: dict[str, Any], running_status: Mapping[str, int], source: RandomSource, loss_factor: float
    ) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch; see the class for its keys."""
        x_0 = self.encode_batch(data)
        labels = data['labels'].to(x_0.device)
        kept = labels
        prob_class = self.train_cfg.get('prob_class', 1.0)
        negative = data['negative_labels'].to(x_0.device) if 'negative_labels' in data else None
        if prob_class < 1:
            if negative is None:
                raise ValueError('train_cfg.prob_class < 1 needs negative_labels: set negative_label in the dataset')
            keep = source.uniform('label_dropout', labels.shape, device=labels.device) < prob_class
            kept = torch.where(keep, labels, negative)
        kwargs: dict[str, Any] = {'class_labels': kept, 'running_status': running_status}
        if self.teacher is not None:
            teacher_labels = kept if self.train_cfg.get('teacher_sees_dropped_labels') else labels
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
            override = {**(self.train_cfg.get('teacher_test_cfg') or {}), **override}
        cfg = {**self.test_cfg, **override}
        labels = data['labels'].to(self.device)
        if data.get('noise') is not None:
            noise = data['noise'].to(self.device)
        elif cfg.get('latent_size') is not None:
            noise = source.normal('noise', (len(labels), *cfg['latent_size']), device=self.device)
        else:
            raise ValueError('to sample, the data must bring noise or test_cfg must give latent_size')
        scale = cfg.get('guidance_scale', 1.0)
        latents = self.unpatchify(
            diffusion(
                noise=self.patchify(noise),
                class_labels=_with_negative(labels, data.get('negative_labels'), scale),
                guidance_scale=scale,
                test_cfg_override=override,
                source=source,
                show_pbar=show_pbar,
            )
        )
        if self.vae is not None:
            latents = self.vae.decode(latents.to(next(self.vae.parameters()).dtype))
        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        nfe = diffusion.num_function_evaluations(override)
        return {'num_samples': len(labels), 'pred_imgs': images, 'nfe': nfe}


def _with_negative(labels: Tensor, negative_labels: Tensor | None, guidance_scale: float | None) -> Tensor:
    """Labels of the doubled batch that guidance needs, the negative half first."""
    if not needs_negative(guidance_scale):
        return labels
    if negative_labels is None:
        raise ValueError(f'guidance_scale={guidance_scale} needs negative_labels: set negative_label in the dataset')
    return torch.cat([negative_labels.to(labels), labels])
