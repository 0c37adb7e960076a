"""An adapter that was trained here, in the pipeline: the trainer's own samples, and what users do with it."""

import re
from pathlib import Path

import pytest
import torch

from tests.pipelines.trained import CALL, PROMPTS, Trained, in_folder, noise, pack, train

KINDS = [('Flux', 'GM'), ('QwenImage', 'DX'), ('QwenImage', 'GM'), ('Flux', 'DX'), ('Flux', 'data-free')]
FAST = KINDS[:2]
CASES = [pytest.param(kind, id='-'.join(kind), marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope='module', params=CASES)
def trained(request, tmp_path_factory) -> Trained:
    return train(tmp_path_factory.mktemp('trained'), *request.param)


def test_trainers_own_samples(trained):
    """Same weights, prompts and noise: the same pictures and, before the autoencoder, latents."""
    pipe = trained.pipeline()
    pipe.vae.use_slicing = False
    for prompts in (PROMPTS, PROMPTS[:1]):
        start = noise(len(prompts))
        expected = trained.model.val_step({'noise': start, 'prompt_kwargs': {'prompt': prompts}}, role='ema')
        got = pipe(prompts, latents=pack(start), output_type='pt', **CALL[trained.family]).images
        torch.testing.assert_close(got, expected['pred_imgs'], rtol=0, atol=1e-5)
    base = trained.pipeline(load=False)
    assert set(base.transformer.state_dict()) < {
        name.replace('.base_layer.', '.') for name in pipe.transformer.state_dict()
    } | {'proj_out.weight', 'proj_out.bias'}


def test_the_card_and_its_snippet(trained, tmp_path):
    """The snippet runs with nothing but the device, dtype, size and place replaced."""
    card = (trained.export / 'README.md').read_text()
    assert f'iterations | {20}' in card
    assert 'network evaluations | 4' in card
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    assert code.count('\n') == 6
    for published, here in (('torch.bfloat16', 'torch.float32'), ("'cuda'", "'cpu'"), ('1024', '32')):
        assert published in code
        code = code.replace(published, here)
    with in_folder(tmp_path):
        exec(code, {})
    assert Path(tmp_path, 'image.png').stat().st_size > 0
