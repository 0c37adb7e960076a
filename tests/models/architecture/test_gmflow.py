"""The networks of GMFlow's toy experiment and of its spectral sampling."""

import pytest
import torch

from lakonlab.registry import MODULES


def build(**config):
    return MODULES.build(config)


def test_points_start_from_distinct_equally_likely_components():
    mixture = build(type='GMFlowMLP2DDenoiser', num_gaussians=4)(torch.randn(5, 2, 1, 1), torch.rand(5))
    assert torch.allclose(mixture['logweights'].exp(), torch.tensor(0.25))
    assert torch.allclose(mixture['logstds'].exp(), torch.tensor(0.05))
    assert len(mixture['means'][0].flatten(1).unique(dim=0)) == 4


def test_points_with_a_constant_standard_deviation():
    network = build(type='GMFlowMLP2DDenoiser', num_gaussians=4, constant_logstd=-2.0)
    assert not any(name.startswith('out_logstds') for name in network.state_dict())
    output = network(torch.randn(5, 2, 1, 1), torch.rand(5))
    assert torch.equal(output['logstds'], torch.full((5, 1, 1, 1, 1), -2.0))


def test_points_need_a_width_for_sines_and_cosines_of_both_coordinates():
    with pytest.raises(ValueError, match='embed_dim=6: expected a multiple of 4'):
        build(type='GMFlowMLP2DDenoiser', embed_dim=6)


@pytest.mark.parametrize('size', [(8, 8), (6, 5), (1, 8)])
def test_power_of_a_channel_averages_to_one(size):
    network = build(type='SpectrumMLP', base_size=(4, 8, 8), layers=[16])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    spectrum = network(torch.randn(3, 4, *size), torch.rand(3, 1, *size))
    assert torch.allclose(spectrum.exp().mean(dim=(2, 3)), torch.ones(3, 4), atol=1e-5)


def test_untrained_spectrum_is_white():
    spectrum = build(type='SpectrumMLP')(torch.randn(2, 4, 32, 32), torch.rand(2, 1, 32, 32))
    assert torch.allclose(spectrum, torch.zeros(2, 4, 32, 32), atol=1e-5)


def test_spectrum_holds_no_larger_image():
    with pytest.raises(ValueError, match=r'base_size=\(4, 8, 8\)'):
        build(type='SpectrumMLP', base_size=(4, 8, 8))(torch.randn(1, 4, 9, 8), torch.rand(1, 1, 9, 8))
