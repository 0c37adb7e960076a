"""Evaluations that fail: what was trained is saved before the run ends, and what is owed is made up for."""

import pytest

from lakonlab.evaluation.metrics import Metric
from lakonlab.registry import METRICS
from lakonlab.storage import files
from lakonlab.storage.checkpoint import read_state
from tests.processes import ProcessFailedError, ProcessPool, workers  # noqa: F401
from tests.runner import small_run
from tests.storage.test_interrupted_save import is_complete


@pytest.fixture(scope='module')
def alone():
    """One process."""
    with ProcessPool(1) as pool:
        yield pool


@METRICS.register_module()
class Breakable(Metric):
    """Fails while a file is there; else its number is that of the evaluations of the entry so far.

    Args:
        file: The file.
        is_prepared: Whether it fails before anything is sampled, or with the numbers.
    """

    better = {'count': 'higher'}

    def __init__(self, file, is_prepared=False):
        super().__init__()
        self.file, self.is_prepared, self.count = file, is_prepared, 0

    def reset(self):
        """Nothing is kept."""

    def feed(self, batch):
        """Samples are not looked at."""

    def prepare(self, tag):
        """The first chance to fail."""
        if self.is_prepared:
            files.read_bytes(self.file)

    def compute(self):
        """The last one."""
        files.read_bytes(self.file)
        self.count += 1
        return {'count': self.count}

    def protocol(self):
        """Nothing has to be equal."""
        return {}


def entry(file, prefix, **options):
    """An evaluation that keeps its best checkpoint; every third iteration."""
    metric = dict(dict(type='Breakable', file=str(file)), **options.pop('metric', {}))
    return dict(
        dict(type='GenerativeEvalHook', prefix=prefix, interval=3, metrics=[metric], viz_num=0, save_best_ckpt=True),
        **options,
    )


def train(ranks, folder, entries, **changes):
    """Train to the end, or to an error; the first iteration, and what the error says."""
    with small_run.small_runner(
        ranks, folder, data__val=dict(type='SmallImages', size=5, key='noise'), evaluation=entries, **changes
    ) as runner:
        try:
            runner.train()
        except OSError as error:
            return runner.first_iter, str(error)
        return runner.first_iter, None


def saved(folder):
    """Iteration of every checkpoint."""
    paths = [path for path in small_run.checkpoints(folder).iterdir() if path.name != '.lock']
    assert all(is_complete(path) for path in paths)
    return {path.name: read_state(path)['iteration'] for path in paths}


@pytest.mark.parametrize(
    ('strategy', 'interval', 'asynchronous'),
    [
        ('ddp', 3, False),
        ('fsdp2', 100, False),
        pytest.param('ddp', 100, True, marks=pytest.mark.slow),
        pytest.param('fsdp', 100, False, marks=pytest.mark.slow),
        pytest.param('fsdp', 3, True, marks=pytest.mark.slow),
        pytest.param('fsdp2', 3, True, marks=pytest.mark.slow),
    ],
)
def test_the_iteration_is_saved_before_the_run_ends(workers, tmp_path, strategy, interval, asynchronous):  # noqa: F811
    """Whether it was to be saved or not; the first of three entries keeps its best, the others are owed."""
    good, broken = tmp_path / 'good', tmp_path / 'broken'
    good.touch()
    entries = [entry(good, 'a'), entry(broken, 'b'), entry(good, 'c')]
    changes = dict(
        strategy=strategy,
        total_iters=4,
        checkpoint_config=dict(interval=interval, asynchronous=asynchronous, max_keep_ckpts=1),
    )
    for start, error in workers.run(train, tmp_path, entries, timeout=60, **changes):
        assert start == 0
        assert 'broken' in error
    assert saved(tmp_path) == {'iter_3': 3, 'best_val_a_count': 3}
    state = read_state(small_run.checkpoints(tmp_path) / 'iter_3')
    hooks = [state['hooks'][f'GenerativeEvalHook.{number}'] for number in range(3)]
    assert [hook['owed'] for hook in hooks] == [None, 3, 3]
    assert [hook['best'][0]['value'] for hook in hooks] == [1, None, None]

    if interval == 3:  # it fails again when it is made up for, and then not
        again = workers.run(train, tmp_path, entries, timeout=60, **changes)
        assert [start for start, error in again if error] == [3, 3]
    broken.touch()
    assert workers.run(train, tmp_path, entries, timeout=60, **changes) == [(3, None)] * 2
    bests = {f'best_val_{name}_count': 3 for name in 'abc'}
    assert saved(tmp_path) == {'iter_4': 4, **bests}


def test_an_evaluation_of_the_last_iteration(alone, tmp_path):
    """Of a run without any due checkpoint before; the folder of images cannot be written to."""
    (tmp_path / 'viz').write_text('in the way')
    images = [entry(tmp_path / 'x', '', viz_num=2, viz_dir='viz/val', metrics=[], save_best_ckpt=False)]
    ((start, error),) = alone.run(train, tmp_path, images, total_iters=3, checkpoint_config__interval=100)
    assert start == 0
    assert 'viz' in error
    assert saved(tmp_path) == {'iter_3': 3}
    (log,) = (tmp_path / 'work_dirs' / small_run.NAME).glob('*.log')
    assert 'ERROR - evaluation val after iteration 3 has failed: NotADirectoryError: ' in log.read_text()
    (tmp_path / 'viz').unlink()
    assert alone.run(train, tmp_path, images, total_iters=3, checkpoint_config__interval=100) == [(3, None)]
    assert (tmp_path / 'viz' / 'val' / '3' / 'grid.png').is_file()


def test_without_a_place_for_checkpoints(alone, tmp_path):
    entries = [entry(tmp_path / 'broken', '', save_best_ckpt=False, metric=dict(is_prepared=True))]
    ((start, error),) = alone.run(train, tmp_path, entries, total_iters=4, checkpoint_config=None)
    assert start == 0
    assert 'broken' in error
    assert not (tmp_path / 'checkpoints').exists()


def fail_alone(ranks, folder, **changes):
    """Train, with samples that one process cannot make."""
    with small_run.small_runner(ranks, folder, **changes) as runner:
        if ranks.rank == 1:
            runner.model.val_step = None
        runner.train()


@pytest.mark.parametrize(
    ('strategy', 'found'),
    [('ddp', {'iter_3': 3}), ('fsdp2', None), pytest.param('fsdp', None, marks=pytest.mark.slow)],
)
def test_an_error_of_one_process(workers, tmp_path, strategy, found):  # noqa: F811
    """Where networks are divided, the others wait in them; then it ends at once, and with it the others."""
    changes = dict(
        strategy=strategy,
        data__val=dict(type='SmallImages', size=5, key='noise'),
        evaluation=[entry('', '', metrics=[], save_best_ckpt=False)],
        checkpoint_config__interval=3,
    )
    with pytest.raises(ProcessFailedError, match="TypeError: 'NoneType' object is not callable"):
        workers.run(fail_alone, tmp_path, timeout=60, **changes)
    if found:
        assert saved(tmp_path) == found
    else:
        assert not list(small_run.checkpoints(tmp_path).glob('iter_*'))
