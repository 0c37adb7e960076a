import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lakonlab.datasets.collate import collate
from lakonlab.datasets.imagenet import ImageNet
from lakonlab.datasets.loader import build_dataloader
from lakonlab.datasets.prompt_cache.errors import CacheError
from tests.datasets.latent_files import write_latents

NAMES = "{0: 'tench, Tinca tinca',\n 1: \"jack-o'-lantern\",\n 999: 'toilet tissue'}\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with three images, two latents, and lists of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'names.txt').write_text(NAMES)
    rng = np.random.default_rng(0)
    for name, shape in {'a.png': (40, 30, 3), 'b.png': (17, 64), 'c.png': (16, 16, 4)}.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    for number in range(2):
        torch.save({'x': torch.full((4, 2, 2), number).half(), 'y': torch.tensor(number)}, tmp_path / f'{number}.pth')
    (tmp_path / 'images.txt').write_text('a.png 0\nb.png 1\n\nc.png 999\n')
    (tmp_path / 'latents.txt').write_text('0.pth\n1.pth 1\n')
    return tmp_path


def dataset(datalist='images.txt', **arguments):
    return ImageNet('.', datalist, 'names.txt', **{'image_size': 16, **arguments})


def test_images(files):
    data = dataset()
    assert len(data) == 3
    items = [data[i] for i in range(3)]
    for index, item in enumerate(items):
        assert item['images'].shape == (3, 16, 16)
        assert item['images'].dtype == torch.float32
        assert item['ids'] == index
        assert item['negative_labels'] == 1000
    assert [int(item['labels']) for item in items] == [0, 1, 999]
    assert [item['name'] for item in items[:2]] == ['tench, Tinca tinca', "jack-o'-lantern"]
    assert 'negative_labels' not in dataset(negative_label=None)[0]
    # grey becomes three equal channels, transparency is dropped
    assert torch.equal(items[1]['images'][0], items[1]['images'][2])
    pixels = np.asarray(Image.open('c.png'))
    assert np.array_equal((items[2]['images'] * 255).round().permute(1, 2, 0).numpy(), pixels[..., :3])


def test_half_of_the_readings_are_mirror_images(files):
    plain = dataset(random_flip=False)
    assert not hasattr(plain, 'random_item')
    images = [plain[i]['images'] for i in range(3)]
    mirrored = []
    for _, batch in zip(range(200), build_dataloader(dataset(), 3, shuffle=True, seed=5)):
        for index, image in zip(batch['ids'], batch['images']):
            assert torch.equal(image, images[index]) != torch.equal(image, images[index].flip(-1))
            mirrored.append(torch.equal(image, images[index].flip(-1)))
    assert 250 < sum(mirrored) < 350  # 4 standard deviations
    again = build_dataloader(dataset(), 3, shuffle=True, seed=5, start_iter=7)
    before = build_dataloader(dataset(), 3, shuffle=True, seed=5)
    for (_, batch), later in zip(zip(range(8), before), [None] * 7 + [next(iter(again))]):
        assert later is None or torch.equal(batch['images'], later['images'])


def test_latents(files):
    data = dataset('latents.txt')
    assert len(data) == 2
    assert not hasattr(data, 'random_item')  # latents are never mirrored
    item = data[1]
    assert torch.equal(item['latents'], torch.ones(4, 2, 2))
    assert item['labels'].dtype == torch.int64
    assert item['labels'] == 1
    assert item['paths'].endswith('1.pth')


def test_noise_is_a_function_of_the_number(files):
    data = ImageNet(label2name_path='names.txt', test_mode=True, num_test_images=12, test_label_repeat=3)
    assert len(data) == 12
    items = [data[i] for i in range(12)]
    expected = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(1007))
    assert torch.equal(items[7]['noise'], expected)
    labels = [int(item['labels']) for item in items]
    assert labels[:3] == labels[:1] * 3
    assert len(set(labels)) == 4
    equal = ImageNet(label2name_path='names.txt', test_mode=True, test_label_sampling='equal')
    assert [int(equal[i]['labels']) for i in (0, 5, 1003)] == [0, 5, 3]


def test_nothing_is_unpickled(files):
    torch.save({'x': ImageNet, 'y': 0}, '0.pth')
    with pytest.raises(CacheError, match=r'0\.pth cannot be read.*[Ww]eights'):
        dataset('latents.txt')[0]


