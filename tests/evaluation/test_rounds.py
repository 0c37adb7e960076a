"""An evaluation by several processes measures the samples of one process, in the same batches; nobody waits in vain."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lakonlab.datasets.loader import build_dataloader
from lakonlab.evaluation.evaluate import build_evaluation_loader, evaluate
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.images import ImageFolder
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.references import ReferenceSamples
from lakonlab.evaluation.rounds import in_order, shares, to_send, with_rows
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.ranks import ALONE
from lakonlab.registry import METRICS
from tests.evaluation.thread_ranks import run_threads
from tests.processes import ProcessPool

BATCH = 4
SIZES = (1, 2, 5, 8, 21)
DIGIT_FEATURES = dict(type='DigitClassifier')
METRIC_CONFIGS = [
    dict(type='FrechetDistance', extractor=DIGIT_FEATURES, reference=dict(type='Digits', split='val')),
    dict(type='ClassAccuracy', extractor=DIGIT_FEATURES),
    dict(type='ReferenceRMSE'),
]


class Painter(nn.Module):
    """Makes of each sample's noise, label and draws an image; ``ranks`` must all paint together, if they are given."""

    def __init__(self, ranks=None, fails_at=None):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.ranks, self.fails_at, self.painted = ranks, fails_at, []

    def val_step(self, data, role=None, test_cfg_override=None, source=None):
        ids = list(data['ids'])
        self.painted.append((role, ids))
        if self.fails_at in ids:
            raise ArithmeticError(f'sample {self.fails_at} cannot be painted')
        if self.ranks is not None:
            assert len(set(self.ranks.all_gather((role, len(ids))))) == 1, 'the ranks paint different things'
        draws = source.normal('probe', data['noise'].shape)
        images = 0.5 + self.gain * data['noise'] + 0.1 * draws + 0.01 * data['labels'].reshape(-1, 1, 1, 1)
        return dict(num_samples=len(ids), pred_imgs=images if role is None else 0.9 * images, nfe=2)


class Recorder(Metric):
    """Keeps what it is fed, for good."""

    needs_reference = True

    def __init__(self):
        self.batches = []

    def reset(self):
        pass

    def feed(self, batch):
        self.batches.append((list(batch.ids), batch.images.clone(), batch.labels.clone(), batch.reference.clone()))

    def compute(self):
        return {}

    def protocol(self):
        return {}


class FailingMetric(Recorder):
    def feed(self, batch):
        raise ArithmeticError('this cannot be measured')


def loader(size, ranks=ALONE):
    digits = dict(type='Digits', split='val', test_mode=True, num_test_images=size)
    data = dict(workers_per_gpu=0, val=digits, val_dataloader=dict(samples_per_gpu=BATCH))
    return build_evaluation_loader(data, 'val', ranks=ranks)


def paint(ranks, size, folder=None, *, model=None, metrics=None, together=False, **arguments):
    """An evaluation; its results, what the main process measured, and what was painted here."""
    model = model or Painter(ranks if together else None)
    metrics = [Recorder()] if metrics is None else metrics
    images = ImageFolder(folder) if folder is not None and ranks.is_main else None
    arguments = dict(dict(reference_kwargs=dict(role='teacher'), seed=3), **arguments)
    results = evaluate(model, loader(size, ranks), metrics, images=images, ranks=ranks, **arguments)
    if images is not None:
        images.finish()
    return results, metrics, model.painted


