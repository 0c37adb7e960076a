import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lakonlab.evaluation.evaluate import build_evaluation_loader
from lakonlab.evaluation.hook import GenerativeEvalHook
from lakonlab.evaluation.images import to_uint8
from lakonlab.evaluation.metrics import Metric
from lakonlab.evaluation.references import ReferenceSamples
from lakonlab.evaluation.results import run_evaluations, write_results
from lakonlab.ranks import ALONE
from lakonlab.registry import HOOKS, METRICS
from tests.evaluation.thread_ranks import run_threads

DIGIT_FEATURES = dict(type='DigitClassifier')


@pytest.fixture(autouse=True)
def _directory(tmp_path, monkeypatch):
    """Runs write where no other test looks."""
    monkeypatch.chdir(tmp_path)


class Model(nn.Module):
    """Paints every sample with one grey, which the sampling arguments and a weight decide."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.calls = []
        self.draws = []
        self.brightness = 1.0  # also the error of two steps in place of one

    def val_step(self, data, role=None, test_cfg_override=None, source=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        steps = (test_cfg_override or {}).get('num_timesteps', 1)
        self.calls.append((role, steps, list(data['ids'])))
        self.draws.append(source.normal('probe', (len(data['ids']), 1)))
        images = torch.full_like(data['noise'], self.brightness / steps) + self.offset
        return dict(num_samples=len(images), pred_imgs=images)


@METRICS.register_module()
class Brightest(Metric):
    """Largest value of a pixel."""

    better = {'brightest': 'higher'}

    def reset(self):
        self.value = 0.0

    def feed(self, batch):
        self.value = max(self.value, batch.images.max().item())

    def compute(self):
        return dict(brightest=self.value)

    def protocol(self):
        return {}


def config(**entry):
    digits = dict(type='Digits', split='val', test_mode=True, num_test_images=25)
    return dict(
        name='run',
        data=dict(workers_per_gpu=0, train=dict(type='Digits'), val=digits, val_dataloader=dict(samples_per_gpu=10)),
        evaluation=[dict(dict(type='GenerativeEvalHook', data='val', prefix='p', viz_num=0), **entry)],
    )


RMSE = dict(metrics=[dict(type='ReferenceRMSE')], reference_kwargs=dict(test_cfg_override=dict(num_timesteps=2)))


def test_results_of_a_model():
    accuracy = dict(type='ClassAccuracy', extractor=DIGIT_FEATURES)
    cfg = config(**dict(RMSE, metrics=[*RMSE['metrics'], accuracy]))
    model = Model().train()
    (results,) = run_evaluations(model, cfg)
    assert model.training
    assert results['name'] == 'val_p'
    assert results['num_samples'] == 25
    assert results['metrics']['reference_rmse'] == pytest.approx(1.0)
    assert results['protocol']['ClassAccuracy']['num_images'] == 25
    assert results['protocol']['ClassAccuracy']['image_sizes'] == results['image_sizes'] == [[8, 8]]
    assert results['reference_kwargs'] == RMSE['reference_kwargs']


def test_seed_reaches_the_sampler():
    cfg = config(metrics=[dict(type='ClassAccuracy', extractor=DIGIT_FEATURES)])
    drawn = {}
    for seed in (0, 5):
        model = Model()
        (results,) = run_evaluations(model, cfg, seed=seed)
        drawn[seed] = torch.cat(model.draws)
        assert results['sampling_seed'] == results['protocol']['ClassAccuracy']['sampling_seed'] == seed
    assert not torch.equal(drawn[0], drawn[5])


def test_references_are_made_with_the_seed_of_the_samples():
    model = Model()
    run_evaluations(model, config(**RMSE), seed=5)
    kinds = {
        steps: torch.cat([draw for draw, call in zip(model.draws, model.calls) if call[1] == steps]) for steps in (1, 2)
    }
    assert torch.equal(kinds[1], kinds[2])


def test_references_are_made_once_per_split_and_version():
    cfg = config(**RMSE)
    cfg['evaluation'] = [
        dict(cfg['evaluation'][0], prefix=prefix, reference_kwargs=dict(role='teacher')) for prefix in ('a', 'b')
    ]
    model = Model()
    run_evaluations(model, cfg)
    assert [role for role, _, _ in model.calls].count('teacher') == 3  # three batches, not six

    hook = GenerativeEvalHook(**{key: value for key, value in config(**RMSE)['evaluation'][0].items() if key != 'type'})
    for tag, expected in (('1', 3), ('1', 3), ('2', 6)):  # weights in training change, so do their references
        hook.run(model, cfg['data'], 'run', tag)
        assert [steps for _, steps, _ in model.calls].count(2) == expected


def test_references_are_kept_as_long_as_an_entry_compares_with_them(monkeypatch):
    kept = []

    class Watched(ReferenceSamples):
        def get(self, *args, **kwargs):
            images = super().get(*args, **kwargs)
            kept.append(self.kept_bytes)
            return images

    monkeypatch.setattr('lakonlab.evaluation.hook.ReferenceSamples', Watched)
    cfg = config(**RMSE)
    for other in (dict(prefix='q'), dict(prefix='r', reference_kwargs={})):
        cfg['evaluation'] += config(**{**RMSE, **other})['evaluation']
    run_evaluations(Model(), cfg)
    size = 8 * 8 * 4
    assert kept == [10 * size, 20 * size, 25 * size, 15 * size, 5 * size, 0, 0, 0, 0]

    kept.clear()  # while training: a teacher's samples are compared with again, those of weights that change are not
    for reference_kwargs, expected in ((dict(role='teacher'), [10, 20, 25, 25, 25, 25]), ({}, [0] * 6)):
        hook, runner = hook_and_runner(**dict(RMSE, reference_kwargs=reference_kwargs))
        for runner.iter in (0, 1):
            hook.after_train_iter(runner, runner.iter)
        assert kept == [count * size for count in expected]
        kept.clear()


def test_references_have_limited_room(caplog):
    model, images = Model(), torch.rand(4, 1, 2, 2)
    batches = [dict(ids=ids, noise=images[ids]) for ids in ([0, 1], [2, 3])]
    references = ReferenceSamples(limit=3 * images[0].nbytes + 1)
    for _ in range(3):
        for batch in batches:
            found = references.get(model.eval(), batch, 'val', dict(role='teacher'), 'same')
            assert torch.equal(found, torch.ones(2, 1, 2, 2))
    assert references.kept_bytes == 3 * images[0].nbytes
    assert [ids for _, _, ids in model.calls] == [[0, 1], [2, 3], [2, 3], [2, 3]]
    assert [record.levelname for record in caplog.records] == ['WARNING']


def test_metrics_hold_nothing_between_evaluations():
    entry = config(metrics=dict(type='VendiScore', extractor=DIGIT_FEATURES))['evaluation'][0]
    hook = GenerativeEvalHook(**{key: value for key, value in entry.items() if key != 'type'})
    results, _ = hook.run(Model(), config()['data'], 'run', '1')
    assert results['protocol']['VendiScore']['num_images'] == 25
    assert hook.metrics[0].num_images == 0


def test_metrics_whose_numbers_have_the_same_names_are_refused():
    vendi = dict(type='VendiScore', extractor=DIGIT_FEATURES)
    with pytest.raises(ValueError, match='evaluation val_p: metrics has VendiScore more than once'):
        run_evaluations(Model(), config(metrics=[vendi, dict(vendi, per_group=False)]))
    (results,) = run_evaluations(Model(), config(metrics=[vendi, dict(vendi, per_group=False, prefix='all')]))
    assert {'vendi', 'all_vendi'} <= set(results['metrics'])


def test_reference_is_required():
    with pytest.raises(ValueError, match='reference_kwargs'):
        run_evaluations(Model(), config(metrics=dict(type='ReferenceRMSE')))


def test_what_the_last_entry_lacks_is_found_before_anything_is_sampled(tmp_path):
    cfg = config(**RMSE)
    missing = dict(type='InceptionMetrics', reference=str(tmp_path / 'no.npz'), extractor=DIGIT_FEATURES)
    cfg['evaluation'] += config(metrics=missing, prefix='q')['evaluation']
    model = Model()
    with pytest.raises(OSError, match=r'no\.npz'):
        run_evaluations(model, cfg)
    assert not model.calls


def test_real_images_are_measured_without_a_model():
    distance = dict(type='FrechetDistance', extractor=DIGIT_FEATURES, reference=dict(type='Digits', split='val'))
    cfg = config(data='train', generate=False, metrics=distance)
    (results,) = run_evaluations(Model(), cfg)
    assert 0.1 < results['metrics']['frechet_distance'] < 0.2
    assert results['num_samples'] == 1442


def test_images_and_grid(tmp_path):
    (tmp_path / 'default').mkdir()
    (tmp_path / 'default' / '000000099.png').touch()
    (tmp_path / 'default' / 'mine.png').touch()
    (results,) = run_evaluations(Model(), config(viz_num=12, viz_dir=str(tmp_path)))
    files = sorted(path.name for path in Path(results['images']).iterdir())
    assert files == [f'{number:09d}.png' for number in range(12)] + ['grid.png', 'mine.png']
    assert Image.open(tmp_path / 'default' / 'grid.png').size == (4 * 66 + 2, 3 * (66 + 12) + 2)  # captions of one line
    assert np.array(Image.open(tmp_path / 'default' / '000000003.png')).shape == (8, 8)


def test_quantisation_rounds_and_clips():
    pixels = to_uint8(torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]).reshape(6, 1, 1, 1))
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize(
    ('interval', 'due'),
    [
        (4, [4, 8, 12]),
        (None, []),
        (dict(milestones=[5, 10], interval=[1, 5, 2]), [1, 2, 3, 4, 5, 10, 12]),
    ],
)
def test_interval(interval, due):
    hook = HOOKS.build(dict(type='GenerativeEvalHook', interval=interval))
    assert [iteration for iteration in range(1, 13) if hook.is_due(iteration)] == due


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(interval=0), 'positive'),
        (dict(interval=dict(milestones=[1], interval=[1])), 'need 2 intervals'),
        (dict(interval=dict(milestone=[1], interval=[1])), 'expected milestones and interval'),
        (dict(save_best_ckpt=True), 'evaluation val.best_metric: found None, but no metric'),
        (dict(save_best_ckpt=True, interval=None, metrics=dict(type='ReferenceRMSE')), 'never evaluates'),
        (
            dict(metrics=[dict(type='ColorStats'), dict(type='ReferenceRMSE')]),
            'evaluation val: ReferenceRMSE compares with reference samples, but reference_kwargs is not set',
        ),
        (
            dict(save_best_ckpt=True, best_metric='fid', metrics=[dict(type='ReferenceRMSE')]),
            "found 'fid', expected numbers of metrics of this entry: 'reference_rmse'",
        ),
        (dict(viz_num=-3), 'evaluation val: viz_num=-3: expected at least 0'),
        (dict(feed_batch_size=0), 'evaluation val: feed_batch_size=0: expected at least 1'),
        (dict(viz_dir='https://host/viz'), 'viz_dir: .* https:// cannot be written'),
        (dict(sample_kwargs=dict(test_cfg={})), 'sample_kwargs: unknown test_cfg'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GenerativeEvalHook(**arguments)


def test_unknown_split_and_no_entry():
    with pytest.raises(ValueError, match="data='vall', but data has only train, val"):
        build_evaluation_loader(config()['data'], 'vall')
    with pytest.raises(ValueError, match='no entry to run for data'):
        run_evaluations(Model(), config(), splits=['test'])


def hook_and_runner(ranks=ALONE, **entry):
    """An evaluation, and a stand-in for a run that has it; what it logs and saves is listed in ``runner.done``."""
    cfg = config(**entry)
    hook = GenerativeEvalHook(**{key: value for key, value in cfg['evaluation'][0].items() if key != 'type'})
    done = []
    runner = SimpleNamespace(
        hooks=[hook], iter=0, cfg=SimpleNamespace(data=cfg['data'], get=cfg.get), model=Model(), done=done,
        visualizer=SimpleNamespace(
            add_scalars=lambda scalars, step, file_path: done.append((scalars, step, file_path)),
            add_image=lambda name, image, step: done.append((name, image.shape, step)),
        ),
        checkpoint_hook=SimpleNamespace(
            save_best=lambda step, name, value: done.append(('best', step, name, value))
        ),
        work_dir='work_dirs/run', timestamp='now', seed=5, is_asked_to_stop=False, failure=None,
        end_with=lambda error: setattr(runner, 'failure', error),
        strategy=SimpleNamespace(ranks=ranks, is_sharded=False, stop_requested=False),
    )  # fmt: skip
    hook.before_train(runner)
    return hook, runner


def test_hook_logs_scalars_and_a_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hook, runner = hook_and_runner(viz_num=4, interval=5, **RMSE)
    for runner.iter in range(9):
        hook.after_train_iter(runner, runner.iter)
    scalars, grid = runner.done
    assert scalars == ({'val_p_reference_rmse': pytest.approx(1.0)}, 5, 'now.json')
    assert grid == ('val_p', (2 * (66 + 12) + 2, 2 * 66 + 2, 3), 5)
    assert Path('viz/run/val_p/5/grid.png').is_file()


def test_images_are_called_after_the_work_dir(tmp_path, monkeypatch):
    """Whatever the config is called, so that two runs of one config do not remove each other's."""
    monkeypatch.chdir(tmp_path)
    hook, runner = hook_and_runner(viz_num=4, **RMSE)
    for runner.work_dir in ('work_dirs/first', 'work_dirs/second'):
        hook.after_train_iter(runner, 0)
    run_evaluations(Model(), {**config(viz_num=4), 'work_dir': 'work_dirs/third'}, tag='1')
    assert [Path(f'viz/{run}/val_p/1/grid.png').is_file() for run in ('first', 'second', 'third', 'run')] == [
        1,
        1,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        ([dict(prefix='q'), dict(prefix='q')], "2 entries of the name 'val_q'"),
        ([dict(prefix='q'), dict(prefix='', data='val_q')], "2 entries of the name 'val_q'"),
        (
            [dict(prefix='q', viz_dir='a', viz_num=1), dict(prefix='r', viz_dir='./a/', viz_num=1)],
            "entries with viz_dir='a'",
        ),
        ([dict(prefix='q', viz_dir='a', viz_num=1), dict(prefix='r', viz_dir='a', viz_num=0)], None),
    ],
)
def test_entries_share_neither_name_nor_folder(tmp_path, monkeypatch, entries, message):
    monkeypatch.chdir(tmp_path)
    cfg = config()
    cfg['evaluation'] = [dict(cfg['evaluation'][0], **entry) for entry in entries]
    if message is None:
        run_evaluations(Model(), cfg)
        return
    with pytest.raises(ValueError, match=message):
        run_evaluations(Model(), cfg)
    _, runner = hook_and_runner()
    runner.hooks = [HOOKS.build(dict(entry)) for entry in cfg['evaluation']]
    with pytest.raises(ValueError, match=message):
        runner.hooks[0].before_train(runner)


