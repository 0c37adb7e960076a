"""Embedding the prompts of a data set, in both layouts, and the data set that reads them."""

import gzip
import hashlib
import json

import pytest
import torch
from torch import nn

from lakonlab.datasets.datalist import read_datalist
from lakonlab.datasets.datalist_writing import is_written, require_writable_datalist, write_datalist
from lakonlab.datasets.image_prompt import ImagePrompt
from lakonlab.datasets.prompt_cache import CacheError, open_prompt_cache
from lakonlab.datasets.prompt_cache.index import INDEX_FILE
from lakonlab.datasets.prompt_making import PromptEncoder, PromptItems, make_prompt_cache, unique_prompts
from lakonlab.datasets.published_making import make_published_cache
from lakonlab.ranks import ALONE
from tests.datasets.prompt_cache.caches import content_of, same_fields
from tests.datasets.prompt_files import json_source, text_source, write_images
from tests.processes import run_processes

WIDTH = 8
TEXTS = ['a cat', 'two dogs', 'a cat', 'the sea at night', 'a', 'two dogs', 'a cat', 'one more']


class Words(nn.Module):
    """Stands for a text encoder: a row for every word, padded to the longest prompt of the batch."""

    def __init__(self, masked=True):
        super().__init__()
        self.masked, self.seen = masked, []

    def forward(self, prompt):
        self.seen.extend(prompt)
        words = [text.split() for text in prompt]
        longest = max(map(len, words))
        states, mask = torch.zeros(len(prompt), longest, WIDTH), torch.zeros(len(prompt), longest, dtype=torch.int64)
        for row, text in enumerate(words):
            for column, word in enumerate(text):
                states[row, column], mask[row, column] = embedding(word), 1
        if self.masked:
            return {'encoder_hidden_states': states.bfloat16(), 'encoder_hidden_states_mask': mask}
        return {'encoder_hidden_states': states, 'pooled_projections': states.sum(1).bfloat16(), 'nothing': None}


def embedding(word):
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], 'little')
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


