"""A published training checkpoint, imported and resumed, gives the run that nothing interrupted, bit for bit."""

import logging
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.utils.data import Dataset

from lakonlab.config.check import check_config
from lakonlab.config.load import load_config
from lakonlab.mmengine_parts import Hook
from lakonlab.models.architecture.roles import named_state, parameter_names
from lakonlab.registry import DATASETS
from lakonlab.runner.runner import Runner
from lakonlab.storage.checkpoint import find_checkpoint, read_manifest, read_tensors
from tests import tiny_text_image

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'import_checkpoint.py'
DIGITS = ROOT / 'configs' / 'digits' / 'dit_digits_teacher.py'
STEP, TOTAL_ITERS, SEED = 3, 6, 11
SMALL = {
    'total_iters': TOTAL_ITERS,
    'data.train_dataloader.samples_per_gpu': 8,
    'custom_hooks.0.start_iter': 1,
    'lr_config.warmup_iters': 4,
}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@DATASETS.register_module()
class TinyEmbeddedPrompts(Dataset):
    """Latents with embedded prompts."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        data = tiny_text_image.batch('Flux', batch_size=1, seed=index)
        embedded = {name: tensor[0] for name, tensor in data['prompt_embed_kwargs'].items()}
        return {'ids': index, 'latents': data['latents'][0], 'prompt_embed_kwargs': embedded}


def published_dit(runner):
    """Tensors and optimiser of a run of a DiT as published: all buffers, the position table among them."""
    model = runner.model
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith('diffusion')}
    tensors.update({f'{part}.denoising.pos_embed.pos_embed': torch.ones(1, 4, 8) for part in model._modules})
    state = get_optimizer_state_dict(model.diffusion, runner.optimizers['diffusion'], options=FULL)
    return tensors, state


def published_flux_student():
    """A student as published: the transformer of diffusers with peft's own adapter and layers of its own."""
    tiny = tiny_text_image
    network = FluxTransformer2DModel(**{**tiny.SIZES['Flux'], 'patch_size': 1})
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=tiny.LORA_TARGETS['Flux']))
    width, components, pixels = network.inner_dim, tiny.HEADS['GM']['num_gaussians'], 4
    network.proj_out_means = nn.Linear(width, components * network.config.in_channels)
    network.proj_out_logweights = nn.Linear(width, components * pixels)
    inner = tiny.HEADS['GM']['logstd_inner_dim']
    network.proj_out_logstds = nn.Sequential(nn.SiLU(), nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, 1))
    del network.proj_out
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(key in name for key in tiny.TRAINED['GM']))
    part = nn.Module()
    part.denoising = network
    return part


@torch.no_grad()
def published_flux(runner, relative_to_model):
    """Tensors and optimiser of a run of a FLUX student as published, by the names that diffusers and peft give them."""
    whole = nn.Module()
    whole.diffusion, whole.diffusion_ema = published_flux_student(), published_flux_student()
    values = dict(named_state(runner.model))
    trained = {name: parameter for name, parameter in whole.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        parameter.copy_(values[name])
    students = {name: parameter for name, parameter in trained.items() if name.startswith('diffusion.')}
    optimizer = torch.optim.AdamW(students.values())
    names = parameter_names(runner.model)
    for parameter, slots in runner.optimizers['diffusion'].state.items():
        optimizer.state[students[names[parameter]]] = slots
    state = get_optimizer_state_dict(whole if relative_to_model else whole.diffusion, optimizer, options=FULL)
    return trained, state


class SavePublished(Hook):
    """Saves as published after ``STEP`` iterations, and changes nothing."""

    priority = 'LOWEST'

    def __init__(self, path, state_of):
        self.path, self.state_of = path, state_of

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == STEP:
            tensors, state = self.state_of(runner)
            meta = {'iter': STEP, 'epoch': 1, 'seed': runner.seed, 'exp_name': 'tiny', 'config': 'a = 1', 'time': 'now'}
            meta['hook_msgs'] = {'last_ckpt': 'iter_2.pth'}
            values = {name: tensor.detach() for name, tensor in tensors.items()}
            torch.save({'meta': meta, 'state_dict': values, 'optimizer': {'diffusion': state}}, self.path)


def make_runner(path, options, name, resume_from=None):
    cfg = load_config(path, options)
    check_config(cfg)
    cfg.seed = SEED
    return Runner.from_cfg(cfg, work_dir=f'work_dirs/{name}', resume_from=resume_from, validate=False)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name='__main__')
    return end.value.code


def everything(runner):
    """All tensors of the model, and all that its optimiser remembers, by name, copied."""
    names = parameter_names(runner.model)
    tensors = dict(named_state(runner.model))
    for parameter, slots in runner.optimizers['diffusion'].state.items():
        tensors.update({f'{slot} of {names[parameter]}': value for slot, value in slots.items()})
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def uninterrupted(path, options, state_of, file):
    runner = make_runner(path, options, 'uninterrupted')
    runner.hooks.append(SavePublished(file, state_of))
    runner.train()
    return everything(runner)


