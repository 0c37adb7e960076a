"""A save by two processes to an S3 server, one of which is killed at any request that changes something there.

What is left is looked at by a plain client. The same in one process, and with a server that refuses, is in
``test_remote_save.py``.
"""

import os

import pytest
import torch

from lakonlab.storage.checkpoint import find_checkpoint, write_checkpoint
from lakonlab.storage.pieces import Pieces
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.retention import prune
from tests import processes
from tests.object_store import BEST, superfluous, whole
from tests.processes import ProcessFailedError, workers  # noqa: F401
from tests.request_faults import RequestFault, failing


def save(ranks, run_dir, step, name, environment, fault=None, rank=None):
    """Save as one of two processes, each with half of the rows; returns this process's requests."""
    os.environ.update(environment)
    rows = torch.arange(12.0).view(2, 6) + 100 * step
    halves = {'weight': Pieces.stretch((2, 6), 6 * ranks.rank, rows[ranks.rank])}
    counted = fault if ranks.rank == rank else RequestFault(-1, 'die')
    with failing(counted):
        write_checkpoint(run_dir, step, {'model': halves}, {'iteration': step}, 'x = 1', name, ranks)
        if ranks.is_main:
            prune(run_dir, step, 2, None)
    return counted.seen


CASES = [
    (rank, name, number, how)
    for rank, name, count in ((1, None, 1), (0, None, 5), (0, BEST, 4))
    for number in range(count)
    for how in ('die', 'cut')
]
FEW = [(1, None, 0, 'cut'), (0, None, 2, 'cut'), (0, None, 3, 'die'), (0, BEST, 3, 'die')]


@pytest.mark.parametrize(
    'case', [case if case in FEW else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_killed(workers, s3_server, store, monkeypatch, case):  # noqa: F811
    monkeypatch.setattr(processes, 'GRACE_SECONDS', 30.0)  # the process that is left notices by itself
    rank, name, number, how = case
    environment = s3_server.environment()
    for step, other in ((4, BEST), (4, None), (6, None)):
        workers.run(save, store.run, step, other, environment)
    before = whole(store.objects())
    assert set(before) == {BEST, 'iter_4', 'iter_6'}
    with pytest.raises(ProcessFailedError) as died:
        workers.run(save, store.run, 8, name, environment, RequestFault(number, how, kill=True), rank, timeout=60)
    assert died.value.rank == rank
    left = whole(store.objects())
    final = name or 'iter_8'
    is_published = rank == 0 and number > 2
    assert (final in left and left[final] != before.get(final)) == is_published
    kept = {BEST, 'iter_6'} - ({final} if is_published else set())
    assert {key: left[key] for key in kept} == {key: before[key] for key in kept}
    assert find_checkpoint(store.run).name == ('iter_8' if is_published and name is None else 'iter_6')

    publisher_of(store.run).clean(store.run)
    requests = workers.run(save, store.run, 8, name, environment)
    assert all(requests)  # both processes write
    objects = store.objects()
    assert set(whole(objects)) == {'iter_6', BEST, 'iter_4' if name else 'iter_8'}
    assert not superfluous(objects)
