"""Latents of labelled images, in both layouts, and the data set that reads them."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lakonlab.datasets.imagenet import ImageNet
from lakonlab.datasets.latent_cache import LatentCache
from lakonlab.datasets.latent_making import LabelledImages, LatentEncoder, make_latent_cache, make_published_latents
from lakonlab.datasets.loader import build_dataloader
from lakonlab.datasets.prompt_cache import CacheError
from lakonlab.datasets.prompt_cache.index import INDEX_FILE
from lakonlab.ops.random_source import SeededSource
from lakonlab.ranks import ALONE
from tests.processes import run_processes

COUNT, SIZE = 13, 16


class Averages(nn.Module):
    """Stands for an autoencoder: averages of squares, which see which way an image is turned, and noise."""

    def __init__(self, noise=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.noise, self.seen = noise, 0

    def encode(self, images, sample_mode, source):
        assert images.abs().max() <= 1
        self.seen += len(images)
        latents = nn.functional.avg_pool2d(images, 4)
        if sample_mode == 'sample':
            latents = latents + self.noise * source.normal('vae_noise', latents.shape)
        return latents


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images in two folders, their list and names of classes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(COUNT):
        path = tmp_path / 'images' / f'n{number % 2}' / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + number, 18, 3), dtype=np.uint8)).save(path)
        lines.append(f'n{number % 2}/{number}.png {number % 5}\n')
    (tmp_path / 'list.txt').write_text(''.join(lines))
    (tmp_path / 'names.txt').write_text("0: 'tench',\n")
    return tmp_path


def encoder(vae=None, **options):
    images = LabelledImages('images', 'list.txt', SIZE)
    return LatentEncoder(images, Averages() if vae is None else vae, **{'seed': 7, **options})


def make_ours(out='ours', flip='both', ranks=ALONE, made=None, **options):
    return make_latent_cache(
        encoder(made, **options), out, flip=flip, batch_size=3, rows_per_shard=4, plan={'vae': 'x'}, ranks=ranks
    )


def make_published(out='published', flip='random', ranks=ALONE, vae=None, **options):
    return make_published_latents(
        encoder(vae, **options), out, f'{out}.txt', flip=flip, batch_size=3, plan={'vae': 'x'}, ranks=ranks
    )


def content_of(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob('[!.]*.*')}


def expected(number, mirrored=False, seed=7, **options):
    """Latents of one image, encoded alone."""
    one = encoder(Averages(), seed=seed, **options)
    image = one.images.read(number)[None]
    image = image.flip(-1) if mirrored else image
    noise = SeededSource(seed, 1 if mirrored else 0, row_ids=[number]).normal('vae_noise', (1, 3, 4, 4))
    return (nn.functional.avg_pool2d(image, 4) + 0.1 * noise)[0]


def test_latents_of_both_ways(folder):
    assert make_ours()
    cache = pickle.loads(pickle.dumps(LatentCache('ours')))
    assert len(cache) == COUNT
    assert cache.labels.tolist() == [number % 5 for number in range(COUNT)]
    assert cache.path_of(3) == 'n1/3.png'
    for number in range(COUNT):
        for mirrored in (False, True):
            torch.testing.assert_close(cache.latents(number, mirrored), expected(number, mirrored))
    assert [error for _, error in cache.check() if error] == []


def test_batches_are_rows(folder):
    make_ours()
    cache = LatentCache('ours')
    numbers, mirrored = [12, 0, 5, 5, 1], [False, True, False, True, True]
    batch = cache.batch(numbers, mirrored)
    assert batch.shape == (5, 3, 4, 4)
    for row, number, flip in zip(batch, numbers, mirrored):
        assert torch.equal(row, cache.latents(number, flip))
    assert torch.equal(cache.batch(numbers), torch.stack([cache.latents(number) for number in numbers]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, folder):
    make_ours(dtype=dtype)
    cache = LatentCache('ours')
    assert cache.latents(3).dtype == torch.float32
    assert torch.equal(cache.latents(3), expected(3).to(dtype).float())
    assert torch.equal(cache.batch([3, 4])[0], cache.latents(3))


def test_the_mode_of_the_posterior(folder):
    make_ours(flip='none', posterior='argmax')
    cache = LatentCache('ours')
    assert not cache.has_mirrored
    image = encoder().images.read(2)[None]
    torch.testing.assert_close(cache.latents(2), nn.functional.avg_pool2d(image, 4)[0])
    with pytest.raises(CacheError, match='no mirrored of image 2'):
        cache.latents(2, mirrored=True)


def test_published_layout(folder):
    assert make_published() == COUNT
    lines = (folder / 'published.txt').read_text().splitlines()
    assert lines[3] == 'n1/3.pth 3'
    assert len(lines) == COUNT
    ways = set()
    for number, line in enumerate(lines):
        path, label = line.split()
        record = torch.load(folder / 'published' / path, weights_only=True)
        assert int(record['y']) == int(label) == number % 5
        assert record['x'].dtype == torch.float32
        plain, mirrored = expected(number), expected(number, False) * 0
        noise = plain - nn.functional.avg_pool2d(encoder().images.read(number)[None], 4)[0]
        mirrored = nn.functional.avg_pool2d(encoder().images.read(number)[None].flip(-1), 4)[0] + noise
        is_mirrored = torch.allclose(record['x'], mirrored)
        assert is_mirrored or torch.allclose(record['x'], plain)
        ways.add(is_mirrored)
    assert ways == {True, False}
    # nothing of a file is larger than its own latents and label need
    assert (folder / 'published' / 'n0' / '0.pth').stat().st_size < 3000


def test_data_sets_read_either_layout(folder):
    make_published(flip='none')
    make_ours()
    published = ImageNet('published', 'published.txt', 'names.txt', random_flip=False)
    ours = ImageNet('ours', 'nowhere.txt', 'names.txt', random_flip=False)
    assert len(published) == len(ours) == COUNT
    batches = ours.__getitems__([4, 0])  # a batch, read at once
    for index in range(COUNT):
        first, second = published[index], ours[index]
        assert torch.equal(first['latents'], second['latents'])
        assert torch.equal(first['labels'], second['labels'])
        assert first['name'] == second['name']
        assert first.keys() == second.keys()
    for place, index in enumerate([4, 0]):
        assert torch.equal(batches['latents'][place], ours[index]['latents'])
        assert batches['ids'][place] == index
    with pytest.raises(IndexError):
        ours[COUNT]
    with pytest.raises(IndexError):
        ours.__getitems__([0, COUNT])


def test_data_sets_show_mirror_images(folder):
    make_ours()
    dataset, cache = ImageNet('ours', 'nowhere.txt', 'names.txt'), LatentCache('ours')
    assert len(dataset) == 2 * COUNT
    assert torch.equal(dataset[5]['latents'], cache.latents(5))
    assert torch.equal(dataset[COUNT + 5]['latents'], cache.latents(5, mirrored=True))
    assert int(dataset[COUNT + 5]['labels']) == int(dataset[5]['labels'])
    make_ours(out='one way', flip='none')
    assert len(ImageNet('one way', 'nowhere.txt', 'names.txt')) == COUNT


@pytest.mark.parametrize('workers', [0, 2])
def test_loaders(workers, folder):
    make_ours()
    dataset = ImageNet('ours', 'nowhere.txt', 'names.txt', random_flip=False)
    batches = list(build_dataloader(dataset, 4, workers))
    latents = torch.cat([batch['latents'] for batch in batches])
    assert torch.equal(latents, LatentCache('ours').batch(range(COUNT)))


def test_interrupted_and_gone_on_with(folder, monkeypatch):
    make_ours('whole')
    encode, count = Averages.encode, []

    def killed(self, *args, **options):
        count.append(1)
        if len(count) > 6:
            raise KeyboardInterrupt
        return encode(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Averages, 'encode', killed)
        with pytest.raises(KeyboardInterrupt):
            make_ours()
    assert not (folder / 'ours' / INDEX_FILE).exists()
    vae = Averages()
    assert make_ours(made=vae)
    assert vae.seen == 2 * (COUNT - 4)
    assert content_of(folder / 'ours') == content_of(folder / 'whole')
    assert not make_ours()


def test_published_files_that_are_there_are_kept(folder):
    make_published('whole')
    make_published()
    kept = folder / 'published' / 'n1' / '5.pth'
    before = kept.stat().st_mtime_ns
    (folder / 'published.txt').unlink()
    (folder / 'published' / 'n0' / '4.pth').unlink()
    damaged = folder / 'published' / 'n1' / '9.pth'
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (folder / 'published' / 'notes.txt').write_text('mine')
    assert make_published() == 2
    assert kept.stat().st_mtime_ns == before
    assert (folder / 'published' / 'notes.txt').read_text() == 'mine'
    (folder / 'published' / 'notes.txt').unlink()
    assert tensors_of(folder / 'published') == tensors_of(folder / 'whole')
    assert (folder / 'published.txt').read_text() == (folder / 'whole.txt').read_text()


def tensors_of(path):
    files = sorted(path.rglob('*.pth'))
    return {file.relative_to(path): torch.load(file, weights_only=True)['x'].tolist() for file in files}


def test_files_of_another_label_are_not_overwritten(folder):
    (folder / 'published' / 'n0').mkdir(parents=True)
    torch.save({'x': torch.ones(3, 4, 4), 'y': torch.tensor(99)}, folder / 'published' / 'n0' / '0.pth')
    with pytest.raises(CacheError, match=r'0\.pth has label 99, expected 0'):
        make_published()
    assert not (folder / 'published.txt').exists()


def test_other_images_or_options_are_another_cache(folder):
    make_ours()
    for changed in ({'seed': 8}, {'flip': 'none'}, {'posterior': 'argmax'}, {'dtype': torch.bfloat16}):
        with pytest.raises(CacheError, match='Nothing is overwritten'):
            make_ours(**changed)
    (folder / 'list.txt').write_text('n0/0.png 3\n')
    with pytest.raises(CacheError, match='Nothing is overwritten'):
        make_ours()


def test_published_files_made_differently_are_not_gone_on_with(folder):
    make_published()
    (folder / 'published' / 'n0' / '4.pth').unlink()
    before = tensors_of(folder / 'published')
    for changed in ({'seed': 8}, {'flip': 'none'}, {'posterior': 'argmax'}, {'dtype': torch.bfloat16}):
        with pytest.raises(CacheError, match=r'published\.plan\.json.*Nothing is overwritten'):
            make_published(**changed)
    (folder / 'published.plan.json').unlink()
    with pytest.raises(CacheError, match=r'pth is of torch\.float32, expected torch\.bfloat16'):
        make_published(dtype=torch.bfloat16)
    assert tensors_of(folder / 'published') == before
    assert make_published() == 1


def test_the_list_of_another_cache_is_not_overwritten(folder):
    (folder / 'published.txt').write_text('n0/0.pth 4\n')
    with pytest.raises(CacheError, match=r'published\.txt is there and lists other files'):
        make_published()
    assert (folder / 'published.txt').read_text() == 'n0/0.pth 4\n'


def test_damaged_latents_are_named(folder):
    make_ours()
    path = folder / 'ours' / 'latents-000001.safetensors'
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    cache = LatentCache('ours')
    with pytest.raises(CacheError, match=r'mirrored of image n1/7\.png in .*latents-000001'):
        cache.batch([1, 7], [False, True])
    assert [where for where, error in cache.check() if error] == [f'image n1/7.png in {"ours/" + path.name}']


def test_labels_are_needed(folder):
    (folder / 'list.txt').write_text('n0/0.png\n')
    with pytest.raises(ValueError, match=r'n0/0\.png has no label'):
        encoder()


def test_names_that_differ_only_in_their_extension(folder):
    (folder / 'list.txt').write_text('n0/0.png 0\nn0/0.jpg 0\n')
    with pytest.raises(ValueError, match='share a name'):
        make_published()


def test_latents_that_are_not_finite_are_refused(folder):
    with pytest.raises(CacheError, match='not finite'):
        make_ours(made=Averages(noise=float('inf')))
    assert not (folder / 'ours' / INDEX_FILE).exists()


def _make(ranks, folder):
    import os

    os.chdir(folder)
    return make_ours('two', ranks=ranks), make_published('two published', ranks=ranks)


@pytest.mark.slow
def test_two_processes_make_the_same(folder):
    make_ours('one')
    make_published('one published')
    assert run_processes(_make, 2, folder) == [(True, COUNT)] * 2
    assert content_of(folder / 'two') == content_of(folder / 'one')
    assert tensors_of(folder / 'two published') == tensors_of(folder / 'one published')
