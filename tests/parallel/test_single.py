"""State of a model and its optimisers in one process."""

import pytest
import torch
from torch import nn

from lakonlab.parallel.single import SingleProcess
from lakonlab.parallel.state import training_state
from lakonlab.storage.checkpoint import CheckpointError, write_checkpoint


def make_model(bias=True):
    torch.manual_seed(0)
    model = nn.Module()
    for name in ('diffusion', 'diffusion_ema', 'teacher'):
        child = nn.Sequential(nn.Linear(3, 3, bias=bias), nn.BatchNorm1d(3), nn.Linear(3, 1))
        child.register_buffer('scratch', torch.zeros(2), persistent=False)
        setattr(model, name, child)
    model.teacher.requires_grad_(False)
    model.diffusion_ema.requires_grad_(False)
    model.diffusion[0].requires_grad_(False)
    return model


def step(model, optimizers, times=3):
    for _ in range(times):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
            model.diffusion(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()


def optimizers_of(model, kind=torch.optim.AdamW, **options):
    parameters = [parameter for parameter in model.diffusion.parameters() if parameter.requires_grad]
    return {'diffusion': kind(parameters, lr=1e-2, **options)}


def test_what_is_saved():
    trainable = {name.removeprefix('diffusion.') for name in training_state(make_model()) if 'ema' not in name}
    buffers = {'1.running_mean', '1.running_var', '1.num_batches_tracked'}
    assert trainable == {'1.weight', '1.bias', '2.weight', '2.bias'} | buffers
    names = set(training_state(make_model()))
    assert {name for name in names if name.startswith('diffusion_ema.')} == {f'diffusion_ema.{n}' for n in trainable}
    assert not [name for name in names if name.startswith('teacher')]


def test_frozen_parameters_on_request():
    assert 'diffusion.0.weight' in training_state(make_model(), trainable_only=False)
    assert 'teacher.0.weight' not in training_state(make_model(), trainable_only=False)


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {'amsgrad': True}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {'momentum': 0.9}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_round_trip(tmp_path, kind, options):
    strategy = SingleProcess(device='cpu')
    model = make_model()
    optimizers = optimizers_of(model, kind, **options)
    step(model, optimizers)
    tensors, plain = strategy.optimizer_state(model, optimizers)
    saved = {
        'model': strategy.model_state(model),
        'optimizer': tensors,
    }
    path = write_checkpoint(tmp_path, 3, saved, {'optimizers': plain})
    torch.manual_seed(5)
    step(model, optimizers)

    other = make_model()
    others = optimizers_of(other, kind, **options)
    strategy.load_model_state(other, path)
    strategy.load_optimizer_state(other, others, path, plain)
    torch.manual_seed(5)
    step(other, others)
    for (name, tensor), value in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(tensor, value), name


def test_state_is_found_by_name_not_by_position(tmp_path):
    strategy = SingleProcess(device='cpu')
    model = make_model()
    optimizers = optimizers_of(model)
    step(model, optimizers)
    tensors, plain = strategy.optimizer_state(model, optimizers)
    path = write_checkpoint(tmp_path, 3, {'optimizer': tensors}, {})
    parameters = [parameter for parameter in model.diffusion.parameters() if parameter.requires_grad]
    reordered = {'diffusion': torch.optim.AdamW(parameters[::-1], lr=1e-2)}
    strategy.load_optimizer_state(model, reordered, path, plain)
    for parameter in parameters:
        expected = optimizers['diffusion'].state[parameter]['exp_avg']
        assert torch.equal(reordered['diffusion'].state[parameter]['exp_avg'], expected)


def test_state_of_a_parameter_that_is_not_trained(tmp_path):
    strategy = SingleProcess(device='cpu')
    model = make_model()
    optimizers = optimizers_of(model)
    step(model, optimizers)
    tensors, plain = strategy.optimizer_state(model, optimizers)
    path = write_checkpoint(tmp_path, 3, {'optimizer': tensors}, {})
    fewer = {'diffusion': torch.optim.AdamW([model.diffusion[2].weight], lr=1e-2)}
    with pytest.raises(CheckpointError, match=r'3 parameters .* does not train: diffusion\.1\.bias'):
        strategy.load_optimizer_state(model, fewer, path, plain)
    with pytest.raises(CheckpointError, match="optimizer 'diffusion', the config has"):
        strategy.load_optimizer_state(model, {'teacher': fewer['diffusion']}, path, plain)


def test_batches_reach_the_device():
    batch = {'latents': torch.ones(2), 'ids': [1, 2], 'nested': {'mask': [torch.ones(1)]}, 'name': ['a', 'b']}
    moved = SingleProcess(device='meta').to_device(batch)
    assert moved['latents'].is_meta
    assert moved['nested']['mask'][0].is_meta
    assert moved['name'] == ['a', 'b']
