"""Spatial correlation of the noise behind a mixture's samples (GMFlow, spectral sampling).

A mixture per pixel says nothing of how pixels depend on each other. The Knothe-Rosenblatt map turns data into
normal noise; a small network learns the power spectrum of that noise, and sampling draws noise of this spectrum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lakonlab.ops.isotropic_mixture import GaussianMixture, isotropic_gaussian
from lakonlab.ops.mixture_transport import from_normal, to_normal
from lakonlab.ops.random_source import RandomSource


def hartley(x: Tensor) -> Tensor:
    """The orthonormal discrete Hartley transform of the last two dimensions; it is its own inverse."""
    spectrum = torch.fft.fft2(x, norm='ortho')
    return spectrum.real + spectrum.imag


def spectral_loss(spectrum_net: nn.Module, mixture: GaussianMixture, x_0: Tensor) -> Tensor:
    """Negative log-likelihood of the noise behind the clean data, relative to white noise.

    Args:
        spectrum_net: Called with mean (B, C, H, W) and variance (B, 1, H, W); returns logarithms of powers.
        mixture: Predicted mixture over ``x_0``, (B, K, C, H, W); it receives no gradient.
        x_0: Clean latents, (B, C, H, W).
    """
    mixture = GaussianMixture(*(tensor.detach() for tensor in mixture))
    with torch.no_grad():
        frequencies = hartley(to_normal(x_0.unsqueeze(-4), mixture).squeeze(-4))
    log_power = spectrum_net(*isotropic_gaussian(mixture))
    return 0.5 * (frequencies.square() * ((-log_power).exp() - 1) + log_power).mean()


def sample_with_spectrum(spectrum_net: nn.Module, mixture: GaussianMixture, source: RandomSource) -> Tensor:
    """A sample (B, C, H, W) of every pixel's mixture, made of noise with the predicted power spectrum.

    Args:
        spectrum_net: See :func:`spectral_loss`.
        mixture: The mixture, (B, K, C, H, W).
        source: Source of the draw ``component_noise``.
    """
    mean, variance = isotropic_gaussian(mixture)
    white = source.normal('component_noise', mean.shape, mean.dtype, mean.device)
    coloured = hartley((0.5 * spectrum_net(mean, variance)).exp() * white)
    return from_normal(coloured.unsqueeze(-4), mixture).squeeze(-4)
