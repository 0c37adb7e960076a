"""The tools around exports, as they are called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lakonlab.config.load import load_config
from lakonlab.models.architecture.roles import named_state
from lakonlab.registry import MODULES
from lakonlab.storage.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs' / 'digits' / 'gmdit_k8_digits_piid_2step.py'


def run(name, *arguments, cwd, code=0):
    command = [sys.executable, str(ROOT / 'tools' / f'{name}.py'), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def checkpoint(tmp_path):
    """One of a student that nobody has trained."""
    denoising = dict(load_config(CONFIG).model.diffusion.denoising)
    denoising.pop('pretrained', None)
    state = dict(named_state(MODULES.build(denoising)))
    tensors = {f'diffusion.denoising.{name}': tensor.detach() for name, tensor in state.items()}
    return write_checkpoint(tmp_path / 'checkpoints' / 'gmdit_k8_digits_piid_2step', 7, {'model': tensors}, {})


@pytest.mark.slow
def test_export(checkpoint, tmp_path):
    arguments = (CONFIG, '--ckpt', checkpoint, '--out-dir', tmp_path / 'out')
    assert 'the student itself is exported with --non-ema' in run(
        'export_piflow_to_diffusers', *arguments, cwd=tmp_path, code=1
    )
    run('export_piflow_to_diffusers', *arguments, '--non-ema', '--dtype', 'float16', '--license', 'mit', cwd=tmp_path)
    state = load_file(tmp_path / 'out' / 'diffusion_pytorch_model.safetensors')
    assert {str(tensor.dtype) for tensor in state.values()} == {'torch.float16'}
    assert 'proj_out_means.weight' in state
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (config['_class_name'], config['num_gaussians'], config['sample_size']) == (
        'GMDiTTransformer2DModelV2',
        8,
        8,
    )
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert card.startswith('---\nlicense: mit\n')
    assert '| iterations | 7 |' in card
    # the whole network is what `pretrained` of the same student takes
    denoising = dict(load_config(CONFIG).model.diffusion.denoising, pretrained=str(tmp_path / 'out'))
    MODULES.build(denoising)


@pytest.mark.slow
def test_numbers_of_an_evaluation_are_in_the_card(checkpoint, tmp_path):
    """Of the same config, as both tools read it."""
    (tmp_path / 'config.py').write_text(
        f"""_base_ = {str(CONFIG)!r}
name = {checkpoint.parent.name!r}
untrained = dict(denoising=dict(pretrained=None))
model = dict(diffusion_use_ema=False, diffusion=untrained, teacher=untrained)
data = dict(val2=dict(num_test_images=3))
metrics = [dict(type='ColorStats')]
evaluation = [dict(type='GenerativeEvalHook', data='val2', prefix='few', viz_num=0, metrics=metrics)]
"""
    )
    run('test', 'config.py', cwd=tmp_path)
    export = ('export_piflow_to_diffusers', 'config.py', '--out-dir', 'out', '--non-ema')
    run(*export, cwd=tmp_path)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '`val2_few`: num_samples 3, nfe 2, ' in card
    assert '* ColorStats: num_images 3' in card
    assert "'brightness'" not in card  # the table names the numbers
    assert 'Measured under a config' not in card
    run(*export, '--cfg-options', 'test_cfg.temperature=0.5', cwd=tmp_path)
    assert 'Measured under a config whose' in (tmp_path / 'out' / 'README.md').read_text()


@pytest.mark.slow
def test_other_tools(checkpoint, tmp_path):
    assert 'parameters' in run('count_parameters', checkpoint, cwd=tmp_path)
    run('save_inference_weights', checkpoint, cwd=tmp_path)
    assert (checkpoint.parent / 'iter_7_inference.safetensors').is_file()
    assert 'nothing to remove' in run('checkpoint_cleaner', checkpoint.parent, '--dry-run', cwd=tmp_path)
    assert 'does not exist' in run(
        'convert_comfy_flux_lora_to_diffusers', 'none.safetensors', 'out', cwd=tmp_path, code=1
    )
