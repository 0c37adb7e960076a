"""Images beside prompts: which belongs to which, and to what size they are brought."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lakonlab.datasets.image_prompt import ImagePrompt
from lakonlab.datasets.paired_images import Scaling
from tests.datasets.prompt_files import PROMPTS, text_source, write_datalist, write_images


@pytest.fixture
def with_images(tmp_path):
    """Builds a data set of three prompts with images of 16 x 32, 32 x 16 and 40 x 50 pixels; a multiple is 8."""
    sizes = [(16, 32), (32, 16), (40, 50)]
    pixels = write_images(tmp_path / 'images', sizes)

    def build(**arguments):
        return ImagePrompt(
            str(tmp_path),
            prompt_dataset_kwargs=text_source(tmp_path, PROMPTS[:3]),
            latent_size=(4, 1, 1),
            vae_scale_factor=4,
            **{'image_dir': 'images', **arguments},
        )

    return build, pixels, tmp_path


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0.1, 3),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_targets_are_multiples_nearest_to_the_scaled_size(height, width, factor, rows, columns):
    for found, length, multiple in zip(
        Scaling(factor, 'bicubic', (rows, columns)).target((height, width)), (height, width), (rows, columns)
    ):
        assert found % multiple == 0
        assert found >= multiple
        assert found == multiple or abs(found - length * factor) <= multiple / 2 + 1e-6


def test_images_of_a_folder_by_name(with_images):
    build, pixels, _ = with_images
    data = build()
    assert data.has_images
    first = data[0]
    assert torch.equal(first['images'], torch.from_numpy(pixels[0]).permute(2, 0, 1).float() / 255)
    assert 'latent_size' not in first
    # 40 x 50 covers 40 x 48: what is not a multiple of 8 is cropped from both sides
    assert data[2]['images'].shape == (3, 40, 48)
    assert torch.equal(data[2]['images'], torch.from_numpy(pixels[2][:, 1:49]).permute(2, 0, 1).float() / 255)


def test_noise_of_the_size_of_the_image(with_images):
    build, _, _ = with_images
    data = build(test_mode=True, image_scale_factor=0.5)
    assert data[2]['noise'].shape == (4, 4, 6)  # 20 x 25 pixels: 16 x 24 (20 / 8 rounds to even) or 24 x 24
    assert 'images' not in data[2]


def test_scaling_is_that_of_pil(with_images):
    build, pixels, _ = with_images
    image = build(image_scale_factor=0.5, image_scale_method='lanczos')[0]['images']
    expected = Image.fromarray(pixels[0]).resize((16, 8), Image.Resampling.LANCZOS)
    assert np.array_equal((image * 255).round().permute(1, 2, 0).numpy(), np.asarray(expected))


def test_a_list_gives_order_size_and_buckets(with_images):
    build, pixels, folder = with_images
    path = write_datalist(
        folder / 'images.jsonl', ['002', '000', '001'], image_size=[[16, 16], [16, 32], [16, 16]], bucket_id=[5, 6, 5]
    )
    data = build(image_datalist_path=path, bucketize=True)
    assert data[0]['images'].shape == (3, 16, 16)
    expected = Image.fromarray(pixels[2]).resize((20, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))
    assert np.array_equal((data[0]['images'] * 255).round().permute(1, 2, 0).numpy(), np.asarray(expected))
    assert torch.equal(data[1]['images'], torch.from_numpy(pixels[0]).permute(2, 0, 1).float() / 255)
    assert list(data.bucket_ids) == [5, 6, 5]
    write_datalist(folder / 'images.jsonl', ['002', '000', '001'], image_size=[[16, 16], [16, 32], [16, 16]])
    ids = build(image_datalist_path=path, bucketize=True).bucket_ids
    assert ids[0] == ids[2] != ids[1]


def test_images_to_be_edited(with_images):
    build, _, folder = with_images
    pixels = write_images(folder / 'before', [(8, 8)] * 3)
    arguments = dict(condition_image_dir='before', condition_image_scale_factor=2.0, test_mode=True)
    item = build(image_dir=None, **arguments)[1]
    expected = Image.fromarray(pixels[1]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal((item['condition_images'] * 255).round().permute(1, 2, 0).numpy(), np.asarray(expected))
    assert item['noise'].shape == (4, 1, 1)


def test_what_does_not_fit_is_refused(with_images):
    build, _, folder = with_images
    with pytest.raises(FileNotFoundError, match=r"image_dir=.*pictures': there is no such folder"):
        build(image_dir='pictures')[0]
    with pytest.raises(FileNotFoundError, match=r'image_datalist_path=.*none\.json'):
        build(image_datalist_path=str(folder / 'none.json'))[0]
    with pytest.raises(FileNotFoundError, match=r"image_dir=.*ends in '\.jpg'"):
        build(image_extension='.jpg')[0]
    with pytest.raises(FileNotFoundError, match='condition_image_dir='):
        build(condition_image_dir='none')[0]
    (folder / 'images' / '002.png').unlink()
    with pytest.raises(ValueError, match="image_dir='images': there are 2 images and 3 prompts"):
        build()[0]
    path = write_datalist(folder / 'images.jsonl', ['000', '001', '002'])
    with pytest.raises(FileNotFoundError, match=r'002\.png'):
        build(image_datalist_path=path)[2]
