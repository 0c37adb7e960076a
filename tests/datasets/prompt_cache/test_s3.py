"""Caches on an S3 server: made there, read from there, by rows and by whole shards."""

import pickle

import numpy as np
import pytest
import torch

from lakonlab.datasets.latent_cache import LatentCache
from lakonlab.datasets.prompt_cache import CacheError, open_prompt_cache, read_embeds, store, write_embeds
from lakonlab.datasets.prompt_cache.index import INDEX_FILE, LATENTS, Table, pack_texts
from lakonlab.datasets.prompt_cache.published import PublishedPromptCache
from lakonlab.datasets.prompt_cache.writer import CacheWriter
from lakonlab.datasets.prompt_converting import convert_prompt_cache
from lakonlab.storage import files
from tests.datasets.prompt_cache.caches import content_of, normal, qwen_record, same_fields, write_published

RECORDS = [qwen_record(number % 5, tokens=3 + number % 5) for number in range(9)]


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    folder = tmp_path / 'downloads'
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(folder))
    return folder


@pytest.fixture
def source(tmp_path):
    return PublishedPromptCache(str(write_published(tmp_path / 'published', RECORDS)))


def test_prompts(bucket, source, tmp_path, downloads):
    folder = f'{bucket}/data/ours'
    convert_prompt_cache(source, folder, 4)
    convert_prompt_cache(source, str(tmp_path / 'local'), 4)
    local = content_of(tmp_path / 'local')
    assert {name: files.read_bytes(files.join(folder, name)) for name in files.list_names(folder)} == local
    cache = pickle.loads(pickle.dumps(open_prompt_cache(folder)))
    for name in source.names:
        assert cache.stored(name).prompt == source.stored(name).prompt
        assert same_fields(cache.stored(name).embeds, open_prompt_cache(tmp_path / 'local').stored(name).embeds)
    assert [error for _, error in cache.check() if error] == []
    assert not convert_prompt_cache(source, folder, 4)


def test_rows_are_read_without_their_shards(bucket, source, downloads):
    folder = f'{bucket}/ours'
    convert_prompt_cache(source, folder, 4)
    cache = open_prompt_cache(folder)
    cache.embeds.whole = False
    names = list(cache.names)
    found = cache.records(names)
    assert [record['prompt'] for record in found] == [record['prompt'] for record in RECORDS]
    assert not downloads.exists()
    assert all(shard._map is None for shard in cache.embeds._open.values())


@pytest.fixture
def requests(monkeypatch):
    """Names of the requests that are sent."""
    from lakonlab.storage import s3

    sent, send = [], s3.request

    def counted(path, name, **arguments):
        sent.append(name)
        return send(path, name, **arguments)

    monkeypatch.setattr(s3, 'request', counted)
    return sent


def test_a_record_takes_a_request(bucket, source, downloads, requests, monkeypatch):
    folder = f'{bucket}/ours'
    convert_prompt_cache(source, folder, 3)
    cache = open_prompt_cache(folder)
    cache.embeds.whole = False
    names = list(cache.names)
    requests.clear()
    cache.records([names[0], names[4], names[1], names[8]])
    assert len(requests) == 4 + 2  # the records, and the tables of two shards: equal prompts are stored once
    requests.clear()
    cache.records(names)
    assert len(requests) == len(names)
    monkeypatch.setattr(store, 'MAX_OPEN_SHARDS', 1)
    cache.embeds._open.clear()
    for name, count in ((names[0], 2), (names[1], 1), (names[4], 2), (names[3], 1), (names[0], 2)):
        requests.clear()
        cache.record(name)
        assert len(requests) == count, name
    assert not downloads.exists()


def test_the_shard_that_was_not_used_for_longest_is_closed(source, tmp_path, monkeypatch):
    convert_prompt_cache(source, str(tmp_path / 'ours'), 1)
    monkeypatch.setattr(store, 'MAX_OPEN_SHARDS', 2)
    cache = open_prompt_cache(tmp_path / 'ours')
    for number in (0, 1, 0, 2):
        cache.record(cache.names[number])
    assert list(cache.embeds._open) == [0, 2]


def test_damage_is_found(bucket, source, downloads):
    folder = f'{bucket}/ours'
    convert_prompt_cache(source, folder, 4)
    path = f'{folder}/embeds-000001.safetensors'
    content = bytearray(files.read_bytes(path))
    shard = open_prompt_cache(folder).embeds.shard(1)
    content[shard.begin_of('encoder_hidden_states') + int(shard.entry('encoder_hidden_states', 0)[0])] ^= 1
    files.write_bytes(path, bytes(content))
    for whole in (False, True):
        cache = open_prompt_cache(folder)
        cache.embeds.whole = whole
        assert cache.record('000000000001')['prompt'] == 'prompt 1'
        with pytest.raises(CacheError, match=r'embeds-000001\.safetensors is damaged'):
            cache.record('000000000004')
    files.remove_file(path)
    cache = open_prompt_cache(folder)
    cache.embeds.whole = False
    with pytest.raises(CacheError, match=r'embeds-000001\.safetensors is missing'):
        cache.record('000000000004')


def test_interrupted_and_gone_on_with(bucket, source, downloads, monkeypatch):
    folder = f'{bucket}/ours'
    stored = PublishedPromptCache.stored

    def failing(self, name):
        if name == '000000000006':
            raise KeyboardInterrupt
        return stored(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(PublishedPromptCache, 'stored', failing)
        with pytest.raises(KeyboardInterrupt):
            convert_prompt_cache(source, folder, 4)
    assert not files.is_file(f'{folder}/{INDEX_FILE}')
    assert 'embeds-000000.safetensors' in files.list_names(folder)
    with pytest.raises(CacheError, match='not finished'):
        open_prompt_cache(folder)
    assert convert_prompt_cache(source, folder, 4)
    assert [error for _, error in open_prompt_cache(folder).check() if error] == []


def test_published_layout(bucket, source, tmp_path, downloads):
    files.upload(source.folder, f'{bucket}/published')
    cache = open_prompt_cache(f'{bucket}/published')
    assert list(cache.names) == list(source.names)
    assert same_fields(cache.stored(cache.names[3]).embeds, source.stored(cache.names[3]).embeds)
    with pytest.raises(CacheError, match=r'000000000099\.zst is missing'):
        cache.record('000000000099')


def test_latents(bucket, downloads):
    folder = f'{bucket}/latents'
    latents = normal(10, 4, 8, 8)
    writer = CacheWriter(folder, LATENTS, 10, {LATENTS: Table(10, 4)}, {})
    writer.start()
    writer.fill(LATENTS, lambda numbers: [{'latents': latents[number]} for number in numbers], 4, 'x', compressed=False)
    columns = {'labels': np.arange(10), **pack_texts([f'{number}.png' for number in range(10)], 'paths')}
    writer.finish({'columns': ['latents']}, columns)
    cache = LatentCache(folder)
    assert torch.equal(cache.batch([9, 0, 5]), latents[[9, 0, 5]])
    assert torch.equal(cache.latents(7), latents[7])
    assert downloads.exists()  # rows this small come with their shard
    cache.store.whole = False
    cache.store._open.clear()
    assert torch.equal(cache.batch([9, 0, 5]), latents[[9, 0, 5]])


def test_negative_prompts(bucket):
    path = f'{bucket}/empty.pth'
    write_embeds(path, {'encoder_hidden_states': normal(3, 4)}, 'float32')
    assert torch.equal(read_embeds(path)['encoder_hidden_states'], normal(3, 4))
    with pytest.raises(CacheError, match='cache_negative_prompt'):
        read_embeds(f'{bucket}/missing.pth')
