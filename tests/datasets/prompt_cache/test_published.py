"""The published layout, made here from its specification."""

import contextlib
import os
import pickle

import pytest
import safetensors.torch
import torch
import zstandard

from lakonlab.datasets.collate import pad_tokens
from lakonlab.datasets.prompt_cache import CacheError, open_prompt_cache, read_embeds, write_embeds
from lakonlab.datasets.prompt_cache.published import PublishedPromptCache, write_published_record
from lakonlab.datasets.prompt_cache.record import quantise, record_of
from tests.datasets.prompt_cache.caches import (
    compressed,
    flux_record,
    normal,
    published_fp8,
    qwen_record,
    raw,
    same_fields,
    write_published,
)

NAME = '000000000000'


def only_record(folder, record, **options):
    return open_prompt_cache(write_published(folder, [record], **options)).record(NAME)


@pytest.mark.parametrize('protocol', [2, 4, 5])
@pytest.mark.parametrize('make', [qwen_record, flux_record])
def test_records(make, protocol, tmp_path):
    stored = make()
    record = only_record(tmp_path, stored, protocol=protocol)
    embeds = stored['prompt_embed_kwargs']
    assert record['prompt'] == 'prompt 0'
    assert record['latent_size'] == (16, 8, 8)
    found = record['prompt_embed_kwargs']
    assert set(found) == {name for name in embeds if not name.endswith('_scale')}
    expected = embeds['encoder_hidden_states'].float() * embeds['encoder_hidden_states_scale']
    assert torch.equal(found['encoder_hidden_states'], expected)
    if make is qwen_record:
        assert torch.equal(found['encoder_hidden_states_mask'], embeds['encoder_hidden_states_mask'])
    else:
        assert found['pooled_projections'].dtype == torch.float32
        assert torch.equal(found['pooled_projections'], embeds['pooled_projections'].float())


def test_latents_and_conditions(tmp_path):
    latents, condition = normal(4, 6, 5), normal(4, 3, 3, seed=1)
    record = qwen_record()
    del record['latent_size']
    record['latents'], record['latents_scale'] = published_fp8(latents)
    record['condition_latents'], record['condition_latents_scale'] = published_fp8(condition)
    found = only_record(tmp_path, record)
    assert 'latent_size' not in found
    assert torch.equal(found['latents'], record['latents'].float() * record['latents_scale'])
    torch.testing.assert_close(found['latents'], latents, rtol=2**-4, atol=float(record['latents_scale']) * 2**-9)
    assert torch.equal(
        found['condition_latents'], record['condition_latents'].float() * record['condition_latents_scale']
    )


def test_older_flat_names(tmp_path):
    newer = flux_record()
    embeds = newer['prompt_embed_kwargs']
    older = {
        'prompt': newer['prompt'],
        'prompt_embeds': embeds['encoder_hidden_states'],
        'prompt_embeds_scale': float(embeds['encoder_hidden_states_scale']),
        'pooled_prompt_embeds': embeds['pooled_projections'],
        'prompt_embeds_mask': torch.ones(20, dtype=torch.int64),
    }
    first = only_record(tmp_path / 'older', older)['prompt_embed_kwargs']
    second = only_record(tmp_path / 'newer', newer)['prompt_embed_kwargs']
    assert first.pop('encoder_hidden_states_mask').tolist() == [1] * 20
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_unquantised_records(tmp_path):
    states = normal(5, 8).bfloat16()
    record = {'prompt': 'x', 'prompt_embed_kwargs': {'encoder_hidden_states': states}}
    assert torch.equal(only_record(tmp_path, record)['prompt_embed_kwargs']['encoder_hidden_states'], states.float())


