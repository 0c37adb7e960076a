"""A checkpoint is evaluated to the same numbers by one process and by several, under each strategy."""

import json
from pathlib import Path

import pytest
import torch

from lakonlab.config.check import check_config
from lakonlab.config.load import load_config
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.results import RESULTS_FILE
from lakonlab.evaluation.viewer import read_page
from lakonlab.ranks import ALONE
from lakonlab.registry import MODELS, STRATEGIES
from lakonlab.runner.paths import run_directory
from lakonlab.runner.testing import evaluate_checkpoint
from lakonlab.storage.checkpoint import CheckpointError, write_checkpoint
from tests.evaluation.thread_ranks import run_threads
from tests.processes import ProcessPool

TEACHER = Path(__file__).parents[2] / 'configs' / 'digits' / 'dit_digits_teacher.py'
SIZE = 13


def config(folder):
    """Two evaluations of a small network; all paths lie in ``folder``."""
    cfg = load_config(
        TEACHER,
        {
            'data.val.num_test_images': SIZE,
            'data.val_dataloader.samples_per_gpu': 4,
            'checkpoint_config.out_dir': str(folder / 'checkpoints'),
        },
    )
    cfg.work_dir = str(folder / 'work_dirs' / 'teacher')
    entries = [{**entry, 'viz_dir': str(folder / 'viz' / entry['prefix'])} for entry in cfg.evaluation[:2]]
    cfg.evaluation = entries
    return cfg


def save(folder):
    """Save weights that nothing but a checkpoint gives."""
    cfg = config(folder)
    torch.manual_seed(11)
    model = MODELS.build({**cfg.model, 'train_cfg': cfg.train_cfg, 'test_cfg': cfg.test_cfg})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    strategy = STRATEGIES.build({'type': 'single', 'device': 'cpu'})
    run_dir = run_directory(cfg.checkpoint_config.out_dir, cfg.work_dir)
    return write_checkpoint(run_dir, 7, {'model': strategy.model_state(strategy.wrap(model))}, {})


def evaluated(ranks, folder, kind, **arguments):
    """Results of the newest checkpoint, evaluated by one of several processes."""
    strategy = STRATEGIES.build({'type': kind, 'ranks': ranks, 'device': 'cpu'})
    return evaluate_checkpoint(config(folder), strategy=strategy, seed=5, **arguments)


def without_times(results):
    """The numbers by entry, and whatever else must be equal however many processes evaluate."""
    numbers = [dict(entry['metrics']) for entry in results['evaluations']]
    for entry in numbers:
        times = [entry.pop(name) for name in ('network_time', 'policy_time', 'total_time')]
        assert 0 < times[0] + times[1] <= times[2]
        assert min(times) > 0
        del entry['samples_per_second']
    keys = ('name', 'num_samples', 'nfe', 'sampling_seed', 'protocol')
    facts = [{key: entry[key] for key in keys} for entry in results['evaluations']]
    for entry in facts:  # threads are what a time depends on: each of two processes has half of them
        entry['protocol'] = {name: facts for name, facts in entry['protocol'].items() if name != 'SamplingSpeed'}
    return numbers, facts, {key: results[key] for key in ('iteration', 'checkpoint', 'model_sha256', 'fingerprint')}


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """A folder with a checkpoint, and what one process finds."""
    folder = tmp_path_factory.mktemp('alone')
    save(folder)
    return folder, evaluated(ALONE, folder, 'single')


@pytest.fixture(scope='module')
def pool():
    with ProcessPool(2) as pool:
        yield pool


@pytest.mark.parametrize('kind', ['ddp', 'fsdp', 'fsdp2'])
def test_two_processes(alone, pool, kind):
    folder, expected = alone
    path = Path(config(folder).work_dir) / RESULTS_FILE
    images = sorted(file.name for file in (folder / 'viz').rglob('*.png'))
    results, other = pool.run(evaluated, folder, kind)
    assert other == results == json.loads(path.read_text())
    for entry in results['evaluations']:
        assert (entry['num_processes'], entry['made']['strategy']) == (2, kind)
    (numbers, *facts), (expected_numbers, *expected_facts) = without_times(results), without_times(expected)
    assert facts == expected_facts
    assert numbers == [pytest.approx(entry, rel=1e-5) for entry in expected_numbers]
    assert sorted(file.name for file in (folder / 'viz').rglob('*.png')) == images
    kept = pool.run(evaluated, folder, kind, skip_existing=True)[1]
    assert kept['evaluations'] == results['evaluations']


def test_images_are_measured_again(alone, monkeypatch):
    folder, expected = alone

    def not_again(*arguments, **options):
        raise AssertionError('samples are made again')

    monkeypatch.setattr('lakonlab.evaluation.evaluate.sample', not_again)
    cfg = config(folder)
    for entry in cfg.evaluation:
        entry['metrics'] = [*entry['metrics'], {'type': 'SamplingCost'}]  # images in files say nothing about it
    results = evaluate_checkpoint(cfg, seed=5, reuse_viz=True)
    for found, made in zip(results['evaluations'], expected['evaluations'], strict=True):
        assert found['quantize'] == 'uint8'
        facts = read_page(found['page']).columns[0].facts
        assert facts['nfe'] == found['nfe'] == made['nfe'] > 0
        assert (facts['iteration'], facts['model_sha256']) == (7, results['model_sha256'])
        assert facts['reused'] == dict(read=SIZE, made=0)
        assert facts['reference_kwargs'] == made['reference_kwargs'] is not None
        assert not {'samples_per_second', 'network_time', 'latency_seconds'} & set(found['metrics'])
        for name, value in found['metrics'].items():
            assert value == pytest.approx(made['metrics'][name], rel=0.05, abs=0.02)
    assert 'samples_per_second' not in Path(config(folder).work_dir, 'results.md').read_text()


def test_networks_of_metrics_are_moved_to_the_cpu(alone, monkeypatch):
    folder, _ = alone
    moved = []
    monkeypatch.setattr(ExtractorPool, 'offload', lambda pool: moved.append(len(pool._extractors)))
    cfg = config(folder)
    cfg.evaluation = [{**cfg.evaluation[0], 'metric_cpu_offload': True}, cfg.evaluation[1]]
    check_config(cfg)
    evaluate_checkpoint(cfg, seed=5)
    assert moved == [1]


def test_what_the_main_process_does_not_find_ends_all(alone, tmp_path):
    for error in run_threads(lambda ranks: evaluated(ranks, tmp_path, 'single'), 2):
        assert isinstance(error, CheckpointError)
        assert 'there is no checkpoint to evaluate' in str(error)


def test_the_timer_leaves_real_images_alone(alone, tmp_path):
    folder, _ = alone
    cfg = config(folder)
    cfg.work_dir = str(tmp_path)
    made, real = ({**entry, 'metrics': [{'type': 'ColorStats'}], 'viz_num': 0} for entry in cfg.evaluation)
    cfg.data.val2 = {'type': 'Digits', 'split': 'val'}
    cfg.evaluation = [made, {**real, 'generate': False, 'data': 'val2'}]
    found = evaluate_checkpoint(cfg, checkpoint=str(folder / 'checkpoints' / 'teacher' / 'iter_7'), timer=True)
    assert [entry['metrics'].keys() >= {'network_time', 'policy_time', 'total_time', 'samples_per_second'}
            for entry in found['evaluations']] == [True, False]  # fmt: skip
