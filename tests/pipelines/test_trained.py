"""An adapter that was trained here, in the pipeline: the trainer's own samples, and what users do with it."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import PiflowScheduler
from safetensors import safe_open

from lakonlab.pipelines.adapter_files import weights_name
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
    again = trained.pipeline(adapter=trained.saved)
    assert again.transformer.piflow.recipe == pipe.transformer.piflow.recipe
    torch.testing.assert_close(
        again(PROMPTS[:1], latents=pack(start), output_type='pt', **CALL[trained.family]).images, got, rtol=0, atol=1e-6
    )
    base = trained.pipeline(load=False)
    assert set(base.transformer.state_dict()) < {
        name.replace('.base_layer.', '.') for name in pipe.transformer.state_dict()
    } | {'proj_out.weight', 'proj_out.bias'}


@pytest.mark.parametrize('folder', ['export', 'saved'])
def test_the_card_and_its_snippet(trained, folder, tmp_path):
    """The snippet runs with nothing but the device, dtype, size and place replaced."""
    card = (getattr(trained, folder) / 'README.md').read_text()
    assert f'iterations | {20}' in card
    assert 'network evaluations | 4' in card
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    assert code.count('\n') == 6
    for published, here in (('torch.bfloat16', 'torch.float32'), ("'cuda'", "'cpu'"), ('1024', '32')):
        assert published in code
        code = code.replace(published, here)
    code = code.replace("'checkpoints/", f"'{trained.root}/checkpoints/")
    assert str(getattr(trained, folder)) in code
    with in_folder(tmp_path):
        exec(code, {})
    assert Path(tmp_path, 'image.png').stat().st_size > 0


def test_what_checkpoints_export(trained):
    """All that the tool writes; the cards differ in the place."""
    contents = []
    for folder, place in ((trained.export, str(trained.export)), (trained.saved, 'checkpoints/tiny/iter_20/export')):
        files = {str(path.relative_to(folder)): path for path in folder.rglob('*') if path.is_file()}
        with safe_open(files.pop(weights_name()), 'pt') as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
            metadata = weights.metadata()
        contents.append((tensors, metadata, {name: path.read_text() for name, path in files.items()}))
        assert place in contents[-1][2]['README.md']
        contents[-1][2]['README.md'] = contents[-1][2]['README.md'].replace(place, 'PLACE')
    (by_tool, *others), (by_run, *same) = contents
    torch.testing.assert_close(by_run, by_tool, rtol=0, atol=0)
    assert same == others
    assert {'README.md', 'config.json', 'scheduler/scheduler_config.json'} <= set(others[1])


def test_dx_by_the_scheduler_of_diffusers(trained):
    """The loop that diffusers runs for such checkpoints: wide output of the transformer, its own scheduler."""
    folder = trained.export / 'piflow_scheduler'
    if trained.cfg.model.diffusion.policy_type != 'DX':
        assert not folder.exists()
        return
    pipe = trained.pipeline()
    start = pack(noise(1))
    expected = pipe(PROMPTS[0], latents=start, output_type='latent', **CALL[trained.family]).images
    theirs = PiflowScheduler.from_pretrained(folder)
    theirs.set_timesteps(4)
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True, prepend=True
    )
    pipe(PROMPTS[0], latents=start, output_type='latent', **CALL[trained.family])
    handle.remove()
    state = start
    with torch.no_grad():
        for t in theirs.timesteps:
            conditions = {**calls[0], 'hidden_states': state, 'timestep': t.expand(1) / 1000}
            state = theirs.step(pipe.transformer(**conditions)[0], t, state, return_dict=False)[0]
    torch.testing.assert_close(state, expected, rtol=0, atol=2e-5)
