"""A converted cache says what the published one said, in fewer bytes."""

import pytest

from lakonlab.datasets.collate import pad_tokens
from lakonlab.datasets.prompt_cache import CacheError, open_prompt_cache
from lakonlab.datasets.prompt_cache.index import INDEX_FILE
from lakonlab.datasets.prompt_cache.published import PublishedPromptCache
from lakonlab.datasets.prompt_converting import compare, convert_prompt_cache
from tests.datasets.prompt_cache.caches import (
    content_of,
    flux_record,
    normal,
    published_fp8,
    qwen_record,
    write_published,
)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def with_latents(number):
    latents, scale = published_fp8(normal(4, 3, 2, seed=number))
    record = flux_record(number % 5)
    del record['latent_size']
    return {**record, 'latents': latents, 'latents_scale': scale}


RECORDS = {
    'qwen': [qwen_record(number % 7, tokens=3 + number % 7) for number in range(20)],
    'flux': [flux_record(number % 9) for number in range(20)],
    'sizes': [qwen_record(number % 5, latent_size=(4, 2 + number, 3)) for number in range(11)],
    'latents': [with_latents(number) for number in range(11)],
}


@pytest.fixture(params=RECORDS)
def published(request, tmp_path):
    return PublishedPromptCache(str(write_published(tmp_path / 'published', RECORDS[request.param])))


def test_converted_caches_say_the_same(published, tmp_path):
    assert convert_prompt_cache(published, str(tmp_path / 'ours'), 4)
    ours = open_prompt_cache(tmp_path / 'ours')
    assert list(ours.names) == list(published.names)
    assert [error for _, error in compare(published, ours) if error] == []
    assert [error for _, error in ours.check() if error] == []
    for name in published.names:
        before, after = published.record(name), ours.record(name)
        assert before['prompt'] == after['prompt']
        assert before.get('latent_size') == after.get('latent_size')
        for key, value in before['prompt_embed_kwargs'].items():
            found = after['prompt_embed_kwargs'][key]
            padded = pad_tokens(found, len(value)) if found.dim() and 'pooled' not in key else found
            assert padded.dtype == value.dtype
            assert padded.tolist() == value.tolist()
        if 'latents' in before:
            assert before['latents'].tolist() == after['latents'].tolist()


@pytest.mark.parametrize('names', [None, ['000000000004', '000000000001', '000000000009']])
def test_names(names, tmp_path):
    source = PublishedPromptCache(str(write_published(tmp_path / 'published', RECORDS['flux'])), names)
    convert_prompt_cache(source, str(tmp_path / 'ours'), 2)
    ours = open_prompt_cache(tmp_path / 'ours')
    assert list(ours.names) == list(source.names)
    assert [ours.record(name)['prompt'] for name in ours.names] == [
        source.record(name)['prompt'] for name in ours.names
    ]


def test_equal_prompts_are_stored_once(tmp_path):
    different = [qwen_record(number) for number in range(4)]
    once = PublishedPromptCache(str(write_published(tmp_path / 'once', different)))
    often = PublishedPromptCache(str(write_published(tmp_path / 'often', different * 25)))
    convert_prompt_cache(once, str(tmp_path / 'ours once'), 100)
    convert_prompt_cache(often, str(tmp_path / 'ours often'), 100)
    assert read_rows(tmp_path / 'ours often') == [number % 4 for number in range(100)]
    assert data_bytes(tmp_path / 'ours often') == data_bytes(tmp_path / 'ours once')


def read_rows(folder):
    cache = open_prompt_cache(folder)
    return [cache.embeds_row(number) for number in range(len(cache))]


def data_bytes(folder):
    cache = open_prompt_cache(folder)
    shard = cache.embeds.shard(0)
    return int(
        sum(shard.stored_bytes(name).sum() for name in shard.columns if name != 'digest' and name != 'latent_size')
    )


@pytest.mark.parametrize('fail_at', [0, 3, 9, 17])
def test_interrupted_and_gone_on_with(fail_at, tmp_path, monkeypatch):
    source = PublishedPromptCache(str(write_published(tmp_path / 'published', RECORDS['qwen'])))
    convert_prompt_cache(source, str(tmp_path / 'whole'), 3)
    stored, count = PublishedPromptCache.stored, []

    def failing(self, name):
        if int(name) == fail_at and len(count) > 0:
            raise KeyboardInterrupt
        count.append(name)
        return stored(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(PublishedPromptCache, 'stored', failing)
        with pytest.raises(KeyboardInterrupt):
            convert_prompt_cache(source, str(tmp_path / 'ours'), 3, batch_size=2)
    assert not (tmp_path / 'ours' / INDEX_FILE).exists()
    assert convert_prompt_cache(source, str(tmp_path / 'ours'), 3, batch_size=2)
    assert content_of(tmp_path / 'ours') == content_of(tmp_path / 'whole')
    assert not convert_prompt_cache(source, str(tmp_path / 'ours'), 3)


def test_damaged_records_are_named_and_nothing_is_finished(tmp_path):
    folder = write_published(tmp_path / 'published', RECORDS['qwen'])
    path = folder / '000000000011.zst'
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CacheError, match=r'000000000011\.zst'):
        convert_prompt_cache(PublishedPromptCache(str(folder)), str(tmp_path / 'ours'), 4)
    assert not (tmp_path / 'ours' / INDEX_FILE).exists()


def test_comparison_finds_what_differs(tmp_path):
    folder = write_published(tmp_path / 'published', RECORDS['qwen'])
    source = PublishedPromptCache(str(folder))
    convert_prompt_cache(source, str(tmp_path / 'ours'), 4)
    write_published(tmp_path / 'changed', [*RECORDS['qwen'][:5], qwen_record(99), *RECORDS['qwen'][6:]])
    changed = PublishedPromptCache(str(tmp_path / 'changed'))
    differing = [name for name, error in compare(changed, open_prompt_cache(tmp_path / 'ours')) if error]
    assert differing == ['000000000005']


@pytest.mark.parametrize('first_has_latents', [True, False])
def test_records_with_other_latents_than_the_first_are_named(first_has_latents, tmp_path):
    plain = [flux_record(number) for number in range(3)]
    records = [with_latents(0), *plain] if first_has_latents else [*plain, with_latents(0)]
    source = PublishedPromptCache(str(write_published(tmp_path / 'published', records)))
    differing = '000000000001' if first_has_latents else '000000000003'
    with pytest.raises(CacheError, match=rf'{differing}\.zst has (no )?latents'):
        convert_prompt_cache(source, str(tmp_path / 'ours'), 2)
    assert not (tmp_path / 'ours' / INDEX_FILE).exists()


def test_another_cache_is_not_overwritten(tmp_path):
    first = PublishedPromptCache(str(write_published(tmp_path / 'first', RECORDS['qwen'])))
    second = PublishedPromptCache(str(write_published(tmp_path / 'second', RECORDS['flux'])))
    convert_prompt_cache(first, str(tmp_path / 'ours'), 4)
    with pytest.raises(CacheError, match='Nothing is overwritten'):
        convert_prompt_cache(second, str(tmp_path / 'ours'), 4)