def evaluate_at(hook, runner, iteration, error):
    """Evaluate weights of an error; what was saved as the best."""
    runner.done.clear()
    runner.iter, runner.model.brightness = iteration - 1, error
    hook.after_train_iter(runner, runner.iter)
    return [call[1:] for call in runner.done if call[0] == 'best']


def test_only_the_main_process_logs_and_all_save_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def evaluated(ranks):
        hook, runner = hook_and_runner(ranks, viz_num=4, save_best_ckpt=True, **RMSE)
        hook.after_train_iter(runner, 0)
        return hook.state_dict(), [call[0] for call in runner.done]

    states, done = zip(*run_threads(evaluated, 2), strict=True)
    assert states[0] == states[1]
    assert [best['value'] for best in states[0]['best']] == [pytest.approx(1.0)]
    assert done == ([{'val_p_reference_rmse': pytest.approx(1.0)}, 'val_p', 'best'], ['best'])


def test_an_error_of_the_log_ends_all():
    """When they have saved; what is the best is found when the evaluation is made again."""

    def evaluated(ranks):
        hook, runner = hook_and_runner(ranks, save_best_ckpt=True, **RMSE)
        runner.visualizer.add_scalars = None
        hook.after_train_iter(runner, 0)
        return type(runner.failure), hook.owed, hook.best[0].value, runner.done

    assert run_threads(evaluated, 2) == [(TypeError, 1, None, [])] * 2


