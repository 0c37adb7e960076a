"""What of a published checkpoint becomes the state of a run, and what is refused."""

import logging
from argparse import Namespace

import pytest
import torch
from torch import nn

from lakonlab.parallel.state import training_state
from lakonlab.runner.import_published import (
    fit_model,
    fit_optimizers,
    import_checkpoint,
    independent,
    split_optimizers,
)
from lakonlab.runner.optimizer import build_optimizers
from lakonlab.storage import files
from lakonlab.storage.checkpoint import CheckpointError, load_model_state
from tests.runner.tiny import TinyModel

ADAM = {'diffusion': {'type': 'AdamW', 'lr': 1e-2}}
WEIGHT, BIAS = 'diffusion.linear.weight', 'diffusion.linear.bias'


def make_model():
    torch.manual_seed(0)
    return TinyModel()


def on_meta(change=lambda model: None):
    with torch.device('meta'):
        model = TinyModel()
    change(model)
    return model


def fit(saved, model=None, trainable_only=True):
    return fit_model(saved, model or on_meta(), trainable_only, 'a.pth')


def tensors_of(model):
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_training_state_comes_out():
    """A published file also holds what is frozen: here the whole teacher."""
    model = make_model()
    model.diffusion.steps += 7
    fitted = fit(tensors_of(model))
    wanted = training_state(model)
    assert fitted.keys() == wanted.keys()
    assert all(torch.equal(fitted[name], tensor) for name, tensor in wanted.items())


def test_rounded_tensors_get_the_dtype_of_the_model(caplog):
    caplog.set_level(logging.INFO, 'lakonlab')
    saved = tensors_of(make_model())
    exact = saved[WEIGHT]
    saved[WEIGHT], saved[BIAS] = exact.half(), saved[BIAS].half()
    fitted = fit(saved)
    assert fitted[WEIGHT].dtype == torch.float32
    assert torch.equal(fitted[WEIGHT], exact.half().float())
    assert '2 tensors are torch.float16, cast to torch.float32' in caplog.text
    assert '3 of teacher' in caplog.text


def test_overflow_of_rounding_is_an_error():
    saved = tensors_of(make_model())
    saved[WEIGHT] = (saved[WEIGHT] * 1e6).half()
    with pytest.raises(CheckpointError, match=rf'1 not finite.*: {WEIGHT}\.'):
        fit(saved)


def test_buffers_that_are_computed_are_left_out():
    def change(model):
        model.diffusion.register_buffer('table', torch.zeros(3, device='meta'), persistent=False)
        model.diffusion_ema.ignored_keys = ('grid.*',)

    saved = {**tensors_of(make_model()), 'diffusion.table': torch.ones(3), 'diffusion_ema.grid.x': torch.ones(3)}
    assert fit(saved, on_meta(change)).keys() == training_state(make_model()).keys()
    with pytest.raises(CheckpointError, match=r'2 not of this model: diffusion\.table, diffusion_ema\.grid\.x'):
        fit(saved)


def test_frozen_parameters_of_what_is_trained():
    def change(model):
        model.diffusion.linear.bias.requires_grad_(False)

    saved = tensors_of(make_model())
    with pytest.raises(CheckpointError, match=rf'2 frozen.*ckpt_trainable_only=False.*: {BIAS}, '):
        fit(saved, on_meta(change))
    assert BIAS in fit(saved, on_meta(change), trainable_only=False)


def share_linear(model):
    model.diffusion_ema.linear = model.diffusion.linear


def test_one_tensor_of_several_names():
    saved = tensors_of(make_model())
    fitted = fit(saved, on_meta(share_linear))
    assert WEIGHT in fitted
    assert 'diffusion_ema.linear.weight' not in fitted
    only_average = {name: tensor for name, tensor in saved.items() if name != WEIGHT}
    assert torch.equal(fit(only_average, on_meta(share_linear))[WEIGHT], saved[WEIGHT])
    saved['diffusion_ema.linear.weight'] = saved[WEIGHT] + 1
    with pytest.raises(CheckpointError, match=rf'1 one tensor in this model.*diffusion_ema.linear.weight and {WEIGHT}'):
        fit(saved, on_meta(share_linear))


def without(saved):
    del saved[WEIGHT]


def with_stranger(saved):
    saved['diffusion.linear.scale'] = torch.ones(1)


def with_unknown_child(saved):
    saved['vae.scale'] = torch.ones(1)


def of_another_shape(saved):
    saved[WEIGHT] = saved[WEIGHT][:2]


def of_another_kind(saved):
    saved[WEIGHT] = saved[WEIGHT].long()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (without, f'1 missing: {WEIGHT}'),
        (with_stranger, '1 not of this model: diffusion.linear.scale'),
        (with_unknown_child, '1 not of this model: vae.scale'),
        (of_another_shape, rf'1 of another shape: {WEIGHT} \(2, 4\) in the file, \(4, 4\) in the model'),
        (of_another_kind, f'1 of another kind: {WEIGHT} torch.int64 in the file, torch.float32 in the model'),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    saved = tensors_of(make_model())
    change(saved)
    with pytest.raises(CheckpointError, match=f'a.pth does not fit: {message}. Use the config'):
        fit(saved)


