import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from lakonlab.datasets.checkerboard import CheckerboardData
from lakonlab.ui.toy_histogram import histogram, picture, save_picture, share_on_white_squares, writable_picture


def test_histogram_counts_as_numpy_does():
    points = 3 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    expected, _, _ = np.histogram2d(*points.double().T.numpy(), bins=20, range=[[-4.2, 4.2]] * 2)
    assert np.array_equal(histogram(points, 20).numpy(), expected.T[::-1])


def test_points_outside_or_nowhere_are_left_out():
    points = torch.tensor([[5.0, 0.0], [0.0, -5.0], [float('nan'), 0.0], [float('inf'), 0.0], [4.1, 4.1]])
    counts = histogram(points, 4)
    assert counts.sum() == 1
    assert counts[0, 3] == 1  # above and to the right


def test_the_published_scale_of_colours():
    # 1,000,000 points of which 80 lie in one of 200 x 200 cells: half of the brightest count
    points = torch.full((1_000_000, 2), 100.0)
    points[:80] = 0.01
    pixels = picture(points)
    assert pixels.shape == (200, 200, 3)
    viridis = colormaps['viridis']
    assert tuple(pixels[99, 100]) == viridis(0.5, bytes=True)[:3]
    assert tuple(pixels[0, 0]) == viridis(0.0, bytes=True)[:3]


@pytest.mark.parametrize('cells', [200, 100, 50])
def test_colour_depends_on_density_alone(cells):
    points = (torch.rand(400_000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 4.2
    expected = np.array(colormaps['viridis'](1e6 / 200**2 / 160, bytes=True)[:3])
    assert np.abs(picture(points, cells).mean(axis=(0, 1)) - expected).max() < 2.5


def test_share_on_white_squares():
    white = CheckerboardData(scale=4).points(range(1000))
    black = CheckerboardData(scale=4, rotation=90).points(range(1000))
    assert share_on_white_squares(white * 0.999, 4) > 0.99
    assert share_on_white_squares(black * 0.999, 4) < 0.01
    assert share_on_white_squares(torch.cat([white, torch.full((1000, 2), 9.0)]), 4) == pytest.approx(0.5, abs=0.01)


def test_saved_and_read(tmp_path):
    pixels = picture(torch.randn(10_000, 2), 100)
    path = writable_picture(tmp_path / 'new' / 'folder' / 'picture.png')
    save_picture(pixels, path)
    assert np.array_equal(np.asarray(Image.open(path)), pixels)


def test_refusals(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder.png').mkdir()
    for path, message in {'x.jpg': 'png', 'folder.png': 'is a directory', 'file/x.png': 'cannot be written'}.items():
        with pytest.raises(ValueError, match=message):
            writable_picture(tmp_path / path)
    with pytest.raises(ValueError, match='no points'):
        picture(torch.zeros(0, 2))
    with pytest.raises(ValueError, match='cells=3: expected a divisor of 200'):
        picture(torch.zeros(1, 2), 3)