@METRICS.register_module()
class BreaksItsWord(Brightest):
    """Says that it gives a number, which it does not."""

    better = {'promised': 'higher'}


def test_a_number_that_decides_has_to_be_there():
    def evaluated(ranks):
        hook, runner = hook_and_runner(ranks, save_best_ckpt=True, metrics=[dict(type='BreaksItsWord')])
        hook.after_train_iter(runner, 0)
        return str(runner.failure)

    first, second = run_threads(evaluated, 2)
    assert first == second
    assert 'val_p.best_metric: val_p_promised has not been computed, only val_p_brightest' in first


def test_evaluations_after_one_that_failed_are_owed_too():
    hook, runner = hook_and_runner(**RMSE)
    runner.failure = error = OSError('of another one')
    hook.after_train_iter(runner, 0)
    assert (hook.owed, runner.failure, runner.done) == (1, error, [])


def test_an_error_of_one_process_is_raised_at_once():
    """The others, which wait for it in a network that is divided, cannot save."""

    def evaluated(ranks):
        hook, runner = hook_and_runner(ranks, **RMSE)
        runner.strategy.is_sharded = True
        if ranks.rank == 0:
            return hook.after_train_iter(runner, 0)
        runner.model.val_step = None
        with pytest.raises(TypeError):
            hook.after_train_iter(runner, 0)
        ranks.table.barrier.abort()  # as a launcher ends the others
        return runner.failure, hook.owed

    assert run_threads(evaluated, 2)[1] == (None, None)


