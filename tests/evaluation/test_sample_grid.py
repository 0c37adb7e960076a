import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from lakonlab.evaluation.images import ImageFolder
from lakonlab.evaluation.sample_grid import in_one_size, make_grid, sample_grid, shrunk, with_captions, wrapped

FONT = ImageFont.load_default(10)


def test_grid_is_row_by_row():
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(40, 1).repeat(40, 2).repeat(3, 3)
    grid = make_grid(pixels, columns=3)
    assert grid.shape == (2 * 42 + 2, 3 * 42 + 2, 3)
    assert [grid[10 + 42 * row, 10 + 42 * column, 0] for row in (0, 1) for column in (0, 1, 2)] == [0, 1, 2, 3, 4, 96]


def test_images_of_several_sizes_are_centred_in_one_grid():
    images = [np.full((4, 8, 3), 10, np.uint8), np.full((6, 2, 3), 20, np.uint8)]
    cells = in_one_size(images)
    assert cells.shape == (2, 6, 8, 3)
    assert cells[0, :, 0, 0].tolist() == [96, 10, 10, 10, 10, 96]
    assert cells[1, 0, :, 0].tolist() == [96, 96, 96, 20, 20, 96, 96, 96]
    assert [(cells[row] != 96).sum() for row in range(2)] == [4 * 8 * 3, 6 * 2 * 3]


def test_small_images_are_enlarged_and_large_ones_shrunk(tmp_path):
    dot = np.zeros((8, 5, 3), np.uint8)
    dot[2, 3] = 255
    grid = sample_grid([dot], [''])
    assert grid.shape == (8 * 8 + 4, 5 * 8 + 4, 3)
    assert (grid[2:-2, 2:-2] == dot.repeat(8, 0).repeat(8, 1)).all()
    assert shrunk(np.full((1024, 512, 3), 7, np.uint8)).shape == (512, 256, 3)
    folder = ImageFolder(tmp_path)
    folder.add(torch.rand(4, 3, 768, 768), range(4), ['a'] * 4)
    assert folder.finish().shape == (2 * (512 + 12 + 2) + 2, 2 * (512 + 2) + 2, 3)


@pytest.mark.parametrize('size', [(512, 512), (288, 512), (512, 64), (1, 512)])
@pytest.mark.parametrize('count', [1, 2, 7, 60, 90, 100])
def test_a_grid_is_no_larger_than_logs_can_take(size, count):
    """And nearly as large, unless the images are small."""
    image = np.full((*size, 3), 200, np.uint8)
    grid = sample_grid([image[: size[0] // 2 + 1], *[image] * (count - 1)], ['one two three four ' * 20] * count)
    assert max(grid.shape) <= 2048
    assert count < 60 or max(grid.shape) > 1900


def test_shrinking_is_antialiased():
    """Thin lines become their mean instead of coming and going."""
    lines = np.zeros((512, 512, 3), np.uint8)
    lines[::2] = 255
    cell = sample_grid([lines] * 100, [''] * 100)[2:160, 2:160]
    assert abs(cell[8:-8].astype(float) - 127.5).max() < 6


def test_captions_are_below_their_images():
    cells = np.full((3, 64, 64, 3), 50, np.uint8)
    found = with_captions(cells, ['', 'class 3', 'class 3'])
    assert found.shape == (3, 64 + 12, 64, 3)
    assert (found[:, :64] == cells).all()
    below = found[:, 64:]
    assert not below[0].any()
    assert below[1].max() > 200
    assert (below[1] == below[2]).all()
    assert (below[1] != with_captions(cells, ['', 'class 4', ''])[1, 64:]).any()
    assert with_captions(cells, [''] * 3).shape == cells.shape


@pytest.mark.parametrize(
    ('text', 'lines'),
    [
        ('', []),
        (' a  b\nc ', ['a b c']),
        ('one two three four five six seven eight nine', None),
        ('x' * 100, None),
        ('\u4e00' * 50, None),
        ('\ud83d half and \u0642\u0637\u0629', None),
    ],
)
def test_wrapping(text, lines):
    found = wrapped(text, FONT, 64)
    assert len(found) <= 3
    assert all(FONT.getlength(line) <= 64 for line in found)
    if lines is not None:
        assert found == lines
    joined = ''.join(found).removesuffix('...').replace(' ', '')
    assert ''.join(text.encode(errors='replace').decode().split()).startswith(joined)
    Image.fromarray(with_captions(np.zeros((1, 64, 64, 3), np.uint8), [text])[0])


def test_long_texts_end_with_an_ellipsis():
    assert wrapped('one two three four five six seven eight nine', FONT, 64)[-1].endswith('...')
    assert wrapped('one two three four', FONT, 64) == ['one two three', 'four']
