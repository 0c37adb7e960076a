"""Data sets of prompts: what items hold, which prompts are used, and what is refused."""

import logging
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lakonlab.datasets.collate import collate
from lakonlab.datasets.image_prompt import ImagePrompt
from lakonlab.datasets.loader import build_dataloader
from lakonlab.datasets.slices import item_range
from tests.datasets.prompt_files import (
    PROMPTS,
    WIDTH,
    cached,
    embeds_of,
    json_source,
    text_source,
    write_cache,
    write_record,
)


def test_texts(tmp_path):
    data = ImagePrompt(str(tmp_path), prompt_dataset_kwargs=text_source(tmp_path), latent_size=(4, 6, 8))
    assert len(data) == 10
    assert data[3] == {
        'ids': 3,
        'name': PROMPTS[3],
        'prompt_kwargs': {'prompt': PROMPTS[3]},
        'latent_size': (4, 6, 8),
    }
    assert data.needs_text_encoder == 'prompt_dataset_kwargs: the prompts are texts'
    assert not data.has_images
    assert data.bucket_ids is None
    for index in (-1, 10):
        with pytest.raises(IndexError, match='ImagePrompt data set of 10'):
            data[index]


def test_noise_is_that_of_the_number_among_all_items(tmp_path):
    data = ImagePrompt(
        str(tmp_path),
        prompt_dataset_kwargs=text_source(tmp_path),
        start_ind=-3,
        repeat=2,
        test_mode=True,
        latent_size=(4, 6, 8),
    )
    assert [data[i]['name'] for i in range(len(data))] == [PROMPTS[i] for i in (7, 7, 8, 8, 9, 9)]
    for index in range(6):
        expected = torch.randn((4, 6, 8), generator=torch.Generator().manual_seed(index))
        assert torch.equal(data[index]['noise'], expected)
        assert data[index]['ids'] == index
        assert 'latent_size' not in data[index]


@given(
    st.integers(1, 30),
    st.one_of(st.none(), st.integers(-40, 40)),
    st.one_of(st.none(), st.integers(-40, 40)),
)
def test_ranges_are_slices(size, start, end):
    expected = list(range(size))[start:end]
    if expected:
        assert list(item_range(size, start, end)) == expected
    else:
        with pytest.raises(ValueError, match=f'start_ind={start}, end_ind={end}: .* of {size} prompts'):
            item_range(size, start, end)


@pytest.mark.parametrize('bounds', [dict(end_ind=0), dict(start_ind=10), dict(start_ind=4, end_ind=4)])
def test_nothing_left_is_an_error(tmp_path, bounds):
    data = ImagePrompt(str(tmp_path), prompt_dataset_kwargs=text_source(tmp_path), **bounds)
    with pytest.raises(ValueError, match='there is no such part of 10 prompts'):
        len(data)


def test_published_split_of_training_and_validation(tmp_path):
    source = text_source(tmp_path)
    train = ImagePrompt(str(tmp_path), prompt_dataset_kwargs=source, end_ind=-4)
    val = ImagePrompt(str(tmp_path), prompt_dataset_kwargs=source, start_ind=-4, repeat=2, test_mode=True)
    assert [train[i]['name'] for i in range(len(train))] == PROMPTS[:6]
    assert [val[i]['name'] for i in range(0, len(val), 2)] == PROMPTS[6:]


def test_rows_that_bring_sizes_and_all_arguments(tmp_path):
    rows = [
        dict(prompt_kwargs=dict(prompt='a', prompt_2='b'), height=32, width=64),
        dict(prompt_kwargs=dict(prompt='c', prompt_2='d'), height=64, width=32),
        dict(prompt_kwargs=dict(prompt='e', prompt_2='f'), height=32, width=64),
    ]
    data = ImagePrompt(
        str(tmp_path), prompt_dataset_kwargs=json_source(tmp_path, rows), bucketize=True, latent_size=(4, 1, 1)
    )
    assert data[0]['prompt_kwargs'] == dict(prompt='a', prompt_2='b')
    assert data[0]['name'] == 'a'
    assert data[0]['latent_size'] == (4, 4, 8)
    assert data[1]['latent_size'] == (4, 8, 4)
    ids = data.bucket_ids
    assert ids[0] == ids[2] != ids[1]
    sizes = [set(batch['latent_size']) for _, batch in zip(range(6), build_dataloader(data, 2, shuffle=True, seed=1))]
    assert all(len(size) == 1 for size in sizes)
    assert set.union(*sizes) == {(4, 4, 8), (4, 8, 4)}


def test_frames_need_a_latent_size_with_frames(tmp_path):
    rows = [dict(prompt='x', frames=8, height=32, width=48)]
    data = ImagePrompt(str(tmp_path), prompt_dataset_kwargs=json_source(tmp_path, rows), test_mode=True)
    with pytest.raises(ValueError, match=r'has 3 dimensions .* 2 after the channels'):
        data[0]


