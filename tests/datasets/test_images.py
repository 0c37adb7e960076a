"""Images are read and scaled as closed forms and PIL itself say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lakonlab.datasets.images import adm_square, as_tensor, centre_crop, cover, read_rgb


@pytest.mark.parametrize('mode', ['CMYK', 'P', 'L', 'RGB', 'RGBA', 'LA'])
def test_any_kind_of_image_becomes_rgb(tmp_path, mode):
    path = tmp_path / ('x.jpg' if mode == 'CMYK' else 'x.png')
    image = Image.new('RGB', (50, 90), (250, 10, 20))
    (image.quantize() if mode == 'P' else image.convert(mode)).save(path)
    found = as_tensor(adm_square(read_rgb(path), 16))
    grey = 0.299 * 250 + 0.587 * 10 + 0.114 * 20
    expected = torch.full((3,), grey) if mode in ('L', 'LA') else torch.tensor([250, 10, 20])
    assert found.shape == (3, 16, 16)
    assert (found * 255 - expected[:, None, None]).abs().max() < 4


def test_transparency_is_dropped_not_blended(tmp_path):
    Image.new('RGBA', (4, 4), (200, 100, 50, 0)).save(tmp_path / 'x.png')
    assert np.array_equal(np.asarray(read_rgb(tmp_path / 'x.png'))[0, 0], [200, 100, 50])


def test_shrinking_averages_and_crops_the_centre():
    # three fields of 64 x 64: the middle one is what the centre crop keeps
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = np.indices((64, 64)).sum(axis=0)[..., None] % 2 * 200
    image = as_tensor(adm_square(Image.fromarray(pixels), 16))
    assert torch.allclose(image, torch.tensor(100 / 255), atol=1e-6)


@pytest.mark.parametrize('content', [b'', b'no image', None])
def test_what_is_no_whole_image_is_named(tmp_path, content):
    path = tmp_path / 'x.png'
    if content is None:
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:-400]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'x\.png: \d+ bytes are no whole image'):
        read_rgb(path)


@settings(deadline=None, max_examples=60)
@given(*[st.integers(1, 40)] * 4, st.sampled_from(['bicubic', 'lanczos']))
def test_covering_gives_the_size_and_keeps_one_colour(width, height, to_width, to_height, method):
    found = cover(Image.new('RGB', (width, height), (10, 200, 30)), to_height, to_width, method)
    assert found.size == (to_width, to_height)
    assert np.unique(np.asarray(found).reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]


def test_covering_resizes_the_shorter_side_and_crops_the_longer():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(cover(image, 20, 48)), pixels)
    assert np.array_equal(np.asarray(cover(image, 20, 30)), pixels[:, 9:39])
    expected = image.resize((24, 10), Image.Resampling.LANCZOS).crop((7, 0, 17, 10))
    assert np.array_equal(np.asarray(cover(image, 10, 10, 'lanczos')), np.asarray(expected))


def test_an_odd_pixel_is_cropped_from_right_and_bottom():
    pixels = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(pixels), 2, 3)), pixels[1:3, 0:3])


def test_values_are_bytes_over_255():
    image = as_tensor(Image.fromarray(np.array([[[0, 51, 255]]], np.uint8)))
    assert image.dtype == torch.float32
    assert torch.equal(image.flatten(), torch.tensor([0, 0.2, 1]))