def test_names_and_order(tmp_path):
    folder = write_published(tmp_path, [qwen_record(number) for number in range(4)])
    (folder / 'note.txt').write_text('no record')
    cache = open_prompt_cache(folder)
    assert list(cache.names) == [f'{number:012d}' for number in range(4)]
    chosen = pickle.loads(pickle.dumps(open_prompt_cache(folder, [cache.names[3], cache.names[1]])))
    assert len(chosen) == 2
    assert [record['prompt'] for record in chosen.records(chosen.names)] == ['prompt 3', 'prompt 1']


@pytest.mark.parametrize('keep', [0, 1, 10, 100, -1])
def test_truncated_records_are_named(keep, tmp_path):
    folder = write_published(tmp_path, [qwen_record(number) for number in range(3)])
    path = folder / '000000000001.zst'
    path.write_bytes(path.read_bytes()[:keep])
    cache = open_prompt_cache(folder)
    with pytest.raises(CacheError, match=r'000000000001\.zst'):
        cache.record('000000000001')
    damaged = {name: error for name, error in cache.check() if error is not None}
    assert list(damaged) == [str(path)]


def test_missing_records_are_named(tmp_path):
    cache = open_prompt_cache(write_published(tmp_path, [qwen_record()]), [NAME, '000000000007'])
    with pytest.raises(CacheError, match=r'000000000007\.zst is missing'):
        cache.record('000000000007')


def test_flipped_bits_of_streams_with_checksum_are_found(tmp_path):
    """Streams that are written here have one, which every reader of zstandard compares."""
    content = write_published_record(record_of(flux_record(), 'x'))
    path = tmp_path / f'{NAME}.zst'
    path.write_bytes(content)
    cache = open_prompt_cache(tmp_path)
    whole = cache.record(NAME)
    positions, harmless = range(0, len(content), 7), 0
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with contextlib.suppress(CacheError):
            read = cache.record(NAME)  # a bit that a decoder need not look at
            assert read['prompt'] == whole['prompt']
            assert same_fields(read['prompt_embed_kwargs'], whole['prompt_embed_kwargs'])
            harmless += 1
    assert harmless < len(positions) // 20


def test_what_follows_a_stream_is_no_part_of_it(tmp_path):
    folder = write_published(tmp_path, [qwen_record()])
    path = folder / f'{NAME}.zst'
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(CacheError, match='behind the end'):
        open_prompt_cache(folder).record(NAME)


def test_a_stream_that_unpacks_to_gigabytes_is_refused(tmp_path):
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    zeros = bytes(1 << 24)
    stream = b''.join(compressor.compress(zeros) for _ in range(100)) + compressor.flush()
    assert len(stream) < 1 << 18
    (tmp_path / f'{NAME}.zst').write_bytes(stream)
    with pytest.raises(CacheError, match='more than'):
        open_prompt_cache(tmp_path).record(NAME)


class Harm:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_malicious_records_do_not_run(tmp_path):
    target = tmp_path / 'made'
    record = {'note': Harm(str(target)), **flux_record()}
    folder = write_published(tmp_path / 'cache', [record])
    stream = zstandard.ZstdDecompressor().decompressobj()
    with contextlib.suppress(AttributeError):  # torch cannot read the storage of 8-bit numbers that follows
        pickle.loads(stream.decompress((folder / f'{NAME}.zst').read_bytes()))
    assert target.is_dir()
    target.rmdir()
    cache = open_prompt_cache(folder)
    with pytest.raises(CacheError, match=rf'{NAME}.*mkdir'):
        cache.record(NAME)
    assert [error is None for _, error in cache.check()] == [False]
    assert not target.exists()


def change(**values):
    record = qwen_record()
    record['prompt_embed_kwargs'].update(values)
    return record


