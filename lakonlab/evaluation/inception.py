"""The Inception network of 2015 that FID is defined by, as torch-fidelity has it."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from lakonlab.evaluation.extractor import FeatureExtractor, Features
from lakonlab.evaluation.hub_models import NO_WEIGHTS
from lakonlab.evaluation.preparation import as_rgb, to_bytes
from lakonlab.registry import FEATURE_EXTRACTORS
from lakonlab.storage.fetch import fetch
from lakonlab.storage.local import sha256_of

WEIGHTS = 'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth'
NAME = 'inception-v3-compat'


@FEATURE_EXTRACTORS.register_module()
class InceptionV3(FeatureExtractor):
    """Pool features (2048) and class scores without bias (1008) of torch-fidelity's port of the original graph.

    It quantises images to 8 bits, and resizes those of another size to 299 x 299 as TensorFlow 1 did; other ways of
    resizing come before it.

    Args:
        weights: A file of its weights, of any scheme.

    Raises:
        OSError: There is no such file, or it cannot be downloaded.
        ValueError: The file holds something else.
    """

    input_size = 299
    feature_dim = 2048
    classifies = True

    def __init__(self, weights: str = WEIGHTS):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = fetch(weights)
        if not path.is_file():
            raise FileNotFoundError(f'InceptionV3.weights: there is no file {weights}')
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
            # torch-fidelity unpickles what it is given, so that is only what was read here
            checked = io.BytesIO()
            torch.save({name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}, checked)
            checked.seek(0)
            self.net = FeatureExtractorInceptionV3(NAME, ['2048', 'logits_unbiased'], checked)
        except NO_WEIGHTS as error:
            reason = str(error).partition('\n')[0]
            raise ValueError(f'InceptionV3.weights: {weights} does not hold this network: {reason}') from None
        self.weights_hash = sha256_of(path)

    def forward(self, images: Tensor) -> Features:
        return Features(*self.net(to_bytes(as_rgb(images))))

    def protocol(self) -> dict[str, str]:
        return dict(name='InceptionV3', weights_sha256=self.weights_hash, images='uint8, 299 x 299 as TensorFlow 1')
