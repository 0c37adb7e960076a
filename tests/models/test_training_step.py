"""The training step: accumulation, clipping, and nothing that is not finite ever reaches the weights."""

import math

import pytest
import torch

from lakonlab.models.training_step import micro_batches, training_step


def quadratic(dtype=torch.float64):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).to(dtype)

    def minibatch(data, source, factor, around):
        loss = (model(data['x']).squeeze(1) - data['y']).square().mean()
        (loss * factor).backward()
        return {'loss': loss.detach()}

    data = {'x': torch.randn(8, 3, dtype=dtype), 'y': torch.randn(8, dtype=dtype)}
    return model, minibatch, data


def step(model, minibatch, data, iteration=0, **train_cfg):
    optimizers = {'diffusion': torch.optim.SGD(model.parameters(), lr=0.1)}
    return training_step(data, optimizers, minibatch, train_cfg, iteration)


@pytest.mark.parametrize('size', [1, 2, 4, 8, 100])
def test_micro_batches_give_the_gradient_of_the_batch(size):
    results = []
    for accumulation in (None, size):
        model, minibatch, data = quadratic()
        outputs = step(model, minibatch, data, grad_accum_batch_size=accumulation)
        results.append((model.weight.detach().clone(), outputs['log_vars']))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    assert results[0][1]['loss'] == pytest.approx(results[1][1]['loss'])


def test_indivisible_batches_are_refused():
    with pytest.raises(ValueError, match=r'train_cfg.grad_accum_batch_size=3'):
        micro_batches(8, 3)


def test_clipping_scales_the_gradient_to_the_norm_and_logs_it_before():
    model, minibatch, data = quadratic()
    before = model.weight.detach().clone(), model.bias.detach().clone()
    outputs = step(model, minibatch, data, diffusion_grad_clip=1e-3)
    moved = torch.cat([(model.weight - before[0]).flatten(), model.bias - before[1]]).norm() / 0.1
    assert float(moved) == pytest.approx(1e-3, rel=1e-2)
    assert outputs['log_vars']['diffusion_grad_norm'] > 1e-3


def test_clipping_begins_when_it_is_told_to():
    moved = []
    for iteration in (0, 5):
        model, minibatch, data = quadratic()
        before = model.weight.detach().clone()
        step(model, minibatch, data, iteration, diffusion_grad_clip=1e-3, diffusion_grad_clip_begin_iter=5)
        moved.append(float((model.weight - before).norm()))
    assert moved[0] > 10 * moved[1]


def test_outliers_are_skipped():
    model, minibatch, data = quadratic()
    before = model.weight.detach().clone()
    outputs = step(model, minibatch, data, diffusion_grad_clip=1e-3, diffusion_grad_clip_skip_ratio=2.0)
    assert outputs['skipped'] == ('diffusion',)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize('where', ['loss', 'gradient'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_also_without_clipping(where, value):
    model, minibatch, data = quadratic()

    def poisoned(part, source, factor, around):
        logs = minibatch(part, source, factor, around)
        if where == 'loss':
            return {'loss': torch.tensor(value)}
        model.weight.grad[0, 0] = value
        return logs

    before = model.weight.detach().clone()
    outputs = step(model, poisoned, data)
    assert outputs['skipped'] == ('diffusion',)
    assert math.isnan(outputs['log_vars']['diffusion_grad_norm'])
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
