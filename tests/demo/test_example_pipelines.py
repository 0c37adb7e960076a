"""The example scripts, on tiny bases and adapters."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from PIL import Image

from lakonlab.ui.generate_example import Timing, run_example
from lakonlab.ui.pipeline_options import GMFLUX, add_pipeline_arguments
from tests import tiny_components
from tests.pipelines.adapters import write_adapter

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
