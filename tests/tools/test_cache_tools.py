"""The tools that make caches, as commands: one process and two, killed and started again, checked and converted."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from lakonlab.config.errors import ConfigError
from lakonlab.datasets.image_prompt import ImagePrompt
from lakonlab.datasets.imagenet import ImageNet
from lakonlab.datasets.latent_cache import LatentCache
from lakonlab.datasets.prompt_cache import open_prompt_cache, read_embeds
from lakonlab.datasets.prompt_cache.index import INDEX_FILE
from lakonlab.runner.cache_negative_prompt import wanted_prompts
from tests import tiny_components
from tests.datasets.prompt_cache.caches import content_of, same_fields
from tests.datasets.prompt_files import text_source

ROOT = Path(__file__).parents[2]
TEXTS = ['a photo of a brown bear', 'the sea at night', 'a small house', 'the sea at night', 'two red apples'] * 4
ENCODERS = {'Flux': 'PretrainedFluxTextEncoder', 'QwenImage': 'PretrainedQwenImageTextEncoder'}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('pipelines')
    return {
        'Flux': tiny_components.flux_folder(root / 'flux'),
        'QwenImage': tiny_components.qwen_image_folder(root / 'qwen'),
    }


@pytest.fixture
def config(tmp_path, folders):
    """Writes a config of a run that uses a cache, and of a text encoder, as published ones have them."""

    def write(family='QwenImage', cache_dir='preproc', texts=TEXTS, **more):
        prompts = dict(
            type='ImagePrompt',
            data_root=str(tmp_path),
            prompt_dataset_kwargs=text_source(tmp_path, texts),
            latent_size=(16, 8, 8),
            cache_dir=cache_dir,
            cache_datalist_path=str(tmp_path / f'{cache_dir}.jsonl.gz'),
            pad_seq_len=32,
            **more,
        )
        content = dict(
            name='tiny',
            model=dict(
                type='LatentDiffusionTextImage', diffusion=dict(type='GaussianFlow', denoising=dict(type='SpectrumMLP'))
            ),
            data=dict(
                train=dict(end_ind=-4, **prompts),
                val=dict(start_ind=-4, repeat=2, test_mode=True, **prompts),
                val_dataloader=dict(samples_per_gpu=1),
            ),
        )
        encoder = dict(
            type=ENCODERS[family],
            model_name_or_path=str(folders[family]),
            max_sequence_length=32,
            torch_dtype='float32',
        )
        path, encoder_path = tmp_path / f'{cache_dir}.py', tmp_path / 'encoder.py'
        path.write_text('\n'.join(f'{key} = {value!r}' for key, value in content.items()))
        encoder_path.write_text(f'model = {dict(text_encoder=encoder)!r}')
        return [str(path), '--text-encoder', str(encoder_path)]

    return write


def environment():
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    return {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}


def run(tool, *arguments, processes=1, succeeds=True, cwd=None):
    command = [sys.executable, str(ROOT / 'tools' / f'{tool}.py'), *map(str, arguments)]
    if processes > 1:
        launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        command = [*launcher, *command[1:]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600, cwd=cwd)
    assert (result.returncode == 0) == succeeds, result.stderr
    return result.stderr


def in_process(tool, arguments, monkeypatch):
    """The same command without a process of its own."""
    import importlib.util

    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    spec = importlib.util.spec_from_file_location(tool, ROOT / 'tools' / f'{tool}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


@pytest.mark.parametrize('family', ['Flux', 'QwenImage'])
def test_both_layouts(family, config, tmp_path, monkeypatch, capfd):
    ours, published = config(family), config(family, 'published')
    assert in_process('cache_image_prompt_data', [*ours, '--batch-size', 4, '--shard-size', 2], monkeypatch) == 0
    assert in_process('cache_image_prompt_data', [*published, '--format', 'published'], monkeypatch) == 0
    capfd.readouterr()
    first, second = open_prompt_cache(tmp_path / 'preproc'), open_prompt_cache(tmp_path / 'published')
    assert first.kind == 'ours'
    assert second.kind == 'published'
    assert [first.stored(name).prompt for name in first.names] == TEXTS
    assert first.embeds.table.rows == len(set(TEXTS))
    for name in first.names[:5]:
        one, other = first.record(name)['prompt_embed_kwargs'], second.record(name)['prompt_embed_kwargs']
        assert one.keys() == other.keys()
        if family == 'Flux':
            assert one['encoder_hidden_states'].shape == (32, 32)
            assert one['pooled_projections'].shape == (32,)
        else:
            assert len(one['encoder_hidden_states']) == len(one['encoder_hidden_states_mask']) < 32
        for key in one:
            # batches differ, and eight bits keep four digits of two
            torch.testing.assert_close(one[key], other[key], rtol=0.13, atol=1e-3)
    for arguments, rows in ((ours, len(set(TEXTS))), (published, len(TEXTS))):
        assert in_process('cache_image_prompt_data', [*arguments, '--check'], monkeypatch) == 0
        assert f'{rows} read, all whole' in capfd.readouterr().err
    train = ImagePrompt(
        str(tmp_path), cache_dir='preproc', cache_datalist_path=str(tmp_path / 'preproc.jsonl.gz'), pad_seq_len=32
    )
    assert len(train) == len(TEXTS)
    assert train[3]['prompt_embed_kwargs']['encoder_hidden_states'].shape[0] == 32


def test_embeddings_are_those_of_the_encoder(config, folders, tmp_path, monkeypatch):
    from lakonlab.registry import MODULES

    in_process('cache_image_prompt_data', [*config(), '--precision', 'float32', '--batch-size', 1], monkeypatch)
    encoder = MODULES.build(
        dict(type=ENCODERS['QwenImage'], model_name_or_path=str(folders['QwenImage']), torch_dtype='float32')
    )
    cache = open_prompt_cache(tmp_path / 'preproc')
    for name in cache.names[:4]:
        record = cache.record(name)
        expected = encoder(record['prompt'])
        found = record['prompt_embed_kwargs']
        torch.testing.assert_close(found['encoder_hidden_states'], expected['encoder_hidden_states'][0])
        assert found['encoder_hidden_states_mask'].tolist() == expected['encoder_hidden_states_mask'][0].tolist()


def test_only_the_last_prompts(config, tmp_path, monkeypatch):
    assert in_process('cache_image_prompt_data', [*config(), '--max-size', 3, '--data', 'val'], monkeypatch) == 0
    cache = open_prompt_cache(tmp_path / 'preproc')
    assert [cache.stored(name).prompt for name in cache.names] == TEXTS[-3:]
    assert len((tmp_path / 'preproc.jsonl.gz').read_bytes()) > 0


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        (['--data', 'vall'], "--data: 'vall'"),
        (['--batch-size', '0'], '--batch-size 0'),
        (['--text-encoder', 'self'], 'has no model.text_encoder'),
        (['--cfg-options', 'data.train.cache_dir=None', 'data.val.cache_dir=None'], 'nothing can be cached'),
        (
            ['--data', 'train', '--cfg-options', 'data.train.prompt_dataset_kwargs=None'],
            'prompt_dataset_kwargs: missing',
        ),
    ],
)
def test_what_cannot_be_cached(arguments, match, config, monkeypatch, capsys):
    given = config()
    arguments = [given[0] if argument == 'self' else argument for argument in arguments]
    assert in_process('cache_image_prompt_data', [*given, *arguments], monkeypatch) == 1
    assert match in capsys.readouterr().err


def test_a_text_encoder_is_needed(config, monkeypatch, capsys):
    assert in_process('cache_image_prompt_data', config()[:1], monkeypatch) == 1
    assert 'add --text-encoder' in capsys.readouterr().err


def test_damage_is_found_by_the_check(config, tmp_path, monkeypatch, capsys):
    given = config()
    in_process('cache_image_prompt_data', given, monkeypatch)
    path = tmp_path / 'preproc' / 'embeds-000000.safetensors'
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert in_process('cache_image_prompt_data', [*given, '--check'], monkeypatch) == 1
    error = capsys.readouterr().err
    assert 'embeds-000000.safetensors is damaged' in error
    assert '1 of 4 are damaged' in error


def test_layouts_are_not_mixed_in_a_folder(config, tmp_path, monkeypatch, capsys):
    for first, second in (('ours', 'published'), ('published', 'ours')):
        given = config(cache_dir=first)
        assert in_process('cache_image_prompt_data', [*given, '--format', first], monkeypatch) == 0
        (tmp_path / f'{first}.jsonl.gz').unlink()
        before = content_of(tmp_path / first)
        assert in_process('cache_image_prompt_data', [*given, '--format', second], monkeypatch) == 1
        assert f'--format {first}' in ' '.join(capsys.readouterr().err.split())
        assert content_of(tmp_path / first) == before


def test_ours_is_finished_when_both_index_and_list_are_there(config, tmp_path, monkeypatch, capsys):
    """What the message about damage says helps: remove the file together with the index, and run the command again."""
    given = [*config(), '--shard-size', 2]
    in_process('cache_image_prompt_data', given, monkeypatch)
    folder, datalist = tmp_path / 'preproc', tmp_path / 'preproc.jsonl.gz'
    before = content_of(folder)
    for removed in ([folder / INDEX_FILE, folder / 'embeds-000001.safetensors'], [datalist], [folder / INDEX_FILE]):
        for path in removed:
            path.unlink()
        capsys.readouterr()
        assert in_process('cache_image_prompt_data', given, monkeypatch) == 0
        assert 'is finished (' not in capsys.readouterr().err
        assert content_of(folder) == before
        assert datalist.exists()
    assert in_process('cache_image_prompt_data', given, monkeypatch) == 0
    assert 'is finished (' in capsys.readouterr().err


def test_published_is_finished_when_list_and_records_are_there(config, tmp_path, monkeypatch, capsys):
    given = [*config(), '--format', 'published']
    in_process('cache_image_prompt_data', given, monkeypatch)
    (tmp_path / 'preproc' / '000000000007.zst').unlink()
    assert in_process('cache_image_prompt_data', given, monkeypatch) == 0
    assert '1 files were written, 19 were there' in capsys.readouterr().err
    assert (tmp_path / 'preproc' / '000000000007.zst').exists()
    for layout in ('published', 'ours'):
        assert in_process('cache_image_prompt_data', [*given, '--format', layout], monkeypatch) == 0
        assert 'is finished (' in capsys.readouterr().err
    shutil.rmtree(tmp_path / 'preproc')
    assert in_process('cache_image_prompt_data', given, monkeypatch) == 0
    assert '20 files were written' in capsys.readouterr().err


def test_what_cannot_be_finished_is_refused_before_an_encoder_is_built(config, tmp_path, monkeypatch, capsys):
    """The folder of the text encoder does not even exist."""
    given = config()
    (tmp_path / 'encoder.py').write_text(
        "model = dict(text_encoder=dict(type='PretrainedQwenImageTextEncoder', model_name_or_path='/nowhere'))"
    )
    for options, match in (
        (['data.train.cache_datalist_path=list.txt'], 'expected a file that ends in .jsonl'),
        (['data.train.bucketize=True'], 'bucketize=True: neither'),
        (['data.train.latent_size=(16,4)', 'data.train.vae_scale_factor=(8,8)'], 'vae_scale_factor'),
    ):
        assert in_process('cache_image_prompt_data', [*given, '--cfg-options', *options], monkeypatch) == 1
        error = ' '.join(capsys.readouterr().err.split())
        assert match in error
        assert '/nowhere' not in error
    assert in_process('cache_negative_prompt', [*given, '--out', tmp_path / 'empty.txt'], monkeypatch) == 1
    error = capsys.readouterr().err
    assert 'expected a file that ends in' in error
    assert '/nowhere' not in error
    (tmp_path / 'preproc.jsonl.gz').write_bytes(gzip.compress(b'{"filename": "another"}\n'))
    assert in_process('cache_image_prompt_data', given, monkeypatch) == 1
    error = ' '.join(capsys.readouterr().err.split())
    assert 'lists other records' in error
    assert '/nowhere' not in error


def test_options_without_effect_are_told(config, monkeypatch, capsys):
    for tool, more in (('cache_image_prompt_data', ['--data', 'none']), ('cache_negative_prompt', [])):
        assert in_process(tool, [*config(), '--gpus', 2, *more], monkeypatch) == 1
        assert '--gpus: deprecated and without effect' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('out', 'prompt', 'expected'),
    [('b.pth', None, 'B'), ('a.pth', None, 'A'), ('c.pth', 'C', 'C'), ('c.pth', None, None), (None, None, 'both')],
)
def test_which_negative_prompt_a_file_holds(out, prompt, expected):
    named = {
        name: dict(type='ImagePrompt', negative_prompt_embeds_path=f'{text.lower()}.pth', negative_prompt_kwargs=kwargs)
        for name, text, kwargs in (('train', 'A', dict(prompt='A')), ('val', 'B', dict(prompt='B')))
    }
    cfg = Config(dict(data=named))
    if expected is None:
        with pytest.raises(ConfigError, match='want different negative prompts'):
            wanted_prompts(cfg, out, prompt)
    elif out is None:
        assert wanted_prompts(cfg, None, None) == {'a.pth': {'prompt': 'A'}, 'b.pth': {'prompt': 'B'}}
    else:
        assert wanted_prompts(cfg, out, prompt) == {out: {'prompt': expected}}
    agreeing = Config(dict(data=dict(train=named['val'], val=named['val'])))
    assert wanted_prompts(agreeing, 'c.pth', None) == {'c.pth': {'prompt': 'B'}}


def test_negative_prompts(config, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'empty.pth'
    given = config(negative_prompt_embeds_path=str(path), negative_prompt_kwargs=dict(prompt=' '))
    assert in_process('cache_negative_prompt', given, monkeypatch) == 0
    found = read_embeds(path)
    assert found['encoder_hidden_states_mask'].all()
    before = path.read_bytes()
    assert in_process('cache_negative_prompt', given, monkeypatch) == 0
    assert path.read_bytes() == before
    other = tmp_path / 'other.safetensors'
    assert in_process('cache_negative_prompt', [*given, '--out', other, '--prompt', 'a small house'], monkeypatch) == 0
    assert len(read_embeds(other)['encoder_hidden_states']) > len(found['encoder_hidden_states'])
    assert in_process('cache_negative_prompt', config(), monkeypatch) == 1
    assert 'name a file with --out' in capsys.readouterr().err
    assert in_process('cache_negative_prompt', [*config(), '--out', tmp_path / 'empty.txt'], monkeypatch) == 1
    assert 'expected a file that ends in' in capsys.readouterr().err


def test_conversion(config, tmp_path, monkeypatch, capsys):
    in_process('cache_image_prompt_data', [*config(), '--format', 'published'], monkeypatch)
    out = tmp_path / 'converted'
    assert in_process('convert_prompt_cache', [tmp_path / 'preproc', out, '--shard-size', 8], monkeypatch) == 0
    capsys.readouterr()
    assert in_process('convert_prompt_cache', [tmp_path / 'preproc', out, '--check'], monkeypatch) == 0
    assert '20 read, all whole' in capsys.readouterr().err
    assert in_process('convert_prompt_cache', [out, tmp_path / 'again'], monkeypatch) == 1
    assert 'of our layout already' in capsys.readouterr().err
    dataset = ImagePrompt(
        str(tmp_path), cache_dir='converted', cache_datalist_path=str(tmp_path / 'preproc.jsonl.gz'), pad_seq_len=32
    )
    assert dataset[19]['name'] == TEXTS[19]


# -- latents


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(tmp_path / f'{number}.png')
    (tmp_path / 'list.txt').write_text(''.join(f'{number}.png {number % 3}\n' for number in range(10)))
    (tmp_path / 'names.txt').write_text("0: 'tench',\n")
    return tmp_path


def latents_arguments(folders, images, out, *more):
    where = ['--data-root', images, '--datalist-path', images / 'list.txt', '--out-data-root', images / out]
    vae = ['--vae', folders['Flux'] / 'vae', '--image-size', 32, '--batch-size', 4, '--shard-size', 4]
    return [*where, '--out-datalist-path', images / f'{out}.txt', *vae, *more]


def test_latents_in_both_layouts(folders, images, monkeypatch, capsys):
    tool = 'cache_imagenet_data_sdvae'
    assert in_process(tool, latents_arguments(folders, images, 'ours'), monkeypatch) == 0
    published = latents_arguments(folders, images, 'published', '--format', 'published', '--flip', 'none')
    assert in_process(tool, published, monkeypatch) == 0
    ours = ImageNet(str(images / 'ours'), 'none', str(images / 'names.txt'), random_flip=False)
    other = ImageNet(str(images / 'published'), str(images / 'published.txt'), str(images / 'names.txt'))
    assert ours[0]['latents'].shape == (4, 4, 4)
    assert LatentCache(images / 'ours').has_mirrored
    for index in range(10):
        assert torch.equal(ours[index]['latents'], other[index]['latents'])
        assert torch.equal(ours[index]['labels'], other[index]['labels'])
    for arguments in (latents_arguments(folders, images, 'ours'), published):
        assert in_process(tool, [*arguments, '--check'], monkeypatch) == 0
    path = images / 'published' / '3.pth'
    path.write_bytes(path.read_bytes()[:-50])
    capsys.readouterr()
    assert in_process(tool, [*published, '--check'], monkeypatch) == 1
    assert '3.pth cannot be read' in capsys.readouterr().err
    assert in_process(tool, [*published, '--flip', 'both'], monkeypatch) == 1
    path.unlink()
    capsys.readouterr()
    assert in_process(tool, published, monkeypatch) == 0
    assert '1 files were written, 9 were there' in capsys.readouterr().err
    assert in_process(tool, published, monkeypatch) == 0
    assert 'is finished' in capsys.readouterr().err


# -- processes


def kill_when(path_exists, tool, arguments):
    """Start a tool, and kill it when something exists."""
    command = [sys.executable, str(ROOT / 'tools' / f'{tool}.py'), *map(str, arguments)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not path_exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'it ended before it was killed'


@pytest.mark.slow
def test_killed_and_started_again(config, tmp_path):
    # so many that the kill, which follows the second of them at once, comes long before the last one
    texts = [f'{text}, number {number}' for number in range(16) for text in TEXTS[:5]]
    whole, killed = config(cache_dir='whole', texts=texts), config(cache_dir='killed', texts=texts)
    options = ['--batch-size', 1, '--shard-size', 1]
    run('cache_image_prompt_data', *whole, *options)
    folder = tmp_path / 'killed'
    kill_when(lambda: (folder / 'embeds-000001.safetensors').exists(), 'cache_image_prompt_data', [*killed, *options])
    assert not (folder / INDEX_FILE).exists()
    assert not (tmp_path / 'killed.jsonl.gz').exists()
    log = run('cache_image_prompt_data', *killed, *options)
    assert 'are there already and kept' in log
    assert content_of(folder) == content_of(tmp_path / 'whole')
    assert not [path for path in folder.iterdir() if '.tmp-' in path.name]


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['ours', 'published'])
def test_two_processes_make_the_same(layout, config, tmp_path):
    one, two = config(cache_dir='one'), config(cache_dir='two')
    options = ['--shard-size', 2, '--batch-size', 2, '--format', layout]
    run('cache_image_prompt_data', *one, *options)
    run('cache_image_prompt_data', *two, *options, '--launcher', 'pytorch', processes=2)
    first, second = open_prompt_cache(tmp_path / 'one'), open_prompt_cache(tmp_path / 'two')
    assert list(first.names) == list(second.names)
    for name in first.names:
        assert same_fields(first.stored(name).embeds, second.stored(name).embeds)
    assert (tmp_path / 'one.jsonl.gz').read_bytes() == (tmp_path / 'two.jsonl.gz').read_bytes()
    if layout == 'ours':
        assert content_of(tmp_path / 'one') == content_of(tmp_path / 'two')


@pytest.mark.slow
def test_latents_by_two_processes(folders, images):
    run('cache_imagenet_data_sdvae', *latents_arguments(folders, images, 'one'))
    run('cache_imagenet_data_sdvae', *latents_arguments(folders, images, 'two'), processes=2)
    assert content_of(images / 'one') == content_of(images / 'two')
    assert json.loads((images / 'two' / INDEX_FILE).read_text())['records'] == 10


def test_caches_on_s3(config, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'downloads'))
    where, datalist = f'{bucket}/data', f'{bucket}/data/preproc.jsonl.gz'
    options = [f'data.train.data_root={where}', f'data.train.cache_datalist_path={datalist}']
    given = [*config(), '--data', 'train', '--cfg-options', *options]
    assert in_process('cache_image_prompt_data', [*given, '--shard-size', 2], monkeypatch) == 0
    assert in_process('cache_image_prompt_data', [*given, '--check'], monkeypatch) == 0
    assert in_process('cache_image_prompt_data', [*config(), '--shard-size', 2], monkeypatch) == 0
    remote = ImagePrompt(where, cache_dir='preproc', cache_datalist_path=datalist, pad_seq_len=32)
    local = ImagePrompt(
        str(tmp_path), cache_dir='preproc', cache_datalist_path=str(tmp_path / 'preproc.jsonl.gz'), pad_seq_len=32
    )
    for index in (0, 7, 19):
        one, other = remote[index], local[index]
        assert one['name'] == other['name'] == TEXTS[index]
        assert same_fields(one['prompt_embed_kwargs'], other['prompt_embed_kwargs'])
