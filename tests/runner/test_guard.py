"""The limit of skipped iterations."""

import pytest

from lakonlab.runner.guard import SkipGuard, TrainingDivergedError

LR = {'diffusion': 2e-3}


def test_only_consecutive_ones_count():
    guard = SkipGuard(max_skipped_iters=2)
    for iteration in range(6):
        guard.update(iteration, ('diffusion',) if iteration % 2 else (), {'loss': 1.0}, LR)
    assert (guard.in_a_row, guard.total) == (1, 3)


def test_message_names_what_happened_and_what_to_do():
    guard = SkipGuard(max_skipped_iters=2)
    logs = {'loss_diffusion': float('inf'), 'loss_other': 1.0, 'diffusion_grad_norm': float('nan')}
    guard.update(7, ('diffusion',), logs, LR)
    with pytest.raises(TrainingDivergedError) as error:
        guard.update(8, ('diffusion',), logs, LR)
    message = str(error.value)
    for part in ('iteration 9', 'diffusion 2.000e-03', 'loss_diffusion=inf', 'warmup_iters', 'max_skipped_iters'):
        assert part in message
    assert 'loss_other' not in message


def test_gradient_that_is_too_large(caplog):
    SkipGuard().update(0, ('diffusion',), {'loss': 1.0, 'diffusion_grad_norm': float('nan')}, LR)
    assert 'grad_clip_skip_ratio' in caplog.text


def test_state():
    guard, other = SkipGuard(), SkipGuard()
    guard.update(0, ('diffusion',), {}, LR)
    other.load_state_dict(guard.state_dict())
    assert (other.in_a_row, other.total) == (1, 1)


def test_limit_is_checked():
    with pytest.raises(ValueError, match='max_skipped_iters=0'):
        SkipGuard(0)