def trained(config=ADAM):
    """What an optimiser remembers after two steps, as published files name it."""
    model = make_model()
    optimizers = build_optimizers(model, config)
    for _ in range(2):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
            model.diffusion(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
    (optimizer,) = optimizers.values()
    names = {parameter: f'diffusion.{name}' for name, parameter in model.diffusion.named_parameters()}
    present = {
        names[p]: {slot: value for slot, value in slots.items() if value is not None}
        for p, slots in optimizer.state.items()
    }
    return {'diffusion': present}


def fit_slots(saved, config=ADAM, model=None):
    return fit_optimizers(saved, model or on_meta(), config, 'a.pth')


@pytest.mark.parametrize(
    'options', [{}, {'type': 'SGD', 'momentum': 0.9}, {'type': 'Adafactor'}, {'amsgrad': True}, {'type': 'SGD'}]
)
def test_optimizer_state_comes_out_as_checkpoints_hold_it(options):
    config = {'diffusion': {**ADAM['diffusion'], **options}}
    saved = trained(config)
    tensors, plain = split_optimizers(fit_slots(saved, config))
    expected = {
        f'diffusion/{slot}/{name}': value for name, slots in saved['diffusion'].items() for slot, value in slots.items()
    }
    assert bool(expected) == (options != {'type': 'SGD'})
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert plain == {'diffusion': {}}


def test_rounded_moments(caplog):
    caplog.set_level(logging.INFO, 'lakonlab')
    saved = trained()
    slots = saved['diffusion'][WEIGHT]
    exact = slots['exp_avg']
    slots['exp_avg'] = exact.bfloat16()
    fitted = fit_slots(saved)['diffusion'][WEIGHT]
    assert fitted['exp_avg'].dtype == torch.float32
    assert torch.equal(fitted['exp_avg'], exact.bfloat16().float())
    assert "optimizer['diffusion']: 1 tensors are torch.bfloat16, cast to torch.float32" in caplog.text


def test_eight_bit_state_keeps_its_kind():
    """Its quantisation is in float32, whatever the file rounded it to; its values are integers."""
    state = {'step': 4, 'state1': torch.arange(16, dtype=torch.uint8), 'absmax1': torch.rand(2).bfloat16()}
    config = {'diffusion': {'type': 'AdamW8bit', 'lr': 1e-2}}
    tensors, plain = split_optimizers(fit_slots({'diffusion': {WEIGHT: state}}, config))
    assert torch.equal(tensors[f'diffusion/state1/{WEIGHT}'], state['state1'])
    assert tensors[f'diffusion/absmax1/{WEIGHT}'].dtype == torch.float32
    assert plain == {'diffusion': {'step': {WEIGHT: 4}}}
    with pytest.raises(CheckpointError, match=r'not those of AdamW: .* has absmax1, state1, step, expected exp_avg'):
        fit_slots({'diffusion': {WEIGHT: state}})


def test_parameters_without_state_are_said(caplog):
    saved = trained()
    del saved['diffusion'][BIAS]
    assert list(fit_slots(saved)['diffusion']) == [WEIGHT]
    assert f'remembers nothing of 1 parameters: {BIAS}' in caplog.text


def test_optimizer_of_another_model():
    saved = trained()
    with pytest.raises(CheckpointError, match='1 optimizers; the config has diffusion: teacher'):
        fit_slots({'teacher': saved['diffusion']})
    stranger = {'diffusion': {**saved['diffusion'], 'teacher.linear.weight': {}}}
    with pytest.raises(CheckpointError, match=r'1 of parameters that it does not train: teacher\.linear\.weight'):
        fit_slots(stranger)
    saved['diffusion'][WEIGHT]['exp_avg'] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r'1 of another shape: exp_avg of .* \(2,\), expected \(4, 4\)'):
        fit_slots(saved)


def test_planning_the_optimizer_leaves_no_gradients():
    saved = trained()
    model = on_meta()
    fit_slots(saved, model=model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_independent_tensors():
    base = nn.Parameter(torch.arange(6.0).view(2, 3)).detach()
    tensors = independent({'a': base, 'b': base, 'c': base.t(), 'd': torch.zeros(0), 'e': torch.zeros(0)})
    base += 1
    assert torch.equal(tensors['b'], base - 1)
    assert torch.equal(tensors['c'], (base - 1).t())
    assert len({tensors[name].data_ptr() for name in 'abc'}) == 3
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_from_a_server_to_a_server(bucket, tmp_path):
    saved = tensors_of(make_model())
    torch.save({'meta': {'iter': 3}, 'state_dict': saved}, tmp_path / 'iter_3.pth')
    files.upload(tmp_path / 'iter_3.pth', f'{bucket}/published/iter_3.pth')
    args = Namespace(
        checkpoint=f'{bucket}/published/iter_3.pth',
        out=f'{bucket}/ours',
        config=None,
        cfg_options=None,
        no_optimizer=True,
    )
    assert import_checkpoint(args) == 0
    found = load_model_state(f'{bucket}/ours/latest')
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    with pytest.raises(CheckpointError, match=r'ours/iter_3 exists already'):
        import_checkpoint(args)
    assert not files.exists(f'{bucket}/ours/.lock')
