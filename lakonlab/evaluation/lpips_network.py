"""LPIPS, the perceptual distance of two images (Zhang et al., 2018), with weights that are named and hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from lakonlab.evaluation.preparation import as_rgb
from lakonlab.registry import IMAGE_DISTANCES
from lakonlab.storage.fetch import fetch

BACKBONES = {
    'alex': 'https://download.pytorch.org/models/alexnet-owt-7be5be79.pth',
    'vgg': 'https://download.pytorch.org/models/vgg16-397923af.pth',
}


@IMAGE_DISTANCES.register_module()
class LPIPSNetwork(nn.Module):
    """Distances between images, by the package ``lpips``, whose own weights are in the package.

    Args:
        net: ``'alex'`` or ``'vgg'``.
        backbone: File of torchvision's weights of that network, of any scheme; None for torchvision's own address.

    Raises:
        ModuleNotFoundError: The package is not installed.
        OSError: The file cannot be had.
        ValueError: It holds another network.
    """

    def __init__(self, net: str = 'alex', backbone: str | None = None):
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f'LPIPSNetwork.net={net!r}: expected one of {", ".join(map(repr, BACKBONES))}')
        try:
            import lpips
        except ImportError as error:
            raise ModuleNotFoundError("LPIPS needs the package lpips: pip install 'lakonlab[lpips]'") from error
        path = fetch(BACKBONES[net] if backbone is None else backbone)
        if not path.is_file():
            raise FileNotFoundError(f'LPIPSNetwork.backbone: there is no file {path}')
        head = Path(lpips.__file__).parent / 'weights' / 'v0.1' / f'{net}.pth'
        self.net = net
        self.distance = lpips.LPIPS(net=net, pnet_rand=True, model_path=str(head), verbose=False)
        content = path.read_bytes()
        state = torch.load(path, map_location='cpu', weights_only=True)
        try:
            # a layer of the package's slices keeps the number that it has in torchvision's list of features
            layers = {name: state[f'features.{name.split(".", 1)[1]}'] for name in self.distance.net.state_dict()}
            self.distance.net.load_state_dict(layers)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f'LPIPSNetwork.backbone: {path} does not hold {net}: {error}') from None
        self.weights_hash = hashlib.sha256(content + head.read_bytes()).hexdigest()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Distances of pairs.

        Args:
            left: Shape (B, 1 or 3, H, W), float in [0, 1]; at least 32 pixels high and wide.
            right: The same.

        Returns:
            Shape (B,).
        """
        return self.distance(as_rgb(left).float() * 2 - 1, as_rgb(right).float() * 2 - 1).flatten()

    def protocol(self) -> dict[str, str]:
        """What must be equal for two distances to be comparable."""
        return dict(name=f'LPIPS {self.net} 0.1', weights_sha256=self.weights_hash, images='float, not resized')
