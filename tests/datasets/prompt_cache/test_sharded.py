"""Our layout: what is written is read back bit for bit, damage is found and named, what is unfinished is not read."""

import json
import multiprocessing
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.datasets.collate import pad_tokens
from lakonlab.datasets.prompt_cache import CacheError, is_prompt_cache, open_prompt_cache
from lakonlab.datasets.prompt_cache.index import INDEX_FILE, PLAN_FILE, RECORDS_FILE, digest_of, read_index
from lakonlab.datasets.prompt_cache.record import quantise, without_padding
from lakonlab.datasets.prompt_cache.rows import ABSENT, RAW, TRANSPOSED, ZSTD, checksum, decode, encode
from lakonlab.datasets.prompt_cache.shard import Shard, read_info
from tests.datasets.prompt_cache.caches import normal, raw, same_fields, write_ours

FORMS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8]


@settings(max_examples=60)
@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(0, 6), max_size=4),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_rows(dtype, shape, compressed, seed):
    value = normal(*shape, seed=seed).mul(3).to(dtype)
    row = encode(value, compressed)
    found = decode(row.content, row.codec, row.dtype, row.shape, 'x')
    assert raw(found) == raw(value)
    assert len(row.content) <= value.numel() * value.element_size()
    assert compressed or row.codec == RAW


def test_rows_of_tokens_that_resemble_each_other_are_compressed_channel_by_channel():
    states = (normal(1, 256) + 0.01 * normal(128, 256, seed=1)).to(torch.float8_e4m3fn)
    assert encode(states).codec == TRANSPOSED
    assert encode(torch.ones(512, dtype=torch.int64)).codec == ZSTD
    assert encode(None).dtype == ABSENT
    assert decode(b'', RAW, ABSENT, (), 'x') is None


def qwen_rows(count=8):
    """Fields of prompts of different lengths."""
    rows = []
    for number in range(count):
        tokens = 3 + number % 4
        mask = torch.zeros(9, dtype=torch.int64)
        mask[:tokens] = 1
        states = normal(9, 24, seed=number) * mask[:, None]
        fields = quantise({'encoder_hidden_states': states, 'encoder_hidden_states_mask': mask}, 'fp8')
        rows.append(without_padding(fields))
    return rows


@pytest.fixture
def cache_of(tmp_path):
    def make(rows=None, **options):
        return write_ours(tmp_path / 'cache', qwen_rows() if rows is None else rows, **options)

    return make


def test_round_trip(cache_of):
    rows = qwen_rows()
    folder = cache_of(rows)
    cache = open_prompt_cache(folder)
    assert cache.kind == 'ours'
    assert len(cache) == 8
    for number, name in enumerate(cache.names):
        record = cache.stored(name)
        assert record.prompt == f'prompt {number}'
        assert same_fields(record.embeds, rows[number])
    assert [record['prompt'] for record in cache.records(list(cache.names[2:4]))] == ['prompt 2', 'prompt 3']


def test_masks_are_stored_and_padding_is_not(cache_of):
    cache = open_prompt_cache(cache_of())
    record = cache.record('000000000000')['prompt_embed_kwargs']
    assert record['encoder_hidden_states_mask'].tolist() == [1, 1, 1]
    assert record['encoder_hidden_states'].shape == (3, 24)
    padded = pad_tokens(record['encoder_hidden_states_mask'], 9)
    assert padded.tolist() == [1] * 3 + [0] * 6


def test_padding_inside_and_none_at_all():
    states = torch.arange(8.0).reshape(4, 2)
    inside = without_padding({'a': states, 'a_mask': torch.tensor([1, 0, 1, 0])})
    assert inside['a'].tolist() == states[:3].tolist()
    assert inside['a_mask'].tolist() == [1, 0, 1]
    nothing = without_padding({'a': states, 'a_mask': torch.zeros(4, dtype=torch.int64)})
    assert nothing['a'].shape == (1, 2)
    assert without_padding({'a': states, 'b_mask': torch.zeros(4)})['a'].shape == (4, 2)
    assert without_padding({'a': states})['a'].shape == (4, 2)