def test_best_checkpoint_is_saved_when_a_number_improves():
    hook, runner = hook_and_runner(save_best_ckpt=True, **RMSE)
    name = 'val_p_reference_rmse'
    saved = [evaluate_at(hook, runner, *when) for when in ((1, 1.0), (2, 1.5), (3, float('nan')), (4, 0.5), (5, 0.5))]
    assert saved == [[(1, name, 1.0)], [], [], [(4, name, 0.5)], []]

    again, runner = hook_and_runner(save_best_ckpt=True, **RMSE)
    again.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    assert evaluate_at(again, runner, 6, 0.75) == []
    assert [step for step, _, _ in evaluate_at(again, runner, 7, 0.25)] == [7]

    of_one = {**hook.state_dict(), 'best': hook.state_dict()['best'][0]}  # as checkpoints before had it
    older, runner = hook_and_runner(save_best_ckpt=True, **RMSE)
    older.load_state_dict(of_one)
    assert evaluate_at(older, runner, 6, 0.75) == []

    other, runner = hook_and_runner(save_best_ckpt=True, prefix='q', **RMSE)
    other.load_state_dict(hook.state_dict())  # of another entry: its values say nothing here
    assert [step for step, _, _ in evaluate_at(other, runner, 6, 0.75)] == [6]


