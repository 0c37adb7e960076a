import numpy as np
import torch
from PIL import Image

from lakonlab.ui.toy_trajectory import loss_picture, trajectory_picture


def pixels_of(path):
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


def share_of(pixels, colour):
    return (np.abs(pixels - np.array(colour)).max(axis=-1) <= 2).mean()


def test_images_and_curves_are_drawn(tmp_path):
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    red_green_blue = colours[:, :, None, None].expand(3, 3, 8, 8)
    grey = torch.full((3, 1, 8, 8), 0.5)
    errors = {'before': [0, 0.5, 1.0], 'after': [0, 0.1, 0.1]}
    path = tmp_path / 'picture.png'
    trajectory_picture({'a\nb': red_green_blue, 'c': grey}, [1, 0.5, 0], errors, [1, 0.5, 0], path)
    pixels = pixels_of(path)
    shares = [share_of(pixels, [255 * c for c in colour]) for colour in colours.tolist()]
    assert min(shares) > 0.01
    assert max(shares) < 1.1 * min(shares)  # cells of one size
    assert share_of(pixels, [127, 127, 127]) > 2.5 * min(shares)  # one of three columns each, against a whole row
    columns = [np.abs(pixels - np.array([255 * c for c in colour])).max(axis=-1) <= 2 for colour in colours.tolist()]
    centres = [mask.nonzero()[1].mean() for mask in columns]
    assert centres == sorted(centres)


def test_wide_images_keep_their_shape(tmp_path):
    image = torch.zeros(1, 3, 4, 8)
    image[:, 0] = 1
    path = tmp_path / 'wide.png'
    trajectory_picture({'a': image}, [1.0], {'e': [0.0, 1.0]}, [1.0, 0.0], path)
    rows, columns = ((np.abs(pixels_of(path) - [255, 0, 0]).max(axis=-1) <= 2).any(axis=axis).sum() for axis in (1, 0))
    assert abs(columns / rows - 2) < 0.1


def test_losses_of_any_number(tmp_path):
    for losses in ([0.5], [1.0, 0.1], np.geomspace(1, 1e-4, 1000).tolist()):
        path = tmp_path / f'{len(losses)}.png'
        loss_picture(losses, path)
        assert pixels_of(path).std() > 5
