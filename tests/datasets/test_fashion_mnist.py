"""Fashion-MNIST: the real files, hand-made ones, and what is wrong with either."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lakonlab.datasets.fashion_mnist import CLASS_NAMES, FashionMNIST, coverage, read_idx, shrink
from lakonlab.registry import DATASETS
from tests.debian_packages import needs


def idx(array):
    """An array of bytes in the format of the files."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


@pytest.fixture
def folder(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    (tmp_path / 'train-images-idx3-ubyte.gz').write_bytes(idx(pictures))
    (tmp_path / 'train-labels-idx1-ubyte.gz').write_bytes(idx(np.array([3, 0, 9, 1, 1, 2])))
    return tmp_path, pictures


def test_pictures_are_the_pixels_of_the_files(folder):
    path, pictures = folder
    data = pickle.loads(pickle.dumps(FashionMNIST(data_root=str(path))))
    assert len(data) == 6
    item = data[2]
    assert torch.equal(item['latents'], torch.from_numpy(pictures[2] / 127.5 - 1).float()[None])
    assert (item['labels'], item['name'], item['ids'], item['negative_labels']) == (9, 'ankle boot', 2, 10)
    assert item['labels'].dtype == torch.int64
    assert 'negative_labels' not in FashionMNIST(data_root=str(path), negative_label=None)[0]
    with pytest.raises(IndexError, match='FashionMNIST data set of 6'):
        data[6]


def test_smaller_pictures_are_averages(folder):
    path, pictures = folder
    halved = FashionMNIST(data_root=str(path), image_size=14)[0]['latents']
    means = pictures[0].reshape(14, 2, 14, 2).mean(axis=(1, 3)) / 127.5 - 1
    torch.testing.assert_close(halved, torch.from_numpy(means).float()[None])


@given(st.integers(1, 40), st.integers(1, 40))
def test_parts_of_pixels_are_shared_out(length, size):
    size = min(size, length)
    weights = coverage(length, size)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(size, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(dim=0), torch.full((length,), size / length, dtype=torch.float64))
    # where a picture is enlarged to a multiple of both sizes, averaging over blocks is the same
    line = torch.randn(length, dtype=torch.float64)
    expected = line.repeat_interleave(size).reshape(size, length).mean(dim=1)
    torch.testing.assert_close(weights @ line, expected)


def test_brightness_is_kept():
    picture = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    for size in (28, 16, 5, 1):
        torch.testing.assert_close(
            shrink(picture, size).mean(), (picture.double().mean() / 127.5 - 1).float(), atol=1e-5, rtol=0
        )


def test_sampling_needs_no_files():
    data = FashionMNIST(data_root='none', image_size=16, test_mode=True, num_test_images=12)
    assert [int(data[i]['labels']) for i in range(12)] == [*range(10), 0, 1]
    expected = torch.randn((1, 16, 16), generator=torch.Generator().manual_seed(1007))
    assert torch.equal(data[7]['noise'], expected)
    assert data[7]['name'] == CLASS_NAMES[7]


@needs('dataset-fashion-mnist')
def test_the_real_files():
    train, val = (DATASETS.build(dict(type='FashionMNIST', split=split)) for split in ('train', 'val'))
    assert (len(train), len(val)) == (60000, 10000)
    assert train._pictures.mean() / 255 == pytest.approx(0.2860, abs=1e-4)  # as widely published
    assert train._pictures.std() / 255 == pytest.approx(0.3530, abs=1e-4)
    assert np.bincount(train._labels).tolist() == [6000] * 10
    assert np.bincount(val._labels).tolist() == [1000] * 10
    assert train[0]['name'] == 'ankle boot'


def test_missing_files_name_the_package(tmp_path):
    message = r'there is no train-\w+-idx\d-ubyte\.gz; apt-get install dataset-fashion-mnist'
    with pytest.raises(FileNotFoundError, match=message):
        FashionMNIST(data_root=str(tmp_path))[0]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'x', 'no whole gzip file'),
        (idx(np.zeros((2, 3)))[:-6], 'no whole gzip file'),
        (idx(np.zeros((2, 3)))[:12] + b'\xff' + idx(np.zeros((2, 3)))[13:], 'no whole gzip file'),
        (gzip.compress(b'\0\0\x0d\x02' + bytes(8), mtime=0), 'no IDX file of unsigned bytes with 2 dimensions'),
        (idx(np.zeros((2, 3, 4))), 'with 2 dimensions'),
        (gzip.compress(b'\0\0', mtime=0), 'no IDX file'),
        (gzip.compress(gzip.decompress(idx(np.zeros((2, 3))))[:-1], mtime=0), '5 values, expected 2 x 3'),
    ],
)
def test_damaged_files_are_named(content, message):
    with pytest.raises(ValueError, match=rf'the file: .*{message}'):
        read_idx(content, 2, 'the file')


def test_files_that_do_not_belong_together(folder):
    path, _ = folder
    (path / 'train-labels-idx1-ubyte.gz').write_bytes(idx(np.zeros(5)))
    with pytest.raises(ValueError, match='6 pictures and 5 labels'):
        FashionMNIST(data_root=str(path))[0]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(split='test'), "split='test': expected one of 'train', 'val'"),
        (dict(image_size=0), 'image_size=0'),
        (dict(image_size=32), 'image_size=32: expected 1 to 28'),
        (dict(num_test_images=0), 'num_test_images=0'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FashionMNIST(**arguments)