@pytest.mark.parametrize(
    ('record', 'match'),
    [
        (['a list'], 'expected a dict'),
        ({'prompt_embed_kwargs': {}}, 'prompt'),
        ({'prompt': 'x'}, 'no embeddings'),
        ({'prompt': 'x', 'prompt_embed_kwargs': {}}, 'no embeddings'),
        ({'prompt': 'x', 'prompt_embed_kwargs': [1]}, 'expected to be a dict'),
        ({'prompt': 3, 'prompt_embed_kwargs': {'a': torch.ones(1)}}, 'prompt'),
        (change(pooled_projections='text'), 'pooled_projections is expected to be a tensor'),
        (change(encoder_hidden_states_scale=None), 'encoder_hidden_states_scale is missing'),
        (change(encoder_hidden_states_scale=float('nan')), 'one positive number'),
        (change(encoder_hidden_states_scale=0.0), 'one positive number'),
        (change(encoder_hidden_states_scale=torch.ones(3)), 'one positive number'),
        (change(other_scale=torch.tensor(1.0)), 'the scale of nothing'),
        (qwen_record(latent_size=(16, -1)), 'latent_size'),
        (qwen_record(latents=[1.0]), 'latents is expected to be a tensor'),
    ],
)
def test_records_of_another_form(record, match, tmp_path):
    with pytest.raises(CacheError, match=match) as caught:
        only_record(tmp_path, record)
    assert NAME in str(caught.value)


def test_written_records_are_read_by_python_and_by_us(tmp_path):
    record = record_of(flux_record(), 'x')
    content = write_published_record(record)
    (tmp_path / f'{NAME}.zst').write_bytes(content)
    again = PublishedPromptCache(str(tmp_path)).stored(NAME)
    assert again.prompt == record.prompt
    assert again.latent_size == (16, 8, 8)
    assert all(raw(again.embeds[name]) == raw(value) for name, value in record.embeds.items())


def test_empty_folders_hold_no_cache(tmp_path):
    with pytest.raises(CacheError, match='no record'):
        open_prompt_cache(tmp_path)


# -- files of negative prompts


def embeds():
    mask = torch.tensor([1, 1, 1, 0, 0])
    return {'encoder_hidden_states': normal(5, 8), 'encoder_hidden_states_mask': mask}


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
@pytest.mark.parametrize(('precision', 'rounding'), [('fp8', 2**-4), ('bf16', 2**-8), ('float32', 0)])
def test_embeds_files(suffix, precision, rounding, tmp_path):
    path = tmp_path / f'empty{suffix}'
    write_embeds(path, embeds(), precision)
    found = read_embeds(path)
    assert found['encoder_hidden_states_mask'].tolist() == [1, 1, 1]
    expected = embeds()['encoder_hidden_states'][:3]
    scale = float(expected.abs().max()) / 448
    absolute = scale * 2**-9 if precision == 'fp8' else 0
    torch.testing.assert_close(found['encoder_hidden_states'], expected, rtol=rounding, atol=absolute)


def test_published_embeds_files(tmp_path):
    record = qwen_record()
    del record['latent_size']
    nested, flat = tmp_path / 'nested.pth', tmp_path / 'flat.pth'
    torch.save(record, nested)
    torch.save(record['prompt_embed_kwargs'], flat)
    expected = only_record(tmp_path / 'cache', record)['prompt_embed_kwargs']
    for path in (nested, flat):
        found = read_embeds(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_records_with_latents_are_no_bare_embeddings(tmp_path):
    record = qwen_record(latents=torch.ones(16, 8, 8))
    torch.save(record, tmp_path / 'record.pth')
    assert set(read_embeds(tmp_path / 'record.pth')) == {'encoder_hidden_states', 'encoder_hidden_states_mask'}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_embeds_of_a_batch_are_refused(suffix, tmp_path):
    path = tmp_path / f'empty{suffix}'
    fields = {'encoder_hidden_states': normal(1, 5, 8)}
    torch.save(fields, path) if suffix == '.pth' else safetensors.torch.save_file(fields, path)
    with pytest.raises(CacheError, match=rf'empty\{suffix}.*shape \(1, 5, 8\), expected \(tokens, channels\)'):
        read_embeds(path)
    fields = {**embeds(), 'encoder_hidden_states_mask': torch.ones(4)}
    torch.save(fields, tmp_path / 'mask.pth')
    with pytest.raises(CacheError, match=r'mask\.pth.*_mask has the shape \(4,\), expected \(5,\)'):
        read_embeds(tmp_path / 'mask.pth')


def test_a_flipped_bit_of_an_embeds_file_is_found(tmp_path):
    path = tmp_path / 'empty.pth'
    write_embeds(path, embeds(), 'float32')
    content = bytearray(path.read_bytes())
    states = embeds()['encoder_hidden_states'][:3].numpy().tobytes()
    content[content.index(states) + 5] ^= 8
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r'empty\.pth cannot be read.*checksum'):
        read_embeds(path)