def test_frames_are_the_first_dimension(tmp_path):
    rows = [dict(caption='x', frames=8, height=32, width=48)]
    data = ImagePrompt(
        str(tmp_path),
        prompt_dataset_kwargs=json_source(tmp_path, rows),
        prompt_key='caption',
        latent_size=(4, 9, 9, 9),
        vae_scale_factor=(4, 8, 16),
        test_mode=True,
    )
    assert data[0]['noise'].shape == (4, 2, 4, 3)
    odd = ImagePrompt(
        str(tmp_path),
        prompt_dataset_kwargs=json_source(tmp_path, rows),
        prompt_key='caption',
        latent_size=(4, 9, 9, 9),
        vae_scale_factor=(3, 8, 16),
    )
    with pytest.raises(ValueError, match='8 x 32 x 48 pixels are no multiple of vae_scale_factor, 3 x 8 x 16'):
        odd[0]


def test_cached_embeddings(tmp_path):
    meant = write_cache(tmp_path)
    data = cached(tmp_path, pad_seq_len=4)
    assert len(data) == 3
    assert data.needs_text_encoder is None
    for index, length in enumerate((3, 5, 4)):
        item = data[index]
        assert item['name'] == PROMPTS[index]
        found = item['prompt_embed_kwargs']
        states = meant[index]['encoder_hidden_states'][:4]
        assert found['encoder_hidden_states'].shape == (4, WIDTH)
        assert torch.equal(found['encoder_hidden_states'][: len(states)], states)
        assert not found['encoder_hidden_states'][length:].any()
        assert found['encoder_hidden_states_mask'].tolist() == [1] * min(length, 4) + [0] * max(4 - length, 0)
        assert torch.equal(found['pooled_projections'], meant[index]['pooled_projections'])
        assert found['pooled_projections'].dtype == found['encoder_hidden_states'].dtype == torch.float32


def test_without_a_length_batches_are_padded_to_the_longest_and_masked(tmp_path):
    meant = write_cache(tmp_path)
    batch = collate([cached(tmp_path)[i] for i in range(3)])['prompt_embed_kwargs']
    assert batch['encoder_hidden_states'].shape == (3, 5, WIDTH)
    assert batch['encoder_hidden_states_mask'].sum(dim=1).tolist() == [3, 5, 4]
    for row, value in enumerate(meant):
        tokens = value['encoder_hidden_states']
        assert torch.equal(batch['encoder_hidden_states'][row, : len(tokens)], tokens)
        assert not batch['encoder_hidden_states'][row, len(tokens) :].any()


def test_padding_that_would_be_attended_to_is_refused(tmp_path):
    write_cache(tmp_path, masked=False)
    with pytest.raises(ValueError, match=r"'000000000000' of the prompt cache has 3 text tokens and no mask"):
        cached(tmp_path, pad_seq_len=4)[0]
    assert cached(tmp_path, pad_seq_len=4)[1]['prompt_embed_kwargs']['encoder_hidden_states'].shape == (4, WIDTH)


def test_cached_latents_and_what_tells_the_size(tmp_path):
    stored, _ = embeds_of(0, 3)
    latents, conditions = torch.randn(4, 2, 6), torch.randn(4, 8, 2)
    records = [
        dict(latents=latents, condition_latents=conditions),
        dict(latent_size=(4, 2, 3), condition_latents=conditions),
        dict(condition_latents=conditions),
        dict(),
    ]
    write_cache(tmp_path, tokens=(3,) * 4)
    for number, record in enumerate(records):
        write_record(tmp_path / 'cache', number, prompt_embed_kwargs=stored, **record)
    data = cached(tmp_path, latent_size=(4, 5, 5))
    assert torch.equal(data[0]['latents'], latents)
    assert torch.equal(data[0]['condition_latents'], conditions)
    assert data.has_images
    assert [data[i].get('latent_size') for i in range(4)] == [None, (4, 2, 3), (4, 8, 2), (4, 5, 5)]
    ignoring = cached(tmp_path, ignore_cached_latents=True)
    assert 'latents' not in ignoring[0]
    assert ignoring[0]['latent_size'] == (4, 2, 6)
    assert not ignoring.has_images
    sampling = cached(tmp_path, latent_size=(4, 5, 5), test_mode=True)
    assert [tuple(sampling[i]['noise'].shape) for i in range(4)] == [(4, 2, 6), (4, 2, 3), (4, 8, 2), (4, 5, 5)]
    assert 'latents' not in sampling[0]


def test_a_missing_cache_without_prompts_is_an_error(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cache_dir='cache': there is no folder .*cache_image_prompt_data.*--text-encoder"
    ):
        len(cached(tmp_path))
    write_cache(tmp_path)
    (tmp_path / 'cache.jsonl.gz').unlink()
    with pytest.raises(FileNotFoundError, match=r'cache_datalist_path=.* not complete'):
        len(cached(tmp_path))


