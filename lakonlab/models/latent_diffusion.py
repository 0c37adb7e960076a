"""What image generators share: latents, guidance of teacher and samples, and sampling of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lakonlab.models.base_diffusion import BaseDiffusion, needs_negative
from lakonlab.models.training_step import Around, alone
from lakonlab.ops.random_source import RandomSource, TorchSource
from lakonlab.ops.shapes import batch_size_of, concatenate_rows


class Conditions(NamedTuple):
    """What the images of a batch show."""

    positive: dict[str, Any]
    """Arguments of the network for what they show."""
    negative: dict[str, Any] | None
    """Arguments of the network for what guidance moves away from; None if the batch has none."""


class LatentDiffusion(BaseDiffusion):
    """A conditional image model in the latents of an autoencoder or in pixels. See :class:`BaseDiffusion`.

    A subclass says what the conditions of a batch are (:meth:`conditions_of`). For training a batch holds ``latents``
    (B, C, H, W) or ``images`` (B, 3, H, W) in [0, 1], or for a trainer without data ``latent_size``, B times (C, H, W);
    for sampling ``noise`` (B, C, H, W), unless ``test_cfg.latent_size`` is given.
    """

    #: What to do about missing negative conditions, for messages.
    negative_hint = 'the data set must bring them'

    def conditions_of(self, data: Mapping[str, Any], needs_negative: bool) -> Conditions:
        """Conditions of a batch, on the device of the model.

        Args:
            data: The batch.
            needs_negative: Whether the negative ones will be used; otherwise they may be left out.
        """
        raise NotImplementedError(f'{type(self).__name__} does not say what its conditions are')

    def with_guidance(self, conditions: Conditions, guidance_scale: float | None) -> dict[str, Any]:
        """Arguments of the network for a batch, doubled for guidance with the negative half first.

        Raises:
            ValueError: Guidance is asked for and there are no negative conditions.
        """
        if not needs_negative(guidance_scale):
            return conditions.positive
        if conditions.negative is None:
            raise ValueError(f'guidance_scale={guidance_scale} needs negative conditions: {self.negative_hint}')
        return concatenate_rows(conditions.negative, conditions.positive)

    def encode_batch(self, data: Mapping[str, Any], source: RandomSource | None = None) -> Tensor:
        """Latents of a batch: given, or encoded from its images; without an autoencoder, the pixels in [-1, 1].

        A trainer without data takes only their shape, for which ``latent_size``, the shape of every row, is enough, or
        ``test_cfg.latent_size``.

        Raises:
            ValueError: The batch holds neither latents nor images, and the trainer needs them or no shape is given.
        """
        if data.get('latents') is not None:
            return self.patchify(data['latents'].to(self.device))
        if data.get('images') is not None:
            return self.patchify(self.encode_images(data['images'].to(self.device) * 2 - 1, 'sample', source))
        found = f'the batch holds neither latents nor images to train on, only {sorted(data)}'
        trainer = type(self.diffusion).__name__
        if not getattr(self.diffusion, 'is_multistep', False):
            raise ValueError(
                f'{found}: {trainer} is trained on data; let the data set bring images (ImagePrompt: set image_dir) or '
                'cached latents, or train with PiFlowImitationDataFree'
            )
        size = common_size(data)
        size = self.diffusion.test_section().latent_size if size is None else size
        if size is None:
            raise ValueError(
                f"{found}: {trainer} needs no data but a shape; set the data set's latent_size, or test_cfg.latent_size"
            )
        return self.patchify(torch.zeros((batch_size_of(data), *size), device=self.device))

    @torch.no_grad()
    def encode_images(self, images: Tensor, sample_mode: str = 'argmax', source: RandomSource | None = None) -> Tensor:
        """Latents of images in [-1, 1]; the images themselves without an autoencoder.

        Args:
            images: (B, 3, H, W).
            sample_mode: ``'sample'`` from the autoencoder's posterior, or its mode, ``'argmax'``.
            source: Source of the draw of the sample.
        """
        if self.vae is None:
            return images
        images = images.to(next(self.vae.parameters()).dtype)
        return self.vae.encode(images, sample_mode=sample_mode, source=source).float()

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
        self,
        data: dict[str, Any],
        running_status: Mapping[str, int],
        source: RandomSource,
        loss_factor: float,
        around: Around = alone,
    ) -> dict[str, Tensor]:
        """See the base class, and the class for the keys of a micro-batch."""
        x_0 = self.encode_batch(data, source)
        scale, section = self.teacher_guidance()
        conditions = self.conditions_of(data, self.teacher is not None and needs_negative(scale))
        student, of_teacher = self.training_conditions(conditions, data, source)
        kwargs: dict[str, Any] = {**student, 'running_status': running_status}
        if self.teacher is not None:
            kwargs.update(
                teacher=self.teacher,
                teacher_kwargs={
                    **self.with_guidance(of_teacher, scale),
                    'guidance_scale': scale,
                    'test_cfg': section,
                },
            )
        return self.backward_losses(x_0, source, loss_factor, around, **kwargs)

    def training_conditions(
        self, conditions: Conditions, data: Mapping[str, Any], source: RandomSource
    ) -> tuple[dict[str, Any], Conditions]:
        """What the student is told in training, and what the teacher is.

        Args:
            conditions: Of the batch.
            data: The batch.
            source: Source of random numbers.
        """
        return conditions.positive, conditions

    def sampling_conditions(self, conditions: Conditions, cfg: Any, batch_size: int) -> Conditions:
        """What a network is told that is to be sampled; ``cfg`` is its sampling section."""
        return conditions

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
        scale = cfg.guidance_scale
        conditions = self.conditions_of(data, needs_negative(scale))
        batch_size = batch_size_of(conditions.positive)
        conditions = self.sampling_conditions(conditions, cfg, batch_size)
        if data.get('noise') is not None:
            noise = data['noise'].to(self.device)
        elif cfg.latent_size is not None:
            noise = source.normal('noise', (batch_size, *cfg.latent_size), device=self.device)
        else:
            raise ValueError('to sample, the data must bring noise or test_cfg must give latent_size')
        latents = self.unpatchify(
            diffusion(
                noise=self.patchify(noise),
                **self.with_guidance(conditions, scale),
                guidance_scale=scale,
                test_cfg_override=override,
                source=source,
                show_pbar=show_pbar,
                clamp_denoised=self.clamp_latents if cfg.clamp_denoised else None,
            )
        )
        images = (self.decode_latents(latents) / 2 + 0.5).clamp(0, 1)
        nfe = diffusion.num_function_evaluations(override)
        return {'num_samples': batch_size, 'pred_imgs': images, 'nfe': nfe}


def common_size(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape that all rows of a batch ask for by ``latent_size``; None if they ask for none.

    Raises:
        ValueError: They differ.
    """
    sizes = {tuple(int(length) for length in size) for size in data.get('latent_size') or ()}
    if len(sizes) > 1:
        raise ValueError(
            f'latent_size: the rows of a batch ask for {" and ".join(map(str, sorted(sizes)))}; give the data set '
            'bucketize=True, so that a batch has one shape'
        )
    return sizes.pop() if sizes else None
