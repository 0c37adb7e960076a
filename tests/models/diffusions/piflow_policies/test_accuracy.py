"""How far single precision is from double: velocities of mixtures of any size at low noise, and rollouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.models.diffusions.piflow_policies import GMFlowPolicy, euler_rollout
from tests.policy_cases import KINDS, Case, build, ingredients

LOW_NOISE = 1e-3


@st.composite
def mixtures(draw):
    """A network output, the state it is for and its noise level, all in float32."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    k, c = draw(st.integers(1, 32)), draw(st.integers(1, 16))
    logstd = draw(st.floats(-2, 1, width=32))
    output = {
        'means': torch.randn(2, k, c, 4, 4, generator=generator),
        'logweights': torch.randn(2, k, 1, 4, 4, generator=generator).log_softmax(dim=1),
        'logstds': torch.full((2, 1, 1, 1, 1), logstd),
    }
    sigma_src = torch.tensor([1.0, draw(st.floats(0.125, 1, width=32))])
    return output, torch.randn(2, c, 4, 4, generator=generator), sigma_src


def on_the_way(output, x_src, sigma_src, sigma_t):
    """A state that a policy of this output comes by: the noisy source of one of the components."""
    sigma = sigma_src.reshape(-1, 1, 1, 1)
    x_0 = x_src - sigma * output['means'][:, 0]
    return x_0 + (sigma_t / sigma) * (x_src - x_0)


def relative_error(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


def velocities(mixture):
    """The velocity at low noise from float32 and from the very same numbers in float64."""
    output, x_src, sigma_src = mixture
    sigma_t = torch.full((2,), LOW_NOISE)
    x_t = on_the_way(output, x_src, sigma_src, LOW_NOISE)
    double = GMFlowPolicy({name: value.double() for name, value in output.items()}, x_src.double(), sigma_src)
    single = GMFlowPolicy(output, x_src, sigma_src)
    return single.pi(x_t, sigma_t), double.pi(x_t.double(), sigma_t)


@settings(deadline=None, max_examples=25)
@given(mixture=mixtures())
def test_velocity_at_noise_level_one_thousandth(mixture):
    """Whatever number of components and channels; the difference (x_t - E[x_0]) / sigma is at 1e-4 and worse."""
    found, expected = velocities(mixture)
    assert relative_error(found, expected) < 1e-6


@settings(deadline=None, max_examples=15)
@given(mixture=mixtures(), narrower=st.floats(0, 3))
def test_narrow_components_cost_digits_in_proportion_to_their_logits(mixture, narrower):
    """Logits grow with 1 / std^2, and their rounding with them; no more is lost than that."""
    output, x_src, sigma_src = mixture
    output['logstds'] -= narrower
    found, expected = velocities((output, x_src, sigma_src))
    logit = (-2 * output['logstds'].min()).exp() * output['means'].square().sum(dim=2).max()
    assert relative_error(found, expected) < max(1e-6, 2**-24 * float(logit))


@pytest.mark.parametrize('kind', KINDS, ids=['-'.join(kind) for kind in KINDS])
@pytest.mark.parametrize('total_substeps', [8, 128])
def test_rollouts_are_not_less_accurate_than_the_plain_loop(kind, total_substeps):
    """In float32, the worst of several rollouts from noise to latents; see docs/numerics.md for figures."""
    worst = {'own': 0.0, 'loop': 0.0}
    for seed in range(8):
        case = Case((2, 3, 4, 4), 4, (1.0, 1.0), (0.0, 0.0), (1.0, 0.9), total_substeps, 3.2, False, seed)
        parts, schedule = ingredients(kind, case), case.schedule()
        narrow = {name: value.float() for name, value in parts.output.items()}
        x_src = parts.x_src.float()
        exact = euler_rollout(
            build(kind, case, {name: value.double() for name, value in narrow.items()}, x_src.double()),
            x_src.double(),
            schedule,
        )
        policy = build(kind, case, narrow, x_src)
        for name, x_end in (('own', policy.rollout(x_src, schedule)), ('loop', euler_rollout(policy, x_src, schedule))):
            worst[name] = max(worst[name], relative_error(x_end, exact))
    assert worst['own'] < max(2 * worst['loop'], 2e-7)
    assert worst['own'] < 2e-5