def test_shards_are_safetensors(cache_of):
    folder = cache_of()
    for path in sorted(folder.glob('embeds-*.safetensors')):
        with safetensors.safe_open(path, 'pt') as file:
            names = set(file.keys())
            rows = file.get_tensor('encoder_hidden_states.rows')
            data = file.get_tensor('.data').numpy()
        assert {'prompt.rows', 'encoder_hidden_states_mask.rows'} <= names
        start, length, expected, codec, dtype, *shape = rows[0].tolist()
        content = data[start : start + length].tobytes()
        assert checksum(content, 0, codec, dtype, shape) == expected


def test_equal_embeddings_are_stored_once(tmp_path):
    rows = qwen_rows(2)
    embeds_row = np.array([0, 1, 0, 0, 1])
    folder = write_ours(tmp_path / 'cache', rows)
    index = read_index(str(folder), 'prompts')
    index.records, index.columns = 5, {'embeds_row': embeds_row, 'bucket_ids': np.arange(5)}
    index.write(str(folder))
    cache = open_prompt_cache(folder)
    assert [cache.stored(name).prompt for name in cache.names] == [f'prompt {row}' for row in embeds_row]
    assert cache.bucket_ids() == [0, 1, 2, 3, 4]
    assert all(error is None for _, error in cache.check())


def test_names(cache_of):
    folder = cache_of()
    names = ['000000000005', '000000000001']
    cache = open_prompt_cache(folder, names)
    assert [cache.record(name)['prompt'] for name in cache.names] == ['prompt 5', 'prompt 1']
    with pytest.raises(CacheError, match='lacks 1 of 2 records, the first is 000000000008'):
        open_prompt_cache(folder, ['000000000001', '000000000008'])
    for name in ('x', '1', '-00000000001', '000000000099'):
        with pytest.raises(CacheError, match='no record'):
            cache.record(name)
    everything = open_prompt_cache(folder).names
    assert list(everything[-2:]) == ['000000000006', '000000000007']
    assert everything[-1] == '000000000007'
    with pytest.raises(IndexError):
        everything[8]


def _read(cache, names, queue):
    queue.put([cache.record(name)['prompt_embed_kwargs']['encoder_hidden_states'].tolist() for name in names])


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_other_processes(method, cache_of):
    cache = open_prompt_cache(cache_of())
    first = cache.record(cache.names[0])
    assert len(pickle.dumps(cache)) < 10_000
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read, args=(cache, list(cache.names[:2]), queue))
    process.start()
    found = queue.get(timeout=60)
    process.join()
    assert found[0] == first['prompt_embed_kwargs']['encoder_hidden_states'].tolist()


def test_many_open_shards_need_no_file_descriptors(tmp_path):
    resource = pytest.importorskip('resource')
    cache = open_prompt_cache(write_ours(tmp_path / 'cache', qwen_rows(64), rows_per_shard=1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path('/proc/self/fd').iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, limits[1]))
    try:
        assert len(cache.records(list(cache.names))) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# -- damage


def damage_everywhere(path, step):
    """Every ``step``-th byte of a file flipped, one at a time."""
    content = path.read_bytes()
    for position in range(0, len(content), step):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        yield position
    path.write_bytes(content)


def used_bytes(path):
    """Ranges of a shard that hold anything: the head and the rows, not what aligns them."""
    info, _ = read_info(str(path))
    used = np.zeros(info.bytes, dtype=bool)
    used[: info.head_bytes] = True
    shard = Shard(str(path), info)
    for column in shard.columns:
        for start, length in shard._tables[column][:, :2].tolist():
            first = shard.begin_of(column) + start
            used[first : first + length] = True
    return used


def test_flipped_bits_are_found_and_named(cache_of):
    folder = cache_of()
    path = folder / 'embeds-000001.safetensors'
    used = used_bytes(path)
    for position in damage_everywhere(path, 11):
        cache = open_prompt_cache(folder)
        damaged = {name: error for name, error in cache.check() if error is not None}
        if not used[position]:
            assert not damaged
            continue
        assert damaged, position
        assert all('embeds-000001.safetensors' in str(error) for error in damaged.values())
        names = [f'00000000000{number}' for number in (3, 4, 5)]
        assert all(any(name in where for name in names) for where in damaged)
        intact = [name for name in cache.names if not any(name in where for where in damaged)]
        assert all(cache.record(name) for name in intact)


