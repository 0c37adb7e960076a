"""Sampling a velocity network with every solver: evaluations are counted truly and draws come from the source."""

import pytest
import torch
from torch import nn

from lakonlab.models.diffusions.gaussian_flow import GaussianFlow
from lakonlab.models.diffusions.schedulers.flow_adapter import BASE_SOLVERS
from lakonlab.ops.random_source import SeededSource
from tests.exact_mixture import ExactMixture

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # numpy warns about diffusers' solvers

MIXTURE = ExactMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), torch.tensor([0.7, 0.3]), std=0.2)


class CountingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.times: list[float] = []

    def forward(self, x_t, t):
        self.times.append(float(t[0]))
        return self.scale * MIXTURE.velocity(x_t, t)


SOLVERS = [
    ('FlowEulerODE', {}),
    ('FlowHeunODE', {}),
    ('FlowSDE', {'h': '0.2 + sigma'}),
    *[('FlowAdapter', {'base_scheduler': base}) for base in BASE_SOLVERS],
]


@pytest.mark.parametrize(('sampler', 'kwargs'), SOLVERS)
@pytest.mark.parametrize('steps', [{'num_timesteps': 6}, {'sigmas': [0.9, 0.5, 0.2]}])
def test_evaluations_and_draws(sampler, kwargs, steps):
    net = CountingNet()
    test_cfg = {'sampler': sampler, 'sampler_kwargs': kwargs, **steps}
    flow = GaussianFlow(net, num_timesteps=1, timestep_sampler={'shift': 2.0}, test_cfg=test_cfg)
    noise = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    x_0 = flow(noise=noise, source=SeededSource(1))
    assert torch.equal(torch.get_rng_state(), before)
    num_steps = len(steps.get('sigmas', range(6)))
    assert len(net.times) == flow.num_function_evaluations()
    assert len(net.times) == (2 * num_steps - 1 if sampler == 'FlowHeunODE' else num_steps)
    assert min(net.times) > 0
    torch.testing.assert_close(flow(noise=noise, source=SeededSource(1)), x_0)
    torch.testing.assert_close(flow(noise=noise[2:], source=SeededSource(1, first_row=2)), x_0[2:])


def test_heun_is_clamped_at_the_noise_level_of_every_evaluation():
    flow = GaussianFlow(CountingNet(), num_timesteps=1, test_cfg={'sampler': 'FlowHeunODE', 'num_timesteps': 5})
    seen = []

    def clamp(x_0):
        seen.append(x_0)
        return x_0.clamp(-0.5, 0.5)

    noise = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x_0 = flow(noise=noise, clamp_denoised=clamp)
    assert len(seen) == 9
    assert x_0.abs().max() <= 0.5 + 1e-5
