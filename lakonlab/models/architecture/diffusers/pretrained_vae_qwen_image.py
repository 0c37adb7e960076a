"""The autoencoder of Qwen-Image."""

from __future__ import annotations

from torch import Tensor

from lakonlab.models.architecture.diffusers.pretrained_vae import PretrainedVAE
from lakonlab.registry import MODULES


@MODULES.register_module()
class PretrainedVAEQwenImage(PretrainedVAE):
    """Qwen-Image's autoencoder, which is one of videos: an image is a video of one frame.

    Args:
        model_name_or_path: Local folder, or repository of the hub; None for ``'Qwen/Qwen-Image'``.
        subfolder: Folder of the autoencoder in it.
        **options: See :class:`~lakonlab.models.architecture.diffusers.pretrained_vae.PretrainedVAE`.
    """

    published_parameters = 126_892_531

    def __init__(self, model_name_or_path: str | None = None, subfolder: str | None = 'vae', **options):
        if model_name_or_path is None and options.get('from_pretrained') is None:
            model_name_or_path = 'Qwen/Qwen-Image'
        super().__init__(model_name_or_path=model_name_or_path, subfolder=subfolder, **options)

    def to_model(self, images: Tensor) -> Tensor:
        """(B, C, H, W) as (B, C, 1, H, W)."""
        return images.unsqueeze(2)

    def from_model(self, values: Tensor) -> Tensor:
        """(B, C, 1, H, W) as (B, C, H, W)."""
        return values.squeeze(2)