def test_a_damaged_row_is_named_and_the_others_are_read(cache_of):
    folder = cache_of()
    path = folder / 'embeds-000001.safetensors'
    info, _ = read_info(str(path))
    shard = Shard(str(path), info)
    start = shard.begin_of('encoder_hidden_states') + int(shard.entry('encoder_hidden_states', 1)[0])
    del shard
    content = bytearray(path.read_bytes())
    content[start] ^= 4
    path.write_bytes(content)
    cache = open_prompt_cache(folder)
    with pytest.raises(CacheError, match=r'encoder_hidden_states of record 000000000004 in .*embeds-000001'):
        cache.record('000000000004')
    assert cache.record('000000000003')['prompt'] == 'prompt 3'
    assert [where for where, error in cache.check() if error] == [f'embeddings of record 000000000004 in {path}']


@pytest.mark.parametrize('keep', [0, 4, 100, -1])
def test_truncated_shards_are_found_and_named(keep, cache_of):
    folder = cache_of()
    path = folder / 'embeds-000001.safetensors'
    path.write_bytes(path.read_bytes()[:keep])
    cache = open_prompt_cache(folder)
    assert cache.record('000000000000')['prompt'] == 'prompt 0'
    with pytest.raises(CacheError, match='embeds-000001'):
        cache.record('000000000004')
    assert sum(error is not None for _, error in cache.check()) == 3


def test_missing_shards_are_named(cache_of):
    folder = cache_of()
    (folder / 'embeds-000001.safetensors').unlink()
    with pytest.raises(CacheError, match=r'embeds-000001.safetensors is missing'):
        open_prompt_cache(folder).record('000000000004')


def test_exchanged_shards_are_found(cache_of):
    folder = cache_of(qwen_rows(6) * 1)
    first, second = (folder / f'embeds-00000{number}.safetensors' for number in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(CacheError, match='embeds-000000'):
        open_prompt_cache(folder).record('000000000000')


def test_flipped_bits_of_the_index_are_found(cache_of):
    folder = cache_of(names_of_no_use=np.arange(3))
    for name in (INDEX_FILE, RECORDS_FILE):
        errors = []
        for _ in damage_everywhere(folder / name, 5):
            errors.append(_error_of_opening(folder))
        found = [error for error in errors if error is not None]
        assert all(name in error or 'version' in error for error in found)
        # only blanks between the values of JSON are of no meaning
        assert len(found) == len(errors) if name == RECORDS_FILE else len(found) > len(errors) / 2


def _error_of_opening(folder):
    try:
        open_prompt_cache(folder)
    except CacheError as error:
        return str(error)
    return None


def test_what_is_not_finished_is_no_cache(cache_of):
    folder = cache_of()
    (folder / INDEX_FILE).unlink()
    with pytest.raises(CacheError, match='not finished'):
        open_prompt_cache(folder)
    (folder / PLAN_FILE).unlink()
    with pytest.raises(CacheError, match='no record'):
        open_prompt_cache(folder)


def test_is_prompt_cache(cache_of, tmp_path):
    assert is_prompt_cache(cache_of())
    assert not is_prompt_cache(tmp_path / 'nowhere')


def test_later_versions_are_refused(cache_of):
    folder = cache_of()
    value = json.loads((folder / INDEX_FILE).read_text())
    del value['sha256']
    value['version'] = 2
    (folder / INDEX_FILE).write_text(json.dumps({**value, 'sha256': digest_of(value)}))
    with pytest.raises(CacheError, match='update'):
        open_prompt_cache(folder)


def test_caches_of_another_kind_are_refused(cache_of):
    with pytest.raises(CacheError, match='a cache of prompts, expected one of latents'):
        read_index(str(cache_of()), 'latents')


def test_checksums_are_those_of_zlib():
    assert checksum(b'abc', 1, RAW, 0, [3]) == zlib.crc32(b'1:0:0:[3]', zlib.crc32(b'abc'))