def nested(depth):
    """A list that is small in memory, and has 2 ** depth elements when it is printed."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    'fields',
    [
        {'latent_size': nested(60)},
        {'latent_size': (10**5000,)},
        {'latents': torch.ones(2, 2).to(torch.float8_e4m3fn), 'latents_scale': 10**400},
        {'prompt': nested(60)},
        {'prompt': 'a\ud800'},
        {'latents': nested(60)},
        {'prompt_embed_kwargs': {'x' * 100000: 1}},
        {'prompt_embed_kwargs': nested(60)},
        {'latents': torch.ones(2), 'latents_scale': torch.ones(100000)},
    ],
    ids=range(9),
)
def test_messages_are_short_whatever_a_record_holds(fields, tmp_path):
    with pytest.raises(CacheError, match=NAME) as caught:
        only_record(tmp_path, {**qwen_record(), **fields})
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_embeds_files_that_cannot_be_read_name_the_command(tmp_path):
    target = tmp_path / 'made'
    torch.save({'prompt_embed_kwargs': Harm(str(target))}, tmp_path / 'harm.pth')
    (tmp_path / 'damaged.pth').write_bytes(b'PK\x03\x04')
    (tmp_path / 'damaged.safetensors').write_bytes(b'\x08' + bytes(7) + b'nonsense')
    torch.save([1], tmp_path / 'list.pth')
    for name in ('missing.pth', 'harm.pth', 'damaged.pth', 'damaged.safetensors', 'list.pth'):
        with pytest.raises(CacheError, match=rf'(?s){name}.*tools/cache_negative_prompt\.py'):
            read_embeds(tmp_path / name)
    assert not target.exists()


# -- eight bits


def test_quantise_keeps_what_is_published():
    values = normal(9, 6) * 3
    found = quantise({'encoder_hidden_states': values, 'pooled_projections': values[0].bfloat16()}, 'fp8')
    expected, scale = published_fp8(values)
    assert raw(found['encoder_hidden_states']) == raw(expected)
    assert torch.equal(found['encoder_hidden_states_scale'], scale)
    assert raw(found['pooled_projections']) == raw(values[0].bfloat16())


def test_quantise_of_zeros_and_of_infinities():
    found = quantise({'latents': torch.zeros(2, 2)}, 'fp8')
    assert float(found['latents_scale']) == pytest.approx(1e-6)
    assert not found['latents'].float().any()
    with pytest.raises(CacheError, match='latents holds numbers that are not finite'):
        quantise({'latents': torch.tensor([1.0, float('inf')])}, 'bf16')
    with pytest.raises(ValueError, match='fp4'):
        quantise({}, 'fp4')


def test_pad_tokens():
    value = torch.arange(6).reshape(3, 2)
    assert pad_tokens(value, 4).tolist() == [[0, 1], [2, 3], [4, 5], [0, 0]]
    assert pad_tokens(value, 2).tolist() == [[0, 1], [2, 3]]
    assert pad_tokens(torch.ones(2), 3).tolist() == [1, 1, 0]


def test_unknown_size_streams_are_what_the_tests_write():
    assert zstandard.get_frame_parameters(compressed(b'abc' * 100)).content_size == zstandard.CONTENTSIZE_UNKNOWN
