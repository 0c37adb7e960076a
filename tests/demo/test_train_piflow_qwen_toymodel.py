"""The demo on a tiny Qwen-Image pipeline: tokenizer, text encoder, transformer and autoencoder of the real classes."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lakonlab.config.errors import ConfigError
from lakonlab.ui.static_policy_demo import prompt_demo
from lakonlab.ui.static_policy_experiment import Settings, build_model
from lakonlab.ui.static_policy_teachers import prompt_subject
from tests import tiny_components

SCRIPT = Path(__file__).parents[2] / 'demo' / 'train_piflow_qwen_toymodel.py'
SHORT = ['--h', '64', '--w', '96', '-k', '3', '--lr', '0.02', '--device', 'cpu', '--picture-interval', '0']


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
    return str(tiny_components.qwen_image_folder(tmp_path_factory.mktemp('pipelines') / 'qwen'))


@pytest.mark.parametrize('policy', ['GMFlow', 'DX'])
def test_a_policy_comes_closer_and_is_drawn(pipeline, tmp_path, capsys, policy):
    picture = tmp_path / 'new' / 'picture.png'
    flags = ['--teacher', pipeline, '--prompt', 'a red fox', '--policy-type', policy, '--num-iters', '40']
    assert prompt_demo('', [*SHORT, *flags, '--out', str(picture)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('RMSE')).split()
    assert float(line[line.index('after;') - 1]) < float(line[line.index('teacher:') + 1])
    assert sorted(path.name for path in picture.parent.iterdir()) == ['picture.loss.png', 'picture.png']
    assert np.asarray(Image.open(picture)).std() > 5


def test_prompts_differ_and_the_empty_one_guides(pipeline):
    subject = prompt_subject(pipeline, ['a red fox', 'rain'], 3, (64, 96), None, 'float32', 'cpu')
    prompts = subject.conditions['prompt_embed_kwargs']['encoder_hidden_states']
    negative = subject.conditions['negative_prompt_embed_kwargs']['encoder_hidden_states']
    assert torch.equal(prompts[0], prompts[2])
    assert not torch.equal(prompts[0], prompts[1])
    assert torch.equal(negative[0], negative[1])
    assert subject.guidance == {'guidance_scale': 4.0}
    assert subject.latent_size[1:] == (8, 12)


def test_the_published_teacher_at_full_size(monkeypatch):
    embedded = {'encoder_hidden_states': torch.zeros(1, 7, 3584)}
    names = ('prompt_embed_kwargs', 'negative_prompt_embed_kwargs')
    monkeypatch.setattr(
        'lakonlab.ui.static_policy_teachers._embed', lambda *_: {name: dict(embedded) for name in names}
    )
    subject = prompt_subject(None, ['x'], 1, (768, 1360), None, 'bfloat16', 'cpu')
    with torch.device('meta'):
        model = build_model(subject, Settings(out=Path('x.png')))
    assert sum(p.numel() for p in model.teacher.parameters()) == 20_430_401_088
    assert model.teacher.denoising.pretrained.startswith('huggingface://Qwen/Qwen-Image/')
    assert model.diffusion.denoising.values['means'].shape == (1, 32, 16, 96, 170)


def test_sizes_that_cannot_be(pipeline):
    with pytest.raises(ConfigError, match='--h 70 --w 64: expected multiples of 16'):
        prompt_subject(pipeline, ['x'], 1, (70, 64), None, 'float32', 'cpu')


def test_a_folder_of_something_else(tmp_path, capsys):
    flags = ['--teacher', str(tmp_path), '--out', str(tmp_path / 'picture.png')]
    assert prompt_demo('', [*SHORT, *flags]) == 1
    assert 'expected a folder of a Qwen-Image pipeline' in capsys.readouterr().err


def test_the_script_offers_it(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', [str(SCRIPT), '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name='__main__')
    assert end.value.code == 0
    output = capsys.readouterr().out
    for flag in ('--prompt', '--h', '--w', '--cfg', '--seed', '-k', '--num-iters', '--lr', '--out', '--teacher'):
        assert flag in output