def assert_resumes_as(expected, path, options, checkpoint):
    runner = make_runner(path, options, 'resumed', str(checkpoint))
    started = everything(make_runner(path, options, 'fresh'))
    runner.train()
    assert runner.first_iter == STEP
    resumed = everything(runner)
    assert resumed.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, resumed[name])]
    assert not different
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in started.items())


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """An uninterrupted run of a DiT, and what it saved as published."""
    folder = tmp_path_factory.mktemp('digits')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return uninterrupted(DIGITS, SMALL, published_dit, folder / 'iter_3.pth'), folder / 'iter_3.pth'


def command_line(options):
    return ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]


def test_dit_goes_on(digits, in_tmp, monkeypatch, caplog):
    expected, file = digits
    caplog.set_level(logging.INFO, 'lakonlab')
    assert run_tool(monkeypatch, file, 'imported', '--config', DIGITS, *command_line(SMALL)) == 0
    assert f'--resume-from imported/iter_3 --seed {SEED}' in caplog.text
    checkpoint = find_checkpoint('imported/iter_3')
    assert not [name for name in read_tensors(checkpoint, 'model') if 'pos_embed.pos_embed' in name]
    caplog.clear()
    assert_resumes_as(expected, DIGITS, SMALL, checkpoint)
    assert 'config changed' not in caplog.text


def test_dit_without_config(digits, in_tmp, monkeypatch, caplog):
    _, file = digits
    assert run_tool(monkeypatch, file, 'imported') == 0
    assert 'nothing is compared' in caplog.text
    checkpoint = find_checkpoint('imported/iter_3')
    assert read_tensors(checkpoint, 'model').keys() == torch.load(file)['state_dict'].keys()
    assert read_manifest(checkpoint)['config'] == 'a = 1'


def test_weights_alone(digits, in_tmp, monkeypatch, caplog):
    _, file = digits
    arguments = (file, 'imported', '--config', DIGITS, '--no-optimizer', *command_line(SMALL))
    assert run_tool(monkeypatch, *arguments) == 0
    assert 'start anew' in caplog.text
    assert read_tensors(find_checkpoint('imported/iter_3'), 'optimizer') == {}


def test_import_replaces_nothing(digits, in_tmp, monkeypatch, capsys):
    _, file = digits
    assert run_tool(monkeypatch, file, 'imported', '--no-optimizer') == 0
    assert run_tool(monkeypatch, file, 'imported', '--no-optimizer') == 1
    assert 'exists already' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'model.diffusion_use_ema': False}, 'diffusion_ema.denoising'),
        ({'model.diffusion.denoising.num_layers': 2}, 'transformer_blocks.2'),
        ({'optimizer.diffusion.type': 'RMSprop', 'optimizer.diffusion._delete_': True}, 'square_avg'),
    ],
)
def test_config_of_another_model(digits, in_tmp, monkeypatch, capsys, options, message):
    _, file = digits
    options = {**SMALL, **options}
    if options.pop('optimizer.diffusion._delete_', False):
        options['optimizer.diffusion'] = "{'type': 'RMSprop', 'lr': 0.1}"
        options.pop('optimizer.diffusion.type')
    assert run_tool(monkeypatch, file, 'imported', '--config', DIGITS, *command_line(options)) == 1
    assert message in capsys.readouterr().err
    assert not (in_tmp / 'imported').exists()


@pytest.mark.parametrize('relative_to_model', [True, False])
def test_flux_lora_goes_on(in_tmp, monkeypatch, relative_to_model):
    model = tiny_text_image.config('Flux', 'GM', tiny_text_image.teacher_file('Flux', in_tmp))
    content = dict(
        model=model,
        optimizer={'diffusion': dict(type='AdamW', lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)},
        data=dict(train=dict(type='TinyEmbeddedPrompts'), train_dataloader=dict(samples_per_gpu=2)),
        total_iters=TOTAL_ITERS,
        checkpoint_config=dict(interval=TOTAL_ITERS, out_dir='checkpoints'),
        custom_hooks=[dict(type='ExponentialMovingAverageHook', momentum_policy='karras', start_iter=1)],
        **tiny_text_image.SECTIONS,
    )
    path = in_tmp / 'tiny.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in content.items()))
    file = in_tmp / 'iter_3.pth'
    expected = uninterrupted(path, {}, lambda runner: published_flux(runner, relative_to_model), file)
    assert run_tool(monkeypatch, file, 'imported', '--config', path) == 0
    assert_resumes_as(expected, path, {}, 'imported/iter_3')


def test_help_is_instant():
    code = f"import runpy, sys; sys.argv = ['a', '--help']; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    watched = "import atexit, sys; atexit.register(lambda: print('heavy:', 'torch' in sys.modules)); "
    done = subprocess.run([sys.executable, '-c', watched + code], capture_output=True, text=True, check=True)
    assert '--no-optimizer' in done.stdout
    assert 'heavy: False' in done.stdout