def test_several_numbers_have_their_own_best():
    """Brighter samples are farther from their references, and counted as better by the contrary metric."""
    entry = {**RMSE, 'metrics': [*RMSE['metrics'], dict(type='Brightest')]}
    names = ['reference_rmse', 'brightest']
    hook, runner = hook_and_runner(save_best_ckpt=True, best_metric=names, **entry)
    saved = [evaluate_at(hook, runner, *when) for when in ((1, 0.5), (2, 0.75), (3, 0.25), (4, 0.5), (5, 1.0))]
    found = [[(step, name.removeprefix('val_p_'), value) for step, name, value in calls] for calls in saved]
    assert found == [
        [(1, 'reference_rmse', 0.5), (1, 'brightest', 0.5)],
        [(2, 'brightest', 0.75)],
        [(3, 'reference_rmse', 0.25)],
        [],
        [(5, 'brightest', 1.0)],
    ]
    again, runner = hook_and_runner(save_best_ckpt=True, best_metric=names[::-1], **entry)
    again.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    assert evaluate_at(again, runner, 6, 0.5) == []
    assert [name for _, name, _ in evaluate_at(again, runner, 7, 0.125)] == ['val_p_reference_rmse']


def test_whoever_is_asked_to_stop_all_give_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def evaluated(ranks):
        hook, runner = hook_and_runner(ranks, viz_num=0, save_best_ckpt=True, **RMSE)
        runner.is_asked_to_stop = ranks.rank == 1
        hook.after_train_iter(runner, 0)
        given_up = runner.strategy.stop_requested, json.loads(json.dumps(hook.state_dict())), list(runner.done)
        again, runner = hook_and_runner(ranks, viz_num=0, save_best_ckpt=True, **RMSE)
        again.load_state_dict(given_up[1])
        runner.iter = 1
        again.before_train_epoch(runner)
        return given_up, again.owed, [call for call in runner.done if call[0] == 'best']

    for given_up, owed, saved in run_threads(evaluated, 2):
        assert given_up == (
            True,
            {'best': [{'name': 'val_p_reference_rmse', 'value': None, 'step': None}], 'owed': 1},
            [],
        )
        assert owed is None
        assert saved == [('best', 1, 'val_p_reference_rmse', pytest.approx(1.0))]