def test_damaged_latents_are_named(files):
    """torch itself reads a flipped bit as another number."""
    content = bytearray(files.joinpath('1.pth').read_bytes())
    half = torch.load('1.pth', weights_only=True)['x'].numpy().tobytes()
    content[content.index(half)] ^= 1
    files.joinpath('1.pth').write_bytes(content)
    assert torch.load('1.pth', weights_only=True)['x'].numpy().tobytes() != half
    with pytest.raises(CacheError, match=r'1\.pth cannot be read: .*checksum'):
        dataset('latents.txt')[1]
    for wrong in (b'', content[:-30], b'PK\x03\x04'):
        files.joinpath('1.pth').write_bytes(wrong)
        with pytest.raises(CacheError, match=r'1\.pth cannot be read'):
            dataset('latents.txt')[1]
    for wrong in ({'x': torch.ones(3)}, {'x': torch.ones(3, 4), 'y': 'cat'}, {'x': [1.0], 'y': 1}, [1]):
        torch.save(wrong, '1.pth')
        with pytest.raises(CacheError, match=r'1\.pth: '):
            dataset('latents.txt')[1]


def test_lists_that_are_no_text(files):
    files.joinpath('list.txt').write_bytes(b'\xff.png 1\n')
    with pytest.raises(ValueError, match=r'list\.txt: is no text in UTF-8'):
        len(dataset('list.txt'))


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('a b.png 1', "line 1: expected a path without spaces and a label, found 'a b.png 1'"),
        ('a.png first', 'line 1: expected a path'),
        ('a.gif 1', r"line 1: 'a.gif' ends in none of \.pth"),
        ('', 'the data list is empty'),
    ],
)
def test_wrong_lists(files, line, message):
    (files / 'wrong.txt').write_text(line + '\n')
    with pytest.raises(ValueError, match=message):
        len(dataset('wrong.txt'))


def test_wrong_arguments_and_files(files):
    with pytest.raises(ValueError, match="test_label_sampling='all': expected one of 'random', 'equal'"):
        dataset(test_label_sampling='all')
    with pytest.raises(ValueError, match='image_size=0'):
        dataset(image_size=0)
    with pytest.raises(FileNotFoundError, match=r"datalist_path='none\.txt'"):
        len(dataset('none.txt'))
    with pytest.raises(IndexError, match='item 3'):
        dataset()[3]
    (files / 'names.txt').write_text('tench\n')
    with pytest.raises(ValueError, match='line 1: expected label'):
        dataset()[0]
    (files / 'names.txt').write_text(NAMES)
    (files / 'bare.txt').write_text('a.png\n')
    with pytest.raises(ValueError, match='gives no label'):
        dataset('bare.txt')[0]
    torch.save({'z': torch.zeros(1)}, '0.pth')
    with pytest.raises(CacheError, match="expected a dict with 'x'"):
        dataset('latents.txt')[0]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def cached(tmp_path, request):
    """A cache of 30 latents, of which 7 share a shard, and what it holds."""
    latents = torch.randn(30, 4, 3, 5, generator=torch.Generator().manual_seed(3)).to(request.param)
    write_latents(tmp_path / 'cache', latents, 'both', rows_per_shard=7)
    (tmp_path / 'names.txt').write_text(NAMES)
    return ImageNet(str(tmp_path / 'cache'), '', str(tmp_path / 'names.txt')), latents.float()


def test_batches_of_shards_are_their_items(cached):
    data, latents = cached
    assert len(data) == 60
    chosen = [29, 0, 30, 17, 59, 6, 7, 0]
    batch = collate(data.__getitems__(chosen))
    items = collate([data[index] for index in chosen])
    assert batch.keys() == items.keys()
    for key, value in items.items():
        assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value, key
    expected = [latents[i % 30].flip(-1) if i >= 30 else latents[i] for i in chosen]
    assert torch.equal(batch['latents'], torch.stack(expected))
    assert batch['latents'].dtype == torch.float32
    assert batch['labels'].tolist() == [i % 30 for i in chosen]
    assert [Path(path).name for path in batch['paths']] == [f'n{i % 30:08d}_{i % 30}.JPEG' for i in chosen]
    with pytest.raises(IndexError, match='item 60'):
        data.__getitems__([0, 60])


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_workers_read_shards(cached, context):
    data, _ = cached
    expected = list(itertools.islice(build_dataloader(data, 8, shuffle=True, seed=1), 9))
    workers = build_dataloader(data, 8, 2, shuffle=True, seed=1, multiprocessing_context=context)
    for found, batch in zip(workers, expected):
        assert torch.equal(found['latents'], batch['latents'])
        assert found['ids'] == batch['ids']


def test_damaged_rows_of_a_batch_are_named(cached):
    data, latents = cached
    path = Path(data.data_root, 'latents-000001.safetensors')
    content = bytearray(path.read_bytes())
    stored = data._cache.index.facts['dtype']
    position = content.index(latents[9].to(getattr(torch, stored)).view(torch.uint8).numpy().tobytes())
    content[position + 5] ^= 1
    path.write_bytes(content)
    fresh = ImageNet(data.data_root, '', data.label2name_path)
    fresh.__getitems__([8, 10, 39])
    for _ in range(2):
        with pytest.raises(CacheError, match=r'image n00000009/n00000009_9\.JPEG.* is damaged'):
            fresh.__getitems__([8, 9, 10])
