import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.datasets.checkerboard import CheckerboardData
from lakonlab.datasets.loader import build_dataloader
from lakonlab.registry import DATASETS

COUNT = 40_000


def draw(count=COUNT, **arguments):
    return CheckerboardData(**arguments).points(range(count)).double()


def on_the_board(points, scale=1.0, shift=(0, 0), degrees=0.0, n_rc=4):
    """Coordinates counted in squares from the corner, by complex arithmetic instead of matrices."""
    plane = torch.complex(points[:, 0] - shift[0], points[:, 1] - shift[1])
    turned = plane * torch.polar(torch.tensor(1.0).double(), torch.deg2rad(torch.tensor(-degrees).double()))
    return (torch.view_as_real(turned) / scale + 1) * n_rc / 2


def test_points_are_uniform_on_the_white_squares():
    squares = on_the_board(draw())
    column, row = squares.floor().long().unbind(dim=1)
    assert column.min() == row.min() == 0
    assert column.max() == row.max() == 3
    assert ((column + row) % 2 == 0).all()
    # each eighth-by-eighth cell of each of the 8 squares holds its share: chi squared, 511 degrees of freedom
    inside = squares - squares.floor()
    cell = (inside * 8).long().clamp(max=7)
    numbers = ((column * 4 + row) * 64 + cell[:, 0] * 8 + cell[:, 1]).bincount(minlength=16 * 64)
    numbers = numbers.view(16, 64)[numbers.view(16, 64).sum(dim=1) > 0].double()
    assert numbers.shape[0] == 8
    expected = COUNT / numbers.numel()
    assert ((numbers - expected).square() / expected).sum() < 511 + 5 * (2 * 511) ** 0.5


@given(
    n_rc=st.integers(1, 5),
    scale=st.floats(0.1, 10),
    shift=st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
    degrees=st.floats(-180, 180),
    thickness=st.floats(0.05, 1),
)
@settings(deadline=None, max_examples=25)
def test_board_is_scaled_turned_and_shifted(n_rc, scale, shift, degrees, thickness):
    points = draw(500, n_rc=n_rc, scale=scale, shift=shift, rotation=degrees, thickness=thickness)
    squares = on_the_board(points, scale, shift, degrees, n_rc)
    tolerance = 1e-5 * n_rc * (1 + max(map(abs, shift)) / scale)  # single precision of the points
    centre = squares.floor() + 0.5
    distance = (squares - centre).abs().amax(dim=1)
    assert (distance >= (1 - thickness) / 2 - tolerance).all()
    away_from_edges = distance < 0.5 - tolerance
    assert (centre[away_from_edges].sum(dim=1) % 2 == 1).all()  # i + 0.5 + j + 0.5 with i + j even


def test_hollow_squares_are_uniform_on_their_frames():
    squares = on_the_board(draw(thickness=0.4))
    distance = (squares - squares.floor() - 0.5).abs().amax(dim=1)
    assert distance.min() >= 0.3 - 1e-6
    # the area within distance d of the centre grows as d^2
    share = (distance < 0.4).double().mean()
    expected = (0.4**2 - 0.3**2) / (0.5**2 - 0.3**2)
    assert abs(share - expected) < 5 * (expected * (1 - expected) / COUNT) ** 0.5
    angle = torch.atan2(*(squares - squares.floor() - 0.5).unbind(dim=1))
    quarters = ((angle / torch.pi + 1) * 2).long().clamp(max=3).bincount(minlength=4)
    assert (quarters - COUNT / 4).abs().max() < 5 * (COUNT * 3 / 16) ** 0.5


def test_item_is_a_function_of_seed_and_number():
    data = CheckerboardData(seed=3)
    indices = [99_999_999, 0, 7, 8, 7, 5_000_000]
    together = data.__getitems__(indices)
    assert [item['ids'] for item in together] == indices
    for index, item in zip(indices, together):
        assert item['x'].shape == (2,)
        assert item['x'].dtype == torch.float32
        assert torch.equal(CheckerboardData(seed=3, n_samples=1e8)[index]['x'], item['x'])
    assert torch.equal(together[2]['x'], together[4]['x'])
    assert not torch.equal(CheckerboardData(seed=4).points(range(4)), data.points(range(4)))
    assert not torch.equal(CheckerboardData(seed=3, test_mode=True).points(range(4)), data.points(range(4)))


@pytest.mark.parametrize('workers', [0, 2])
def test_loader_resumes_and_needs_no_array_as_long_as_the_data(workers):
    data = DATASETS.build(dict(type='CheckerboardData', n_samples=10**15, scale=4))
    start = 10**12
    loader = build_dataloader(data, 6, workers, shuffle=True, seed=1, start_iter=start)
    for iteration, batch in enumerate(itertools.islice(loader, 3), start):
        assert batch['ids'] == list(range(iteration * 6, iteration * 6 + 6))
        assert torch.equal(batch['x'], data.points(batch['ids']))


@pytest.mark.parametrize(
    'arguments',
    [
        {'n_rc': 0},
        {'n_rc': 2.5},
        {'n_samples': 0},
        {'n_samples': 1.5},
        {'thickness': 0},
        {'thickness': 1.1},
        {'scale': 0},
        {'shift': [0]},
    ],
)
def test_impossible_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f'^{name}='):
        CheckerboardData(**arguments)


def test_item_out_of_range():
    data = CheckerboardData(n_samples=10)
    assert len(data) == 10
    for index in (-1, 10):
        with pytest.raises(IndexError, match='data set of 10'):
            data[index]
