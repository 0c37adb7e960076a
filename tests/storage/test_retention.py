"""Which checkpoints stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakonlab.storage import local_publisher
from lakonlab.storage.retention import prune, steps_to_remove


@pytest.mark.parametrize(
    ('steps', 'max_keep', 'must_save', 'expected'),
    [
        ([100], 1, None, []),
        ([100, 200], 1, None, [100]),
        ([100, 200, 300], 2, None, [100]),
        ([100, 200, 300], -1, None, []),
        ([400, 800], 1, 800, [400]),
        ([800, 1200], 1, 800, []),
        ([800, 1200, 1600], 1, 800, [1200]),
        ([100, 500, 900], 1, None, [100, 500]),  # gaps do not end the search
        ([], 1, None, []),
    ],
)
def test_rules(steps, max_keep, must_save, expected):
    assert steps_to_remove(steps, max_keep, must_save) == expected


@given(
    st.lists(st.integers(1, 60), unique=True, min_size=1),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 20)),
)
def test_newest_and_milestones_are_never_removed(steps, max_keep, must_save):
    removed = steps_to_remove(steps, max_keep, must_save)
    assert set(removed) <= set(steps)
    assert max(steps) not in removed
    kept = set(steps) - set(removed)
    assert len(kept) >= min(max_keep, len(steps))
    if must_save:
        assert not [step for step in removed if step % must_save == 0]
    else:
        assert len(kept) <= max_keep


def make(run, *steps):
    for step in steps:
        (run / f'iter_{step}').mkdir()


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_prune(tmp_path):
    make(tmp_path, 100, 200, 300, 400)
    (tmp_path / 'best').mkdir()
    assert prune(tmp_path, 400, 1, 200) == [100, 300]
    assert names(tmp_path) == ['best', 'iter_200', 'iter_400']


def test_later_checkpoints_of_another_run_push_nothing_out(tmp_path):
    make(tmp_path, 100, 200, 900)
    assert prune(tmp_path, 200, 1, None) == [100]
    assert names(tmp_path) == ['iter_200', 'iter_900']


def test_failed_removal_is_tried_again(tmp_path, monkeypatch, caplog):
    make(tmp_path, 100, 200)

    def denied(path):
        raise PermissionError('denied')

    with monkeypatch.context() as patched:
        patched.setattr(local_publisher, 'remove_directory', denied)
        assert prune(tmp_path, 200, 1, None) == []
    assert 'iter_100 could not be removed' in caplog.text
    assert prune(tmp_path, 200, 1, None) == [100]
