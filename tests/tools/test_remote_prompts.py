"""A text-to-image run that reads prompts, latents and the negative prompt from S3, and saves there, equals a local one.

The recipe of the digits, which has no prompts, is in ``test_remote.py``.
"""

import json

import pytest
import torch

from lakonlab.datasets.prompt_cache import write_embeds
from lakonlab.datasets.prompt_cache.published import PublishedPromptCache
from lakonlab.datasets.prompt_converting import convert_prompt_cache
from lakonlab.storage import files
from lakonlab.storage.checkpoint import find_checkpoint, read_state, read_tensors
from tests import tiny_text_image
from tests.datasets.prompt_files import quantised, write_datalist, write_record
from tests.tools.test_cache_tools import in_process
from tests.tools.training import TIMING

RECORDS, WIDTH = 5, 20
TOTAL_ITERS = 6


def embeds_of(number):
    """States of a prompt of its own length, in 8 bits, and their mask."""
    states = torch.randn(2 + number, WIDTH, generator=torch.Generator().manual_seed(number))
    values, scale, _ = quantised(states)
    mask = torch.ones(2 + number, dtype=torch.int64)
    return dict(encoder_hidden_states=values, encoder_hidden_states_scale=scale, encoder_hidden_states_mask=mask)


def write_data(folder):
    """Prompts with latents as a cache of either layout, their lists, and a negative prompt."""
    for number in range(RECORDS):
        latents = torch.randn(tiny_text_image.LATENT_SIZE, generator=torch.Generator().manual_seed(100 + number))
        write_record(folder / 'published', number, prompt_embed_kwargs=embeds_of(number), latents=latents)
    names = [f'{number:012d}' for number in range(RECORDS)]
    convert_prompt_cache(PublishedPromptCache(str(folder / 'published')), str(folder / 'ours'), 2)
    for layout in ('published', 'ours'):
        write_datalist(folder / f'{layout}.jsonl.gz', names)
    negative = dict(encoder_hidden_states=torch.ones(1, WIDTH), encoder_hidden_states_mask=torch.ones(1).long())
    write_embeds(str(folder / 'negative.pth'), negative, 'bf16')


def write_config(path, weights, where, layout):
    """A config file whose data lie in a place."""
    content = dict(
        name='tiny',
        model=tiny_text_image.config('QwenImage', 'GM', weights),
        train_cfg=dict(nfe=2, num_intermediate_states=2, total_substeps=16, teacher_test_cfg=dict(guidance_scale=4.0)),
        test_cfg=dict(nfe=2, total_substeps=16),
        optimizer={'diffusion': dict(type='AdamW', lr=1e-3)},
        data=dict(
            train=dict(
                type='ImagePrompt',
                data_root=where,
                cache_dir=layout,
                cache_datalist_path=f'{where}/{layout}.jsonl.gz',
                negative_prompt_embeds_path=f'{where}/negative.pth',
            ),
            train_dataloader=dict(samples_per_gpu=2),
        ),
        total_iters=TOTAL_ITERS,
        checkpoint_config=dict(interval=3, out_dir='checkpoints'),
        log_config=dict(interval=1, hooks=[dict(type='TextLoggerHook')]),
    )
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in content.items()))
    return path


def what_was_trained(run_dir):
    """All tensors of the newest checkpoint, as bytes, and what it says of the data."""
    path = find_checkpoint(run_dir)
    tensors = {
        f'{part}/{name}': tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.item()
        for part in ('model', 'optimizer')
        for name, tensor in read_tensors(path, part).items()
    }
    return {**tensors, 'data': read_state(path)['data']}


def logged(content):
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMING} for line in content.splitlines()
    ]


@pytest.mark.parametrize('layout', ['ours', pytest.param('published', marks=pytest.mark.slow)])
def test_prompts_of_a_server(bucket, tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
    (tmp_path / 'data').mkdir()
    write_data(tmp_path / 'data')
    weights = tiny_text_image.teacher_file('QwenImage', tmp_path / 'data')
    disk = write_config(tmp_path / 'disk.py', weights, str(tmp_path / 'data'), layout)
    assert in_process('train', [disk, '--work-dir', 'work_dirs/disk'], monkeypatch) == 0
    expected = what_was_trained('checkpoints/disk')
    assert len(expected) > 10

    where = f'{bucket}/data'
    files.upload(tmp_path / 'data', where)
    (tmp_path / 'data').rename(tmp_path / 'not_here')
    weights = f'{where}/{weights.rpartition("/")[2]}'
    remote = write_config(tmp_path / 'remote.py', weights, where, layout)
    options = ['--work-dir', f'{bucket}/logs/remote', '--cfg-options', f'checkpoint_config.out_dir={bucket}/runs']
    assert in_process('train', [remote, *options, 'total_iters=3'], monkeypatch) == 0
    assert find_checkpoint(f'{bucket}/runs/remote').name == 'iter_3'
    assert in_process('train', [remote, *options, 'data.workers_per_gpu=1'], monkeypatch) == 0
    assert what_was_trained(f'{bucket}/runs/remote') == expected
    content = (tmp_path / 'work_dirs' / 'disk' / 'scalars.json').read_text()
    assert len(logged(content)) >= TOTAL_ITERS
    assert logged(files.read_text(f'{bucket}/logs/remote/scalars.json')) == logged(content)
