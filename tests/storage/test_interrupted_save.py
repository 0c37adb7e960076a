"""A save by two processes that dies, or finds the disk full, at any of its file operations loses nothing."""

import contextlib
import hashlib
import json
import shutil

import pytest
import torch

from lakonlab.storage.checkpoint import content_digest, find_checkpoint, write_checkpoint
from lakonlab.storage.files import read_bytes
from lakonlab.storage.local import remove_stale_temporaries
from lakonlab.storage.pieces import Pieces
from lakonlab.storage.retention import prune
from tests import processes
from tests.faults import Fault, active
from tests.processes import ProcessFailedError, workers  # noqa: F401

BEST = 'best_loss'


def save(ranks, run_dir, step, name=None, fault=None, rank=None):
    """Save as one of two processes, each with half of the rows; returns the error if it cannot be done."""
    rows = torch.arange(12.0).view(2, 6) + 100 * step
    halves = {'weight': Pieces.stretch((2, 6), 6 * ranks.rank, rows[ranks.rank])}
    try:
        with active(fault if ranks.rank == rank else None):
            write_checkpoint(run_dir, step, {'model': halves}, {'iteration': step}, 'x = 1', name, ranks)
            if ranks.is_main:
                prune(run_dir, step, 2, None)
    except Exception as error:
        return str(error)


def restart(ranks, run_dir):
    """What a run does before it goes on."""
    ranks.on_main(lambda: remove_stale_temporaries(run_dir))


def is_complete(path):
    """Whether a checkpoint is there as a whole, by what its manifest says."""
    with contextlib.suppress(OSError):
        manifest = json.loads((path / 'manifest.json').read_text())
        folder = path / manifest['data'] if 'data' in manifest else path
        contents = {name: read_bytes(str(folder / name)) for name in manifest['files']}
        return all(
            hashlib.sha256(content).hexdigest() == manifest['files'][name]['sha256']
            for name, content in contents.items()
        )
    return False


def content(run_dir):
    """Names in the directory of a run -> what identifies the checkpoints among them."""
    return {path.name: content_digest(path) for path in run_dir.iterdir()}


@pytest.fixture(scope='module')
def before(workers, tmp_path_factory):  # noqa: F811
    """A run with two checkpoints and a best one."""
    run_dir = tmp_path_factory.mktemp('before')
    for step, name in ((4, BEST), (4, None), (6, None)):
        assert workers.run(save, run_dir, step, name) == [None, None]
    return run_dir


@pytest.fixture(scope='module')
def undisturbed(workers, before, tmp_path_factory):  # noqa: F811
    """Name -> content of the run after a further save, and the operations of each process."""

    def make(name):
        folder = tmp_path_factory.mktemp('undisturbed')
        operations = []
        for rank in range(2):
            run_dir, trace = folder / f'run{rank}', folder / f'{rank}.txt'
            shutil.copytree(before, run_dir)
            fault = Fault(f'.{name or "iter_8"}.tmp-', -1, 'kill', str(trace))
            assert workers.run(save, run_dir, 8, name, fault, rank) == [None, None]
            operations.append(trace.read_text().splitlines())
        return content(run_dir), operations

    return {name: make(name) for name in (None, BEST)}


@pytest.mark.parametrize(('rank', 'name'), [(0, None), (1, None), (0, BEST)])
@pytest.mark.parametrize('how', ['kill', 'full'])
def test_at_every_operation(workers, before, undisturbed, tmp_path, monkeypatch, rank, how, name):  # noqa: F811
    monkeypatch.setattr(processes, 'GRACE_SECONDS', 30.0)  # the process that is left notices by itself
    final = name or 'iter_8'
    whole, operations = undisturbed[name]
    for number in range(len(operations[rank])):
        run_dir, trace = tmp_path / str(number), tmp_path / f'{number}.txt'
        shutil.copytree(before, run_dir)
        arguments = (run_dir, 8, name, Fault(f'.{final}.tmp-', number, how, str(trace)), rank)
        if how == 'kill':
            with pytest.raises(ProcessFailedError) as died:
                workers.run(save, *arguments, timeout=30)
            assert died.value.rank == rank
        else:
            errors = workers.run(save, *arguments, timeout=30)
        done, failed = trace.read_text().splitlines()[:number], trace.read_text().splitlines()[number]
        where = f'{how} at {failed} after {done}'
        is_published = any(line.startswith('rename') and line.endswith(f'/{final}') for line in done)
        if how == 'full' and not is_published:
            assert all('No space left on device' in error and f'{final} failed' in error for error in errors), where
            assert content(run_dir) == content(before), where
        newest = 'iter_8' if is_published and name is None else 'iter_6'
        kept = {newest, 'iter_6', *(() if is_published and name is None else {'iter_4'})}
        assert find_checkpoint(run_dir).name == newest, where
        assert all(is_complete(path) for path in run_dir.glob('iter_*')), where
        workers.run(restart, run_dir)
        assert kept | {BEST} <= {path.name for path in run_dir.iterdir() if is_complete(path)}, where
        assert content(run_dir)[BEST] == (whole if is_published else content(before))[BEST], where
        workers.run(save, run_dir, 8, name)
        assert content(run_dir) == whole, where
