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
from lakonlab.evaluation.images import make_grid, to_uint8
from lakonlab.evaluation.results import run_evaluations, write_results
from lakonlab.registry import HOOKS

DIGIT_FEATURES = dict(type='DigitClassifier')


class Model(nn.Module):
    """Paints every sample with one grey, which the sampling arguments and a weight decide."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.calls = []
        self.draws = []

    def val_step(self, data, role=None, test_cfg_override=None, source=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        steps = (test_cfg_override or {}).get('num_timesteps', 1)
        self.calls.append((role, steps, list(data['ids'])))
        self.draws.append(source.normal('probe', (len(data['ids']), 1)))
        images = torch.full_like(data['noise'], 1 / steps) + self.offset
        return dict(num_samples=len(images), pred_imgs=images)


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


def test_reference_is_required():
    with pytest.raises(ValueError, match='reference_kwargs'):
        run_evaluations(Model(), config(metrics=dict(type='ReferenceRMSE')))


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
    assert Image.open(tmp_path / 'default' / 'grid.png').size == (4 * 34 + 2, 3 * 34 + 2)
    assert np.array(Image.open(tmp_path / 'default' / '000000003.png')).shape == (8, 8, 3)


def test_quantisation_rounds_and_clips():
    pixels = to_uint8(torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]).reshape(6, 1, 1, 1))
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_grid_is_row_by_row():
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(40, 1).repeat(40, 2).repeat(3, 3)
    grid = make_grid(pixels, columns=3)
    assert grid.shape == (2 * 42 + 2, 3 * 42 + 2, 3)
    assert [grid[10 + 42 * row, 10 + 42 * column, 0] for row in (0, 1) for column in (0, 1, 2)] == [0, 1, 2, 3, 4, 96]


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
        (dict(save_best_ckpt=True), 'save_best_ckpt'),
        (dict(viz_dir='s3://bucket/viz'), 'only local directories can be written'),
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


def test_hook_logs_scalars_and_a_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logged = []
    visualizer = SimpleNamespace(
        add_scalars=lambda scalars, step, file_path: logged.append((scalars, step, file_path)),
        add_image=lambda name, image, step: logged.append((name, image.shape, step)),
    )
    cfg = config(viz_num=4, interval=5, **RMSE)
    hook = GenerativeEvalHook(**{key: value for key, value in cfg['evaluation'][0].items() if key != 'type'})
    runner = SimpleNamespace(
        hooks=[hook], iter=0, cfg=SimpleNamespace(data=cfg['data'], get=cfg.get), model=Model(),
        visualizer=visualizer, work_dir='work_dirs/run', timestamp='now', seed=5,
    )  # fmt: skip
    hook.before_train(runner)
    for runner.iter in range(9):
        hook.after_train_iter(runner, runner.iter)
    assert logged[0][0] == {'val_p_reference_rmse': pytest.approx(1.0)}
    assert logged[0][1:] == (5, 'now.json')
    assert logged[1] == ('val_p', (70, 70, 3), 5)
    assert Path('viz/run/val_p/5/grid.png').is_file()


def test_results_file(tmp_path):
    results = run_evaluations(Model(), config(**RMSE))
    write_results(tmp_path / 'run' / 'results.json', results, name='run', checkpoint=Path('a/b'))
    content = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert content['checkpoint'] == 'a/b'
    assert content['evaluations'][0]['metrics']['reference_rmse'] == pytest.approx(1.0)
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['results.json']
