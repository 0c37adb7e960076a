"""DINOv2 (Oquab et al., 2023) as transformers has it, whose features know what is in an image and how it looks."""

from __future__ import annotations

from torch import Tensor, tensor

from lakonlab.evaluation.extractor import FeatureExtractor, Features
from lakonlab.evaluation.hub_models import digest_of, hub_name, loaded_whole
from lakonlab.evaluation.mobilenet import MEAN, STD
from lakonlab.evaluation.preparation import as_rgb
from lakonlab.registry import FEATURE_EXTRACTORS


@FEATURE_EXTRACTORS.register_module()
class DINOv2(FeatureExtractor):
    """The state of the class token.

    Args:
        weights: Folder that ``save_pretrained`` wrote, or repository of the hub.
        input_size: Side in pixels that metrics bring images to; a multiple of 14.

    Raises:
        OSError: The weights cannot be had.
        ValueError: They are of another network.
    """

    classifies = False

    def __init__(self, weights: str = 'huggingface://facebook/dinov2-base', input_size: int = 224):
        super().__init__()
        from transformers import Dinov2Model

        self.input_size = input_size
        self.net = loaded_whole(Dinov2Model, hub_name(weights), 'DINOv2.weights')
        self.feature_dim = self.net.config.hidden_size
        self.weights_hash = digest_of(hub_name(weights), self.net)
        self.register_buffer('mean', tensor(MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer('std', tensor(STD).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Features:
        states = self.net((as_rgb(images).float() - self.mean) / self.std).last_hidden_state
        return Features(states[:, 0])

    def protocol(self) -> dict[str, str]:
        return dict(name='DINOv2', weights_sha256=self.weights_hash, images='float, normalised as for ImageNet')
