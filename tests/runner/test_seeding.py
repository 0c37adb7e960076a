"""Global random state."""

import random

import numpy as np
import torch

from lakonlab.runner.seeding import make_deterministic, seed_globals


def draw(*seeds):
    seed_globals(*seeds)
    return random.random(), np.random.rand(), torch.rand(()).item(), torch.nn.functional.dropout(torch.ones(64)).sum()


def test_state_is_a_function_of_seed_and_context():
    assert draw(1) == draw(1)
    assert draw(1, 5, 0) == draw(1, 5, 0)
    states = [draw(1), draw(2), draw(1, 0, 0), draw(1, 0, 1), draw(1, 1, 0), draw(2, 0, 0)]
    assert len({state[:3] for state in states}) == len(states)


def test_any_integer_is_a_seed():
    draw(2**40 + 3)
    draw(-1)


def test_seeds_like_torch_does():
    seed_globals(3)
    mine = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), mine)


def test_deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, before[1]
