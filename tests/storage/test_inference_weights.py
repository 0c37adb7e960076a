"""Weights for inference that a checkpoint brings along."""

import pytest
import torch
from safetensors.torch import load_file

from lakonlab.models.architecture.roles import named_state
from lakonlab.parallel.single import SingleProcess
from lakonlab.registry import MODULES
from lakonlab.storage.checkpoint import read_manifest, verify, write_checkpoint
from lakonlab.storage.inference_weights import FILE, FOLDER, add_inference_weights
from tests import tiny_text_image


@pytest.mark.parametrize('policy', ['GM', 'DX'])
def test_average_of_an_adapter_is_read_back(policy, tmp_path):
    config = tiny_text_image.config('Flux', policy, tiny_text_image.teacher_file('Flux', tmp_path))
    model = SingleProcess(device='cpu').wrap(tiny_text_image.build(config))
    with torch.no_grad():
        for _, tensor in named_state(model.diffusion_ema):
            tensor.add_(torch.randn(tensor.shape) * 0.01)
    state = SingleProcess(device='cpu').model_state(model)

    def extra(folder, place):
        return add_inference_weights(folder, place, 'diffusion_ema', card=('README.md', 'it is in {}'.format))

    path = write_checkpoint(tmp_path / 'run', 3, {'model': state}, {}, extra=extra)
    assert f'{FOLDER}/{FILE}' in read_manifest(path)['files']
    verify(path)
    assert (path / FOLDER / 'README.md').read_text() == f'it is in {path / FOLDER}'
    names = load_file(path / FOLDER / FILE)
    assert not [name for name in names if 'default' in name or name.startswith('diffusion')]

    denoising = {**config['diffusion']['denoising'], 'pretrained_adapter': str(path / FOLDER / FILE)}
    student = MODULES.build(denoising)
    own = dict(named_state(student))
    average = dict(named_state(model.diffusion_ema.denoising))
    trained = [name.removeprefix('diffusion_ema.denoising.') for name in state if name.startswith('diffusion_ema.')]
    assert len(trained) == len(names)
    for name in trained:
        assert torch.equal(own[name], average[name]), name
