"""Data sets on a real S3 server hold what they hold on the local disk, also in worker processes."""

import numpy as np
import pytest
import torch
from PIL import Image

from lakonlab.datasets.fashion_mnist import FashionMNIST
from lakonlab.datasets.image_prompt import ImagePrompt
from lakonlab.datasets.imagenet import ImageNet
from lakonlab.datasets.loader import build_dataloader
from lakonlab.storage import files
from tests.datasets.prompt_files import (
    PROMPTS,
    embeds_of,
    json_source,
    text_source,
    write_cache,
    write_datalist,
    write_images,
)
from tests.datasets.test_fashion_mnist import idx


@pytest.fixture
def two_places(tmp_path, bucket):
    """A folder, and what copies it to a server; both as text."""
    folder = tmp_path / 'data'
    folder.mkdir()

    def copy():
        files.upload(folder, f'{bucket}/data')
        return str(folder), f'{bucket}/data'

    return folder, copy


def assert_equal(here, there):
    assert here.keys() == there.keys()
    for key, value in here.items():
        if isinstance(value, dict):
            assert_equal(value, there[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, there[key])
        elif key != 'paths':
            assert value == there[key]


def batches(dataset, workers):
    return [batch for _, batch in zip(range(4), build_dataloader(dataset, 2, workers, shuffle=True, seed=1))]


@pytest.mark.parametrize('start_method', ['fork', 'spawn'])
def test_prompts_images_and_negative_prompts(two_places, start_method):
    folder, copy = two_places
    write_cache(folder, tokens=(3, 5, 4))
    write_images(folder / 'images', [(16, 24), (20, 20), (16, 16)])
    write_datalist(folder / 'images.jsonl', ['002', '000', '001'], image_size=[[16, 16]] * 3)
    stored, _ = embeds_of(9, 2)
    torch.save({'prompt_embed_kwargs': stored}, folder / 'negative.pth')

    def dataset(place):
        return ImagePrompt(
            place,
            cache_dir='cache',
            cache_datalist_path=f'{place}/cache.jsonl.gz',
            image_dir='images',
            image_datalist_path=f'{place}/images.jsonl',
            negative_prompt_embeds_path=f'{place}/negative.pth',
            pad_seq_len=6,
        )

    here, there = map(dataset, copy())
    expected = batches(here, 0)
    options = dict(shuffle=True, seed=1, multiprocessing_context=start_method)
    _ = there[0]  # what is open here is not used there
    loader = iter(build_dataloader(there, 2, 1, **options))
    for batch in expected[: 2 if start_method == 'spawn' else 4]:
        assert_equal(batch, next(loader))


def test_texts(two_places, tmp_path):
    folder, copy = two_places
    text_source(folder)
    json_source(folder, [dict(prompt='a', height=8, width=16)])
    _, there = copy()
    kwargs = dict(path='text', data_files=f'{there}/prompts.txt', cache_dir=str(tmp_path / 'datasets'))
    data = ImagePrompt(there, prompt_dataset_kwargs=kwargs, latent_size=(4, 2, 2))
    assert [data[i]['name'] for i in range(len(data))] == PROMPTS
    kwargs = dict(path='json', data_files=f'{there}/prompts.jsonl', cache_dir=str(tmp_path / 'datasets'))
    assert ImagePrompt(there, prompt_dataset_kwargs=kwargs, latent_size=(4, 2, 2))[0]['latent_size'] == (4, 1, 2)


def test_images_and_latents_by_class(two_places):
    folder, copy = two_places
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f'{number}.png')
        torch.save({'x': torch.randn(4, 2, 2), 'y': torch.tensor(number)}, folder / f'{number}.pth')
    (folder / 'names.txt').write_text("0: 'a',\n1: 'b',\n2: 'c'\n")
    for suffix in ('png', 'pth'):
        (folder / f'{suffix}.txt').write_text(''.join(f'{number}.{suffix} {number}\n' for number in range(3)))
    places = copy()
    for suffix in ('png', 'pth'):
        here, there = (
            ImageNet(place, f'{place}/{suffix}.txt', f'{place}/names.txt', image_size=16) for place in places
        )
        for one, other in zip(batches(here, 0), batches(there, 1)):
            assert_equal(one, other)


def test_clothes(two_places):
    folder, copy = two_places
    (folder / 't10k-images-idx3-ubyte.gz').write_bytes(idx(np.arange(28 * 28 * 2).reshape(2, 28, 28) % 256))
    (folder / 't10k-labels-idx1-ubyte.gz').write_bytes(idx(np.array([3, 4])))
    here, there = (FashionMNIST('val', place) for place in copy())
    assert_equal(here[1], there[1])


def test_what_is_missing_is_named(bucket):
    with pytest.raises(FileNotFoundError, match=f"cache_dir='cache': there is no folder {bucket}/cache"):
        len(ImagePrompt(bucket, cache_dir='cache'))
    with pytest.raises(FileNotFoundError, match=r'datalist_path=.*list\.txt'):
        len(ImageNet(bucket, f'{bucket}/list.txt'))
