"""Optimisers from config."""

import sys

import pytest
import torch
from torch import nn

from lakonlab.runner.optimizer import build_optimizers


def make_model():
    model = nn.Module()
    model.diffusion = nn.Module()
    model.diffusion.norm = nn.LayerNorm(3)
    model.diffusion.head = nn.Linear(3, 2)
    model.diffusion.frozen = nn.Linear(3, 2).requires_grad_(False)
    model.teacher = nn.Linear(3, 2).requires_grad_(False)
    return model


def build(model=None, key='diffusion', **options):
    return build_optimizers(model or make_model(), {key: {'type': 'AdamW', 'lr': 1e-3, **options}})[key]


def test_trains_what_requires_a_gradient():
    model = make_model()
    optimizer = build(model, betas=(0.9, 0.95), weight_decay=0.05)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    expected = [*model.diffusion.norm.parameters(), *model.diffusion.head.parameters()]
    assert {id(parameter) for parameter in group['params']} == {id(parameter) for parameter in expected}
    assert (group['betas'], group['weight_decay'], group['initial_lr']) == ((0.9, 0.95), 0.05, 1e-3)


def test_custom_keys():
    model = make_model()
    custom_keys = {'bias': {'decay_mult': 0.0}, 'head': {'lr_mult': 0.5}, 'head.bias': {'lr_mult': 0.1}}
    optimizer = build(model, weight_decay=0.05, paramwise_cfg={'custom_keys': custom_keys})
    found = {
        id(parameter): (group['lr'], group['weight_decay'], group['initial_lr'])
        for group in optimizer.param_groups
        for parameter in group['params']
    }
    assert found[id(model.diffusion.norm.weight)] == (1e-3, 0.05, 1e-3)
    assert found[id(model.diffusion.norm.bias)] == (1e-3, 0.0, 1e-3)
    assert found[id(model.diffusion.head.weight)] == (5e-4, 0.05, 5e-4)
    assert found[id(model.diffusion.head.bias)] == pytest.approx((1e-4, 0.05, 1e-4))  # the longest pattern counts


def test_default_weight_decay_is_multiplied_too():
    optimizer = build(paramwise_cfg={'custom_keys': {'bias': {'decay_mult': 0.5}}})
    assert sorted(group['weight_decay'] for group in optimizer.param_groups) == [0.005, 0.01]


def test_fused_where_torch_can():
    assert build().param_groups[0]['fused'] is True
    assert build(fused=False).param_groups[0]['fused'] is False
    assert not build(foreach=True).param_groups[0]['fused']
    assert not build(make_model().to('meta')).param_groups[0]['fused']
    assert 'fused' not in build(type='RAdam').param_groups[0]
    assert not build(differentiable=True).param_groups[0]['fused']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'key': 'difusion'}, r"no submodule 'difusion'; it has diffusion, teacher"),
        ({'key': 'teacher'}, 'no parameter .* requires a gradient'),
        ({'type': 'AdamX'}, r"^optimizer\['diffusion'\]\.type: 'AdamX' is unknown; torch.optim has .*AdamW"),
        ({'type': 'LBFGS'}, r"^optimizer\['diffusion'\]\.type: 'LBFGS' computes the loss several times"),
        ({'lr': -1.0}, r"^optimizer\['diffusion'\]: .*-1\.0"),
        ({'differentiable': True, 'fused': True}, r"^optimizer\['diffusion'\]: .*differentiable"),
        ({'learning_rate': 1}, 'learning_rate'),
        ({'paramwise_cfg': {'bias_mult': 1}}, 'bias_mult'),
        ({'paramwise_cfg': {'custom_keys': {'bias': {'wd_mult': 1}}}}, "'wd_mult'"),
    ],
)
def test_wrong_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    monkeypatch.setitem(sys.modules, 'bitsandbytes.optim', None)
    expected = r"^optimizer\['diffusion'\]\.type: 'AdamW8bit' needs bitsandbytes: pip install bitsandbytes\. .*'AdamW'"
    with pytest.raises(ImportError, match=expected):
        build(type='AdamW8bit')


def test_eight_bits():
    pytest.importorskip('bitsandbytes', reason='needs bitsandbytes: pip install bitsandbytes')
    model = make_model()
    model.diffusion.head = nn.Linear(256, 64)
    optimizer = build(model, type='AdamW8bit', paramwise_cfg={'custom_keys': {'bias': {'decay_mult': 0.0}}})
    assert sorted(group['weight_decay'] for group in optimizer.param_groups) == [0.0, 0.01]
    for parameter in model.diffusion.head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[model.diffusion.head.weight]['state1'].dtype == torch.uint8
    assert optimizer.state[model.diffusion.head.bias]['state1'].dtype == torch.float32  # too small to be worth it


def test_another_meaning_of_names():
    """A strategy says what a name means where parameters are divided."""
    asked = []

    def classes(name):
        asked.append(name)
        return torch.optim.SGD

    optimizers = build_optimizers(make_model(), {'diffusion': {'type': 'AdamW8bit', 'lr': 1e-3}}, classes)
    assert isinstance(optimizers['diffusion'], torch.optim.SGD)
    assert asked == ['AdamW8bit']