class Averages(nn.Module):
    """Stands for an autoencoder."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def encode(self, images, sample_mode, source):
        latents = nn.functional.avg_pool2d(images, 8)
        return latents + 0.1 * source.normal('vae_noise', latents.shape)


def items_of(folder, texts=TEXTS, rows=None, **options):
    source = text_source(folder, texts) if rows is None else json_source(folder, rows)
    return PromptItems(ImagePrompt(str(folder), prompt_dataset_kwargs=source, **{'latent_size': (16, 4, 6), **options}))


def make(items, folder, text_encoder=None, ranks=ALONE, **options):
    encoder = PromptEncoder(items, Words() if text_encoder is None else text_encoder, Averages(), seed=3, **options)
    return make_prompt_cache(
        encoder, str(folder), batch_size=2, rows_per_shard=3, plan={'text_encoder': 'words'}, ranks=ranks
    )


def make_published(items, folder, text_encoder=None, ranks=ALONE, plan='words', seed=3, **options):
    encoder = PromptEncoder(
        items, Words() if text_encoder is None else text_encoder, Averages(), **{'seed': seed, **options}
    )
    return make_published_cache(encoder, str(folder), batch_size=2, plan={'text_encoder': plan}, ranks=ranks)


def same_records(folder, other):
    """Whether two published caches say the same; the bytes of a pickle depend on where tensors were in memory."""
    first, second = open_prompt_cache(folder), open_prompt_cache(other)
    pairs = [(first.stored(name), second.stored(name)) for name in second.names]
    return list(first.names) == list(second.names) and all(
        one.prompt == another.prompt and same_fields(one.embeds, another.embeds) for one, another in pairs
    )


def test_every_prompt_is_embedded_once(tmp_path):
    words = Words()
    assert make(items_of(tmp_path), tmp_path / 'ours', words)
    assert words.seen == ['a cat', 'two dogs', 'the sea at night', 'a', 'one more']
    cache = open_prompt_cache(tmp_path / 'ours')
    assert [cache.record(name)['prompt'] for name in cache.names] == TEXTS


@pytest.mark.parametrize(
    ('precision', 'rounding'), [('fp8', 2**-4), ('bf16', 0), ('float32', 0)], ids=['fp8', 'bf16', 'float32']
)
def test_embeddings(precision, rounding, tmp_path):
    make(items_of(tmp_path), tmp_path / 'ours', precision=precision)
    cache = open_prompt_cache(tmp_path / 'ours')
    for name, text in zip(cache.names, TEXTS):
        found = cache.record(name)
        embeds = found['prompt_embed_kwargs']
        expected = torch.stack([embedding(word) for word in text.split()]).bfloat16().float()
        assert embeds['encoder_hidden_states_mask'].tolist() == [1] * len(text.split())
        absolute = float(expected.abs().max()) / 448 * 2**-9 if precision == 'fp8' else 0
        torch.testing.assert_close(embeds['encoder_hidden_states'], expected, rtol=rounding, atol=absolute)
        assert found['latent_size'] == (16, 4, 6)


def test_embeddings_without_mask_stay_whole(tmp_path):
    make(items_of(tmp_path, ['a cat', 'the sea at night']), tmp_path / 'ours', Words(masked=False))
    cache = open_prompt_cache(tmp_path / 'ours')
    record = cache.record('000000000000')['prompt_embed_kwargs']
    assert set(record) == {'encoder_hidden_states', 'pooled_projections'}
    assert record['encoder_hidden_states'].shape == (4, WIDTH)
    assert not record['encoder_hidden_states'][2:].any()


def test_both_layouts_say_the_same(tmp_path):
    items = items_of(tmp_path)
    make(items, tmp_path / 'ours')
    assert make_published(items, tmp_path / 'published') == len(TEXTS)
    ours, published = open_prompt_cache(tmp_path / 'ours'), open_prompt_cache(tmp_path / 'published')
    assert list(ours.names) == list(published.names)
    for name in ours.names:
        first, second = ours.record(name), published.record(name)
        assert first['prompt'] == second['prompt']
        assert first['latent_size'] == second['latent_size']
        for key, value in first['prompt_embed_kwargs'].items():
            assert torch.equal(value, second['prompt_embed_kwargs'][key])


def test_data_sets_read_what_was_made(tmp_path):
    items = items_of(tmp_path)
    make(items, tmp_path / 'ours')
    write_datalist(str(tmp_path / 'ours.jsonl.gz'), open_prompt_cache(tmp_path / 'ours').names)
    dataset = ImagePrompt(
        str(tmp_path), cache_dir='ours', cache_datalist_path=str(tmp_path / 'ours.jsonl.gz'), pad_seq_len=6, repeat=2
    )
    assert len(dataset) == 2 * len(TEXTS)
    item = dataset[7]
    assert item['name'] == TEXTS[3]
    assert item['latent_size'] == (16, 4, 6)
    assert item['prompt_embed_kwargs']['encoder_hidden_states'].shape == (6, WIDTH)
    assert item['prompt_embed_kwargs']['encoder_hidden_states_mask'].tolist() == [1, 1, 1, 1, 0, 0]


SIZED = [{'prompt': text, 'height': height, 'width': 48} for text, height in zip('abacd', [32, 64, 32, 64, 32])]


def test_sizes_and_buckets(tmp_path):
    items = items_of(tmp_path, rows=SIZED, bucketize=True)
    make(items, tmp_path / 'ours')
    cache = open_prompt_cache(tmp_path / 'ours')
    assert [cache.record(name)['latent_size'] for name in cache.names] == [(16, 4 * (1 + n % 2), 6) for n in range(5)]
    assert cache.bucket_ids() == [0, 1, 0, 1, 0]
    path = str(tmp_path / 'ours.jsonl')
    write_datalist(path, cache.names, items.bucket_ids)
    datalist = read_datalist(path, 'x')
    assert datalist.bucket_ids == [0, 1, 0, 1, 0]
    assert datalist.names == list(cache.names)


def test_latents_of_images(tmp_path):
    write_images(tmp_path / 'images', [(32, 48), (48, 32), (32, 48), (64, 32), (32, 48)])
    items = items_of(tmp_path, TEXTS[:5], image_dir='images')
    make(items, tmp_path / 'ours', latents_precision='float32')
    make_published(items, tmp_path / 'published')
    ours, published = open_prompt_cache(tmp_path / 'ours'), open_prompt_cache(tmp_path / 'published')
    for number, name in enumerate(ours.names):
        image = items.image(number, 'images')
        found = ours.record(name)
        assert 'latent_size' not in found
        assert found['latents'].shape == (3, image.shape[1] // 8, image.shape[2] // 8)
        distance = (found['latents'] - nn.functional.avg_pool2d(image[None], 8)[0]).std()
        assert 0.03 < distance < 0.3
        torch.testing.assert_close(published.record(name)['latents'], found['latents'], rtol=2**-4, atol=1e-4)
    assert [error for _, error in ours.check() if error] == []


def test_an_autoencoder_is_needed_for_images(tmp_path):
    write_images(tmp_path / 'images', [(32, 48)] * len(TEXTS))
    with pytest.raises(ValueError, match=r'images, but model\.vae is missing'):
        PromptEncoder(items_of(tmp_path, image_dir='images'), Words())


@pytest.mark.parametrize('stop_after', [0, 2, 3])
def test_interrupted_and_gone_on_with(stop_after, tmp_path):
    class Killed(Words):
        def forward(self, prompt):
            if len(self.seen) >= stop_after:
                raise KeyboardInterrupt
            return super().forward(prompt)

    items = items_of(tmp_path)
    make(items, tmp_path / 'whole')
    with pytest.raises(KeyboardInterrupt):
        make(items, tmp_path / 'ours', Killed())
    assert not (tmp_path / 'ours' / INDEX_FILE).exists()
    words = Words()
    assert make(items, tmp_path / 'ours', words)
    assert len(words.seen) == (5 if stop_after < 3 else 2)
    assert content_of(tmp_path / 'ours') == content_of(tmp_path / 'whole')
    assert not make(items, tmp_path / 'ours')


def test_published_records_that_are_whole_are_kept(tmp_path, caplog):
    items = items_of(tmp_path)
    make_published(items, tmp_path / 'whole')
    make_published(items, tmp_path / 'published')
    folder = tmp_path / 'published'
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / '000000000002.zst').unlink()
    truncated = folder / '000000000005.zst'
    truncated.write_bytes(truncated.read_bytes()[:-9])
    words = Words()
    assert make_published(items, folder, words) == 2
    assert words.seen == ['a cat', 'the sea at night', 'a', 'two dogs']  # the same batches as before
    assert '000000000005.zst' in caplog.text
    assert same_records(folder, tmp_path / 'whole')
    kept = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns == times[path.name]}
    assert len(kept) == len(TEXTS) - 2


def test_records_of_other_prompts_are_not_overwritten(tmp_path):
    items = items_of(tmp_path)
    make_published(items, tmp_path / 'published')
    before = content_of(tmp_path / 'published')
    with pytest.raises(CacheError, match=r"of the prompt 'a cat', expected 'another'.*nothing is overwritten"):
        make_published(items_of(tmp_path, ['another']), tmp_path / 'published')
    make(items, tmp_path / 'ours')
    with pytest.raises(CacheError, match='prompts_sha256'):
        make(items_of(tmp_path, ['another']), tmp_path / 'ours')
    assert content_of(tmp_path / 'published') == before


@pytest.mark.parametrize('changed', [{'plan': 'other words'}, {'precision': 'bf16'}, {'seed': 4}])
def test_published_records_made_differently_are_not_gone_on_with(changed, tmp_path):
    write_images(tmp_path / 'images', [(32, 48)] * len(TEXTS))
    items = items_of(tmp_path, image_dir='images')
    make_published(items, tmp_path / 'published')
    (tmp_path / 'published' / '000000000002.zst').unlink()
    before = content_of(tmp_path / 'published')
    key = next(iter(changed)).replace('plan', 'text_encoder')
    with pytest.raises(CacheError, match=rf'begun differently .*published\.plan\.json.*{key}'):
        make_published(items, tmp_path / 'published', **changed)
    assert content_of(tmp_path / 'published') == before
    assert make_published(items, tmp_path / 'published') == 1


def test_published_records_of_unknown_origin(tmp_path, caplog):
    """Without a plan beside them what records tell of themselves is compared, and the log says so."""
    items = items_of(tmp_path)
    make_published(items, tmp_path / 'published')
    (tmp_path / 'published.plan.json').unlink()
    with pytest.raises(CacheError, match='holds embeddings in fp8, expected bf16'):
        make_published(items, tmp_path / 'published', precision='bf16')
    write_images(tmp_path / 'images', [(32, 48)] * len(TEXTS))
    with pytest.raises(CacheError, match='holds no latents, expected latents'):
        make_published(items_of(tmp_path, image_dir='images'), tmp_path / 'published')
    caplog.clear()
    assert make_published(items, tmp_path / 'published', plan='other words') == 0
    assert 'nothing says what made them' in caplog.text
    assert not (tmp_path / 'published.plan.json').exists()


def test_damaged_plans_are_named(tmp_path):
    items = items_of(tmp_path)
    make(items, tmp_path / 'ours')
    make_published(items, tmp_path / 'published')
    for path, again in ((tmp_path / 'ours' / 'plan.json', make), (tmp_path / 'published.plan.json', make_published)):
        for content in (path.read_bytes()[:-5], b'\xff' + path.read_bytes(), b'[]'):
            path.write_bytes(content)
            with pytest.raises(CacheError, match=rf'{path.name} is damaged'):
                again(items, tmp_path / path.name.removesuffix('.plan.json').replace('plan.json', 'ours'))


def test_a_write_that_fails_is_raised(tmp_path, monkeypatch):
    from lakonlab.datasets import published_making

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(published_making, 'write_published_record', full)
    with pytest.raises(OSError, match='No space left'):
        make_published(items_of(tmp_path, ['only one']), tmp_path / 'published')


def test_encoders_that_return_something_else(tmp_path):
    class Wrong(Words):
        def forward(self, prompt):
            return {'encoder_hidden_states': torch.ones(1, 2, 3)}

    with pytest.raises(CacheError, match='encoder_hidden_states that is no tensor with a row for each prompt'):
        make(items_of(tmp_path), tmp_path / 'ours', Wrong())


def test_equal_prompts(tmp_path):
    unique = unique_prompts(items_of(tmp_path), show=False)
    assert unique.first.tolist() == [0, 1, 3, 4, 7]
    assert unique.row.tolist() == [0, 1, 0, 2, 3, 1, 0, 4]
    assert unique.digest == unique_prompts(items_of(tmp_path), show=False).digest
    assert unique.digest != unique_prompts(items_of(tmp_path, TEXTS[::-1]), show=False).digest


@pytest.mark.parametrize('suffix', ['.json', '.jsonl', '.jsonl.gz'])
def test_datalists(suffix, tmp_path):
    path = tmp_path / f'list{suffix}'
    names = ['000000000000', '000000000001']
    write_datalist(str(path), names)
    assert read_datalist(path, 'x').names == names
    first = path.read_bytes()
    write_datalist(str(path), names)
    assert path.read_bytes() == first
    if suffix == '.jsonl.gz':
        assert json.loads(gzip.decompress(first).splitlines()[1]) == {'filename': '000000000001'}
    with pytest.raises(ValueError, match=r'list\.txt'):
        write_datalist(str(tmp_path / 'list.txt'), names)
    assert is_written(str(path), names, None, 'x')
    for other in (names[:1], names[::-1]):
        with pytest.raises(CacheError, match='lists other records'):
            is_written(str(path), other, None, 'x')
    assert not is_written(str(tmp_path / 'missing.json'), names, None, 'x')


def test_lists_that_have_no_place_for_buckets():
    require_writable_datalist('list.jsonl', has_buckets=True)
    with pytest.raises(ValueError, match=r"list\.json': bucketize=True needs"):
        require_writable_datalist('list.json', has_buckets=True)


def _make(ranks, folder):
    items = items_of(folder)
    return make(items, folder / 'two', ranks=ranks), make_published(items, folder / 'two published', ranks=ranks)


@pytest.mark.slow
def test_two_processes_make_the_same(tmp_path):
    items = items_of(tmp_path)
    make(items, tmp_path / 'one')
    make_published(items, tmp_path / 'one published')
    assert run_processes(_make, 2, tmp_path) == [(True, len(TEXTS))] * 2
    assert content_of(tmp_path / 'two') == content_of(tmp_path / 'one')
    assert same_records(tmp_path / 'two published', tmp_path / 'one published')
