"""Moving averages against recorded vectors of the published numerics."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lakonlab.runner.hooks.ema import ExponentialMovingAverageHook
from tests.golden import assert_close, load, names


class Layer(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)
        self.register_buffer('buf', torch.zeros(2, dtype=torch.float64))


def make_model(case):
    model = nn.Module()
    weight, bias = case['in']['ema_init'], case['in']['ema_bias']
    model.diffusion = Layer(torch.zeros_like(weight), bias + 1)
    model.diffusion_ema = Layer(weight, bias)
    return model


@pytest.mark.parametrize('name', names('ema'))
def test_recorded(name):
    case = load('ema')[name]
    params = case['params']
    momentum_cfg = params.get('momentum_cfg')
    if params['momentum_policy'] == 'fixed':
        momentum_cfg = {'momentum': params['fixed_momentum']}
    hook = ExponentialMovingAverageHook(
        module_keys=('diffusion_ema',),
        interp_mode='lerp',
        interval=params['interval'],
        start_iter=params['start_iter'],
        trainable_only=params['trainable_only'],
        momentum_policy=params['momentum_policy'],
        momentum_cfg=momentum_cfg,
    )
    model = make_model(case)
    runner = SimpleNamespace(model=model, iter=0)
    hook.before_train(runner)
    for iteration, weight in enumerate(case['in']['weights']):
        runner.iter = iteration
        model.diffusion.weight.data.copy_(weight)
        model.diffusion.buf.fill_(iteration)
        hook.after_train_iter(runner, iteration)
        assert_close(model.diffusion_ema.weight.detach(), case['out']['ema'][iteration], 1e-12)
        assert torch.equal(model.diffusion_ema.buf, case['out']['buf'][iteration])
        assert torch.equal(model.diffusion_ema.bias, case['in']['ema_bias'])


def test_copies_exactly_before_start():
    case = load('ema')['karras']
    model = make_model(case)
    hook = ExponentialMovingAverageHook(start_iter=3, momentum_policy='karras')
    runner = SimpleNamespace(model=model, iter=2)
    hook.before_train(runner)
    model.diffusion.weight.data.normal_()
    hook.after_train_iter(runner, 2)
    assert torch.equal(model.diffusion_ema.weight, model.diffusion.weight)


def test_average_may_have_higher_precision():
    model = make_model(load('ema')['karras'])
    model.diffusion.to(torch.bfloat16)
    hook = ExponentialMovingAverageHook(momentum_cfg={'momentum': 0.5}, trainable_only=False)
    runner = SimpleNamespace(model=model, iter=0)
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    assert model.diffusion_ema.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'module_keys': ('diffusion',)}, "must end in '_ema'"),
        ({'interp_mode': 'slerp'}, "'slerp' is unknown"),
        ({'momentum_policy': 'karas'}, 'karras'),
        ({'interval': 0}, 'at least 1'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExponentialMovingAverageHook(**arguments)


def test_wrong_policy_argument():
    with pytest.raises(TypeError, match='gama'):
        ExponentialMovingAverageHook(momentum_policy='karras', momentum_cfg={'gama': 7})


def test_model_without_average():
    with pytest.raises(ValueError, match='diffusion_use_ema'):
        ExponentialMovingAverageHook().before_train(SimpleNamespace(model=nn.Module(), iter=0))
