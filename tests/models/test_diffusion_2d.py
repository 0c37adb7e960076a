import pytest
import torch

from lakonlab.ops.random_source import RecordedSource, SeededSource
from lakonlab.registry import MODELS


class Straight(torch.nn.Module):
    """The exact velocity when all data is one point: every state flows to it along a line."""

    def __init__(self, point):
        super().__init__()
        self.point = torch.nn.Parameter(torch.tensor(point)[:, None, None])

    def forward(self, hidden_states, timestep):
        return (hidden_states - self.point) / timestep[:, None, None, None]


class Still(torch.nn.Module):
    """Leaves every state where it is."""

    dtype = torch.float32

    def forward(self, hidden_states, timestep):
        return torch.zeros_like(hidden_states)


@pytest.fixture
def model():
    diffusion = dict(
        type='GaussianFlow',
        denoising=Straight([1.5, -2.0]),
        flow_loss=dict(type='DiffusionMSELoss', data_info=dict(pred='u_t_pred', target='u_t')),
        num_timesteps=1,
    )
    cfg = dict(test_cfg=dict(num_timesteps=4), train_cfg={})
    return MODELS.build(dict(type='Diffusion2D', diffusion=diffusion, diffusion_use_ema=True, **cfg))


def test_samples_flow_to_the_data(model):
    outputs = model.val_step({'x': torch.zeros(5, 2), 'ids': list(range(5))}, source=SeededSource(1))
    assert outputs['num_samples'] == 5
    assert outputs['nfe'] == 4
    assert outputs['pred_x'].shape == (5, 2)
    assert torch.allclose(outputs['pred_x'], torch.tensor([1.5, -2.0]).expand(5, 2), atol=1e-5)


def test_noise_is_taken_from_the_batch_or_drawn(model):
    noise = torch.randn(3, 2)
    model.diffusion_ema.denoising = Still()
    given = model.val_step({'noise': noise})
    drawn = model.val_step({'x': torch.zeros(3, 2)}, source=RecordedSource({'noise': [noise]}))
    for outputs in (given, drawn):
        assert torch.equal(outputs['pred_x'], noise)


def test_roles_and_training(model):
    with torch.no_grad():
        model.diffusion.denoising.point += 1
    optimizer = {'diffusion': torch.optim.SGD(model.diffusion.parameters(), lr=0.0)}
    data = {'x': torch.tensor([[1.5, -2.0]]).repeat(64, 1), 'ids': list(range(64))}
    sample = {role: model.val_step(data, role=role)['pred_x'][0] for role in ('student', 'ema')}
    assert torch.allclose(sample['student'], sample['ema'] + 1, atol=1e-5)
    draws = {'raw_t': [torch.full((64,), 0.5)], 'noise': [torch.randn(64, 2)]}
    outputs = model.train_step(data, optimizer, running_status={'iteration': 0}, source=RecordedSource(draws))
    # raw_t is 1 - 0.5; the velocity is off by 1 / 0.5 in both coordinates, and the loss is half the mean square
    assert outputs['log_vars']['loss_diffusion'] == pytest.approx(0.5 * 2**2)
    assert outputs['num_samples'] == 64


def test_wrong_batches_are_refused(model):
    with pytest.raises(ValueError, match=r'neither noise nor x.*labels'):
        model.val_step({'labels': torch.zeros(3)})
    with pytest.raises(ValueError, match=r'noise has shape \(3, 4\): expected \(B, 2\)'):
        model.val_step({'noise': torch.zeros(3, 4)})
    with pytest.raises(ValueError, match='role'):
        model.val_step({'x': torch.zeros(3, 2)}, role='teacher')