def built_metrics():
    metrics, pool = [METRICS.build(dict(config)) for config in METRIC_CONFIGS], ExtractorPool()
    for metric in metrics:
        metric.bind(pool)
    return metrics


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize('world_size', [2, 3])
@pytest.mark.parametrize('size', SIZES)
def test_main_process_sees_the_batches_of_one_process(tmp_path, size, world_size):
    alone, (recorder,), painted = paint(ALONE, size, tmp_path / 'one')
    outcomes = run_threads(lambda ranks: paint(ranks, size, tmp_path / 'many'), world_size)
    (seen,) = outcomes[0][1]
    assert [batch[0] for batch in seen.batches] == [batch[0] for batch in recorder.batches]
    for found, expected in zip(seen.batches, recorder.batches, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found[1:], expected[1:], strict=True))
    assert files(tmp_path / 'many') == files(tmp_path / 'one')
    assert len(files(tmp_path / 'one')) == size + 1
    for results, (other,), _ in outcomes:
        assert {**results, 'seconds': 0, 'num_processes': 1} == {**alone, 'seconds': 0}
        assert other is seen or other.batches == []
    # no process does more than its share of the rounds
    rounds = -(-size // (BATCH * world_size))
    assert [len(calls) for _, _, calls in outcomes] == [2 * rounds] * world_size
    assert len(painted) == 2 * -(-size // BATCH)


@pytest.mark.parametrize('world_size', [2, 3])
@pytest.mark.parametrize('size', SIZES)
def test_processes_that_share_a_network_use_it_together(size, world_size):
    for results, _, _ in run_threads(lambda ranks: paint(ranks, size, together=True), world_size):
        assert results['num_samples'] == size


def test_references_known_to_some_processes_are_made_by_all():
    def twice(ranks):
        references = ReferenceSamples()
        paint(ranks, 9, together=True, references=references)
        if ranks.rank == 1:
            references = ReferenceSamples()
        return paint(ranks, 9, together=True, references=references)

    for _, _, painted in run_threads(twice, 2):
        # of the second round, only the main process has a sample, and everybody knows it or what is in its place
        assert [role for role, _ in painted] == [None, 'teacher', None]


def test_references_known_to_all_are_not_made_again():
    def twice(ranks):
        references = ReferenceSamples()
        first = paint(ranks, 9, references=references)[1][0].batches
        _, (second,), painted = paint(ranks, 9, references=references, version='later')
        assert all(torch.equal(*pair) for pair in zip([b[3] for b in first], [b[3] for b in second.batches]))
        return [role for role, _ in painted]

    assert run_threads(twice, 2) == [[None, None]] * 2


class BrokenDigits(torch.utils.data.Dataset):
    """Digits of which one cannot be read."""

    def __init__(self, broken):
        self.digits, self.broken = loader(9).dataset, broken

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        if index == self.broken:
            raise ArithmeticError(f'item {index} cannot be read')
        return self.digits[index]


def failing_part(name, ranks, folder):
    """An evaluation in which one thing fails, in one process."""
    if name == 'data':
        broken = build_dataloader(BrokenDigits(5), BATCH, rank=ranks.rank, world_size=ranks.world_size)
        return evaluate(Painter(), broken, [], ranks=ranks)
    if name == 'model':
        return paint(ranks, 9, model=Painter(fails_at=5))
    if name == 'metric':
        return paint(ranks, 9, metrics=[FailingMetric()])
    images = ImageFolder(folder) if ranks.is_main else None
    if images is not None:
        folder.rmdir()
        folder.touch()
    return evaluate(Painter(), loader(9, ranks), [], images=images, ranks=ranks)


@pytest.mark.parametrize(
    ('name', 'kind', 'message'),
    [
        ('data', ArithmeticError, 'item 5 cannot be read'),
        ('model', ArithmeticError, 'sample 5 cannot be painted'),
        ('metric', ArithmeticError, 'cannot be measured'),
        ('images', FileExistsError, 'File exists'),
    ],
)
def test_an_error_in_one_process_ends_all(tmp_path, name, kind, message):
    for error in run_threads(lambda ranks: failing_part(name, ranks, tmp_path / 'images'), 3):
        assert type(error) is kind
        assert message in str(error)


def test_no_samples_end_all():
    def nothing(ranks):
        return evaluate(Painter(), build_dataloader([], 4, rank=ranks.rank, world_size=2), [], ranks=ranks)

    for error in run_threads(nothing, 2):
        assert 'has no samples' in str(error)


def test_a_loader_of_other_processes_is_refused():
    errors = run_threads(lambda ranks: next(shares(loader(9), ranks)), 2)
    assert [type(error) for error in errors] == [ValueError] * 2
    assert 'process 0 of 1, but this is process 1 of 2' in str(errors[1])


def test_rows_are_repeated():
    batch = dict(ids=[3, 5], x=torch.tensor([[1.0], [2.0]]), prompt=dict(text=['a', 'b']))
    assert with_rows(batch, 1)['ids'] == [3]
    longer = with_rows(batch, 5)
    assert longer['ids'] == [3, 5, 3, 5, 3]
    assert longer['x'].flatten().tolist() == [1, 2, 1, 2, 1]
    assert longer['prompt'] == dict(text=['a', 'b', 'a', 'b', 'a'])


def test_what_is_sent_leaves_the_rest_behind():
    whole = SampleBatch(torch.ones(8, 1, 2, 2), list(range(8)), torch.arange(8), seconds=4.0, phases=dict(network=2.0))
    sent = to_send(whole, 2)
    assert sent.ids == [0, 1]
    assert sent.labels.tolist() == [0, 1]
    assert (sent.seconds, sent.phases) == (1.0, dict(network=0.5))
    assert sent.images.untyped_storage().nbytes() == 2 * 4 * 4


def test_speed_is_that_of_one_process():
    def part(ids, seconds, warm_up):
        phases = dict(network=seconds / 2, policy=seconds / 4)
        return SampleBatch(torch.zeros(len(ids), 1, 2, 2), ids, seconds=seconds, warm_up=warm_up, phases=phases)

    metric = METRICS.build(dict(type='SamplingSpeed'))
    rounds = (
        [part([0, 2, 4, 6], 60.0, True), part([1, 3, 5, 7], 90.0, True)],
        [part([8, 10, 12, 14], 2.0, False), part([9, 11, 13], 1.5, False)],
    )
    for parts in rounds:
        batches = list(in_order(parts, BATCH, torch.device('cpu'), 32))
        assert sum(batch.seconds for batch in batches) == pytest.approx(sum(made.seconds for made in parts))
        for batch in batches:
            metric.feed(batch)
    assert metric.compute()['samples_per_second'] == pytest.approx(7 / 3.5)
    assert metric.protocol()['num_timed'] == 7
    # a batch of four has two samples of each process
    assert metric.protocol()['batch_size'] == 4
    assert metric.compute()['total_time'] == pytest.approx(2 * 0.5 + 2 * 0.5)
    assert metric.compute()['network_time'] == pytest.approx(metric.compute()['total_time'] / 2)
    assert metric.compute()['policy_time'] == pytest.approx(metric.compute()['total_time'] / 4)


def measure(ranks, size, folder):
    """Real metrics; called in processes of their own."""
    return paint(ranks, size, folder, metrics=built_metrics())[0]


@pytest.mark.parametrize('world_size', [2, 3])
def test_numbers_and_images_of_real_processes(tmp_path, world_size):
    with ProcessPool(world_size) as pool:
        for size in (2, 21):
            expected = measure(ALONE, size, tmp_path / f'one_{size}')
            outcomes = pool.run(measure, size, tmp_path / f'many_{size}')
            for results in outcomes:
                assert results['num_processes'] == world_size
                assert results['metrics'] == pytest.approx(expected['metrics'], rel=0, abs=1e-12)
                assert results['protocol'] == expected['protocol']
            assert files(tmp_path / f'many_{size}') == files(tmp_path / f'one_{size}')


class TwoSizes(torch.utils.data.Dataset):
    """Noise of two sizes, in two buckets that lie mixed."""

    def __init__(self, size):
        self.bucket_ids = [int(index % 3 == 1) for index in range(size)]

    def __len__(self):
        return len(self.bucket_ids)

    def __getitem__(self, index):
        side = 4 + 4 * self.bucket_ids[index]
        noise = torch.randn(1, side, side, generator=torch.Generator().manual_seed(index))
        return {'ids': index, 'noise': noise, 'labels': torch.tensor(index % 10)}


class ShapePainter(Painter):
    """A painter whose ranks must all paint images of one size together."""

    def val_step(self, data, **arguments):
        if self.ranks is not None:
            assert len(set(self.ranks.all_gather(tuple(data['noise'].shape)))) == 1, 'the ranks paint different sizes'
        return super().val_step(data, **arguments)


def paint_two_sizes(ranks, size, folder):
    recorder, images = Recorder(), ImageFolder(folder) if ranks.is_main else None
    data = build_dataloader(TwoSizes(size), BATCH, rank=ranks.rank, world_size=ranks.world_size)
    arguments = dict(reference_kwargs=dict(role='teacher'), seed=3, images=images, ranks=ranks)
    results = evaluate(ShapePainter(ranks), data, [recorder], **arguments)
    if images is not None:
        images.finish()
    return results, recorder.batches


@pytest.mark.parametrize('world_size', [2, 3])
@pytest.mark.parametrize('size', SIZES)
def test_buckets_are_sampled_one_after_another(tmp_path, size, world_size):
    results, expected = paint_two_sizes(ALONE, size, tmp_path / 'one')
    assert results['num_samples'] == size
    assert sorted(number for batch in expected for number in batch[0]) == list(range(size))
    outcomes = run_threads(lambda ranks: paint_two_sizes(ranks, size, tmp_path / 'many'), world_size)
    found = outcomes[0][1]
    assert [batch[0] for batch in found] == [batch[0] for batch in expected]
    for pair in zip(found, expected, strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(pair[0][1:], pair[1][1:], strict=True))
    assert files(tmp_path / 'many') == files(tmp_path / 'one')
    assert [other['num_samples'] for other, _ in outcomes] == [size] * world_size


def test_data_sets_that_differ_are_found():
    def different(ranks):
        data = build_dataloader(TwoSizes(4 + 20 * ranks.rank), BATCH, rank=ranks.rank, world_size=2)
        return next(shares(data, ranks))

    for error in run_threads(different, 2):
        assert isinstance(error, ValueError)
        assert 'their data sets differ' in str(error)
