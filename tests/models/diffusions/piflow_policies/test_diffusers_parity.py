"""DX policies and their sampling equal diffusers' own implementation, ``PiflowScheduler``."""

import pytest
import torch
from diffusers import PiflowScheduler
from diffusers.schedulers import scheduling_piflow as theirs

from lakonlab.models.diffusions.piflow import PiFlowImitation
from lakonlab.models.diffusions.piflow_policies import DXPolicy
from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.ops.time_shift import warp
from tests.toy_nets import ToyDX

NUM_POINTS = 5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('mode', ['grid', 'polynomial'])
@pytest.mark.parametrize('size', [(3, 2), (2, 3, 2)], ids=['4-D', '5-D'])
@pytest.mark.parametrize('shift', [1.0, 5.0])
def test_policy_and_rollout_in_double_precision(mode, size, shift):
    """Each sample with its own times and number of substeps."""
    raw_src, raw_end = (torch.tensor(times, dtype=torch.float64) for times in ([1.0, 0.6, 0.3], [0.75, 0.31, 0.0]))
    sigma_src = warp(raw_src, shift)
    output, x_src, x_t = normal(3, NUM_POINTS, 2, *size), normal(3, 2, *size, seed=1), normal(3, 2, *size, seed=2)
    settings = {'segment_size': 0.3, 'shift': shift, 'mode': mode, 'eps': 1e-6}
    ours, reference = (
        DXPolicy(output, x_src, sigma_src, **settings),
        theirs.DXPolicy(output, x_src, sigma_src, **settings),
    )
    for share in (1.0, 0.8, 0.3):
        sigma_t = warp(raw_src * share, shift)
        torch.testing.assert_close(ours.pi(x_t, sigma_t), reference.pi(x_t, sigma_t), rtol=1e-11, atol=1e-11)

    x_end = ours.rollout(x_t, rollout_schedule(raw_src, raw_end, 32, shift))
    expected, _, _ = theirs.policy_rollout_fm(x_t, sigma_src, raw_src, raw_end, 32, reference)
    torch.testing.assert_close(x_end, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ('num_steps', 'shift', 'final_step_size_scale', 'total_substeps'),
    [(4, 5.0, 0.5, 128), (1, 1.0, 1.0, 16), (3, 3.2, 0.25, 37)],
)
@pytest.mark.parametrize('size', [(4, 3), (2, 4, 3)], ids=['image', 'video'])
def test_sampling_equals_a_loop_over_their_scheduler(num_steps, shift, final_step_size_scale, total_substeps, size):
    """Same network, noise and settings; theirs computes in float32 and stops at schedule time ``eps`` instead of 0."""
    network = ToyDX(NUM_POINTS, 2, time_scale=1000).randomize(3)
    noise = normal(2, 2, *size).float()

    scheduler = PiflowScheduler(
        shift=shift,
        n_grid=NUM_POINTS,
        final_step_size_scale=final_step_size_scale,
        num_policy_substeps=total_substeps,
    )
    scheduler.set_timesteps(num_steps)
    expected = noise.movedim(1, -1)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = network(expected.movedim(-1, 1), t.expand(2))  # (B, N, C, *); theirs: (B, *, N * C)
        packed = output.movedim((1, 2), (-2, -1)).flatten(-2)
        expected = scheduler.step(packed, t, expected, return_dict=False)[0]

    model = PiFlowImitation(
        network,
        policy_type='DX',
        policy_kwargs={
            'segment_size': 1 / (num_steps - 1 + final_step_size_scale),
            'shift': shift,
        },
        flow_loss={'type': 'DiffusionMSELoss'},
        timestep_sampler={'type': 'ContinuousTimeStepSampler', 'shift': shift, 'logit_normal_enable': False},
        num_timesteps=1000,
        test_cfg={
            'nfe': num_steps,
            'final_step_size_scale': final_step_size_scale,
            'total_substeps': total_substeps,
            'eps': scheduler.config.eps,
        },
    )
    samples = model.forward_test(noise)
    torch.testing.assert_close(samples, expected.movedim(-1, 1), rtol=2e-5, atol=2e-5)
