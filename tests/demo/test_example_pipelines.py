"""The example scripts, on tiny bases and adapters."""

import argparse
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from PIL import Image

from lakonlab.ui.generate_example import Timing, generate, run_example
from lakonlab.ui.pipeline_options import DXFLUX, GMFLUX, add_pipeline_arguments, build_pipeline, steps_of
from tests import tiny_components
from tests.pipelines.adapters import RECIPE, write_adapter

DEMO = Path(__file__).parents[2] / 'demo'


@pytest.mark.parametrize(
    ('script', 'folder', 'transformer', 'kind'),
    [
        ('gmflux', tiny_components.flux_folder, FluxTransformer2DModel, 'GM'),
        pytest.param(
            'dxqwen', tiny_components.qwen_image_folder, QwenImageTransformer2DModel, 'DX', marks=pytest.mark.slow
        ),
        pytest.param('dxflux', tiny_components.flux_folder, FluxTransformer2DModel, 'DX', marks=pytest.mark.slow),
        pytest.param(
            'gmqwen', tiny_components.qwen_image_folder, QwenImageTransformer2DModel, 'GM', marks=pytest.mark.slow
        ),
    ],
)
def test_script(script, folder, transformer, kind, tmp_path):
    base = folder(tmp_path / 'base')
    write_adapter(tmp_path / 'adapter', transformer.from_pretrained(base, subfolder='transformer'), kind)
    options = ['--model', base, '--adapter', tmp_path / 'adapter', '--device', 'cpu', '--dtype', 'float32']
    command = [sys.executable, DEMO / f'example_{script}_pipeline.py', *options, '--width', '48', '--height', '32']
    done = subprocess.run([*command, '--benchmark'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / f'{script}_4nfe.png').size == (48, 32)
    assert re.search(r'48 x 32, 4 evaluations: [\d.]+ s per image, [\d.]+ s per evaluation, of which', done.stdout)


def options_of(folder, **options):
    values = dict(model=str(folder / 'base'), adapter=str(folder / 'adapter'), subfolder=None, device='cpu')
    return argparse.Namespace(**{**values, 'dtype': 'float32', 'offload': 'none', 'compile': False, **options})


@pytest.fixture(scope='module')
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flux')
    tiny_components.flux_folder(folder / 'base')
    return folder, FluxTransformer2DModel.from_pretrained(folder / 'base', subfolder='transformer')


def test_what_an_adapter_says_is_followed(flux, caplog):
    """Its policy and its number of steps, whatever the script was made for; nothing is contradicted."""
    folder, transformer = flux
    policy, recipe = dict(type='DX', segment_size=1 / 7.5, shift=3.2), {**RECIPE, 'nfe': 8}
    write_adapter(folder / 'adapter', transformer, 'DX', recipe=recipe, policy=policy)
    call = dict(
        prompt='a red heart', width=48, height=32, seed=3, steps=None, out=folder / 'image.png', benchmark=False
    )
    said = []
    with caplog.at_level('WARNING', 'lakonlab'):
        assert (
            generate(
                options_of(folder, **{**call, 'out': None, 'benchmark': True}),
                replace(DXFLUX, name=str(folder / 'own')),
                said.append,
            )
            == 0
        )
    assert said[0] == f'wrote {folder}/own_8nfe.png'
    assert said[1].startswith('48 x 32, 8 evaluations: ')
    assert not caplog.records
    student = build_pipeline(options_of(folder), DXFLUX).transformer.piflow
    assert student.policy_kwargs == dict(segment_size=1 / 7.5, shift=3.2)
    generate(options_of(folder, **{**call, 'steps': 2}), DXFLUX, said.append)
    assert said[-1] == f'wrote {folder}/image.png'


def test_adapters_that_do_not_say_are_taken_as_published(flux):
    folder, transformer = flux
    write_adapter(folder / 'adapter', transformer, 'DX', recipe=None, policy=dict(type='DX'))
    pipe = build_pipeline(options_of(folder), DXFLUX)
    assert pipe.transformer.piflow.policy_kwargs == dict(segment_size=1 / 3.5, shift=3.2)
    assert steps_of(pipe, DXFLUX) == 4
    write_adapter(folder / 'adapter', transformer, 'GM', recipe=None)
    assert build_pipeline(options_of(folder), DXFLUX).transformer.piflow.policy_type == 'GMFlow'


def test_timing():
    timing = Timing(image=3.0, network=1.5, rollout=0.5, num_steps=4)
    assert timing.rollout_share == 0.25
    assert str(timing).startswith(
        '3.000 s per image, 0.500 s per evaluation, of which following the policy takes 25.0%'
    )
    assert str(timing).endswith('prompt and autoencoder 1.000 s')


def test_what_is_wrong_with_an_adapter_is_no_traceback(tmp_path, monkeypatch, capsys):
    base = tiny_components.flux_folder(tmp_path / 'base')
    options = ['--model', str(base), '--adapter', str(base), '--device', 'cpu', '--dtype', 'float32']
    monkeypatch.setattr(sys, 'argv', ['example', *options])
    with pytest.raises(SystemExit) as ended:
        run_example(GMFLUX, 'a red heart', 'An example.')
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: '{base}' has no diffusion_pytorch_model.safetensors")
    assert 'subfolder: transformer' in last


def test_offload_without_a_value():
    parser = argparse.ArgumentParser()
    add_pipeline_arguments(parser, GMFLUX)
    chosen = {tuple(words): parser.parse_args(words).offload for words in ([], ['--offload'], ['--offload=sequential'])}
    assert list(chosen.values()) == ['none', 'model', 'sequential']