def test_a_missing_cache_with_prompts_is_said_and_needs_a_text_encoder(tmp_path, caplog):
    data = cached(tmp_path, prompt_dataset_kwargs=text_source(tmp_path))
    with caplog.at_level(logging.WARNING, 'lakonlab.datasets'):
        assert data[0]['prompt_kwargs'] == {'prompt': PROMPTS[0]}
        assert data[1]['name'] == PROMPTS[1]
    assert caplog.text.count("cache_dir='cache': there is no folder") == 1
    assert 'text encoder' in caplog.text
    assert data.needs_text_encoder.startswith("cache_dir='cache'")
    write_cache(tmp_path)
    present = cached(tmp_path, prompt_dataset_kwargs=text_source(tmp_path))
    assert 'prompt_embed_kwargs' in present[0]
    assert present.needs_text_encoder is None


def test_negative_prompts(tmp_path, caplog):
    source = text_source(tmp_path)
    stored, meant = embeds_of(7, 2)
    torch.save({'prompt_embed_kwargs': stored}, tmp_path / 'negative.pth')
    path = str(tmp_path / 'negative.pth')
    write_cache(tmp_path)
    item = cached(tmp_path, negative_prompt_embeds_path=path, pad_seq_len=4)[0]
    found = item['negative_prompt_embed_kwargs']
    assert torch.equal(found['encoder_hidden_states'][:2], meant['encoder_hidden_states'])
    assert found['encoder_hidden_states_mask'].tolist() == [1, 1, 0, 0]
    assert 'negative_prompt_kwargs' not in item

    texts = ImagePrompt(str(tmp_path), prompt_dataset_kwargs=source, negative_prompt_kwargs=dict(prompt='blurry'))
    assert texts[2]['negative_prompt_kwargs'] == {'prompt': 'blurry'}

    missing = dict(negative_prompt_embeds_path=str(tmp_path / 'none.pth'))
    with pytest.raises(FileNotFoundError, match=r'negative_prompt_embeds_path=.*cache_negative_prompt\.py.*--text-enc'):
        cached(tmp_path, **missing)[0]
    data = cached(tmp_path, negative_prompt_kwargs=dict(prompt=''), **missing)
    with caplog.at_level(logging.WARNING, 'lakonlab.datasets'):
        assert data[0]['negative_prompt_kwargs'] == {'prompt': ''}
    assert caplog.text.count('none.pth') == 1
    assert data.needs_text_encoder.startswith('negative_prompt_kwargs')


def test_buckets_of_a_cache(tmp_path):
    write_cache(tmp_path, size_idx=[4, 4, 2])
    data = cached(tmp_path, bucketize=True, start_ind=1, repeat=2)
    assert list(data.bucket_ids) == [4, 4, 2, 2]
    assert cached(tmp_path).bucket_ids is None
    write_cache(tmp_path)
    with pytest.raises(ValueError, match='bucketize=True: neither cache_datalist_path'):
        _ = cached(tmp_path, bucketize=True).bucket_ids


def test_items_of_a_batch_are_those_read_alone_also_elsewhere(tmp_path):
    write_cache(tmp_path, tokens=(3, 5, 4, 2))
    data = cached(tmp_path, repeat=2, pad_seq_len=5)
    len(data)
    sent = pickle.loads(pickle.dumps(data))
    for index, item in zip((5, 0, 7), sent.__getitems__([5, 0, 7])):
        alone = data[index]
        assert item.keys() == alone.keys()
        assert item['name'] == alone['name']
        for name, value in alone['prompt_embed_kwargs'].items():
            assert torch.equal(item['prompt_embed_kwargs'][name], value)


def test_nothing_is_written(tmp_path):
    write_cache(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    data = cached(tmp_path)
    _ = [data[i] for i in range(3)]
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(), 'set cache_dir, prompt_dataset_kwargs, or both'),
        (dict(cache_dir='x', pad_seq_len=0), 'pad_seq_len=0'),
        (dict(cache_dir='x', repeat=0), 'repeat=0'),
        (dict(cache_dir='x', latent_patch_size=0), 'latent_patch_size=0'),
        (dict(cache_dir='x', image_scale_factor=0), 'image_scale_factor=0: expected a positive'),
        (dict(cache_dir='x', condition_image_scale_factor=-1), 'condition_image_scale_factor=-1'),
        (
            dict(cache_dir='x', image_scale_method='box'),
            "image_scale_method='box': expected one of 'bicubic', 'lanczos'",
        ),
        (dict(cache_dir='x', vae_scale_factor=(8, 8, 8)), r'vae_scale_factor=\(8, 8, 8\)'),
        (dict(cache_dir='x', image_datalist_path='x.json'), 'image_datalist_path=.* no effect without image_dir'),
        (dict(prompt_dataset_kwargs={}, cache_datalist_path='x.json'), 'no effect without cache_dir'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImagePrompt('.', **arguments)