def test_best_checkpoint_is_saved_only_if_asked_for():
    hook, runner = hook_and_runner(best_metric='fid', **RMSE)
    assert evaluate_at(hook, runner, 1, 1.0) == []
    hook.load_state_dict(hook.state_dict())


def test_best_checkpoint_needs_a_place():
    hook, runner = hook_and_runner(save_best_ckpt=True, **RMSE)
    runner.checkpoint_hook = None
    with pytest.raises(ValueError, match='save_best_ckpt=True, but checkpoint_config is not set'):
        hook.before_train(runner)


def test_entries_do_not_share_a_best_checkpoint():
    hook, runner = hook_and_runner(save_best_ckpt=True, **RMSE)
    fid = dict(type='InceptionMetrics', reference='a.npz', use_pr=False)
    entries = dict(metrics=[fid]), dict(prefix='', metrics=[dict(fid, prefix='p')])
    twins = [GenerativeEvalHook(**{'data': 'val', 'prefix': 'p', 'save_best_ckpt': True, **entry}) for entry in entries]
    other, _ = hook_and_runner(save_best_ckpt=True, prefix='q', **RMSE)
    runner.hooks = [hook, other, hook_and_runner(prefix='r', **RMSE)[0]]
    hook.before_train(runner)
    runner.hooks = twins
    with pytest.raises(ValueError, match='another entry keeps the best checkpoint of val_p_fid too'):
        twins[0].before_train(runner)


def test_results_file(tmp_path):
    results = run_evaluations(Model(), config(**RMSE))
    write_results(tmp_path / 'run' / 'results.json', results, name='run', checkpoint=Path('a/b'))
    content = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert content['checkpoint'] == 'a/b'
    assert content['evaluations'][0]['metrics']['reference_rmse'] == pytest.approx(1.0)
    assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == ['results.json', 'results.md']
