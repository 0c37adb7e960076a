"""What is wrong with a config is said before anything starts: the key, what was found, the nearest valid name."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
from mmengine.config import Config

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.config.signature import arguments_of, fits

ROOT = Path(__file__).parents[2]
PUBLISHED_STYLE = ROOT / 'tests' / 'data' / 'published_style_digits.py'
SHIPPED = sorted((ROOT / 'configs').glob('[!_]*/*.py'))


def changed(**options) -> Config:
    """The published-style config with some keys set; ``__`` stands for a dot."""
    return load_config(PUBLISHED_STYLE, {key.replace('__', '.'): value for key, value in options.items()})


@pytest.mark.parametrize('path', SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_configs_pass(path, caplog):
    with caplog.at_level(logging.WARNING, 'lakonlab.config'):
        check_config(load_config(path))
    assert not caplog.records


def test_published_style_passes_and_legacy_keys_are_reported_once(caplog):
    cfg = load_config(PUBLISHED_STYLE)
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        check_config(cfg)
        check_config(cfg)
    assert len(caplog.records) == 1
    assert 'workflow' in caplog.text
    assert 'workflow' not in cfg
    assert cfg.save_interval == 100  # helper variables stay


MISSPELT = {
    'model.diffusion.denoising.num_gausians': (8, 'num_gaussians'),
    'model.diffusion.denoising.num_layer': (3, 'num_layers'),
    'model.diffusion.policy_typ': ('GMFlow', 'policy_type'),
    'model.diffusion_use_em': (True, 'diffusion_use_ema'),
    'model.diffusion.flow_loss.rescale_mod': ('constant', 'rescale_mode'),
    'model.diffusion.timestep_sampler.shft': (1.0, 'shift'),
    'model.teacher.denoising.freze': (True, 'freeze'),
    'train_cfg.policy_dropuot': (0.1, 'policy_dropout'),
    'train_cfg.diffusion_grad_clp': (1.0, 'diffusion_grad_clip'),
    'train_cfg.teacher_test_cfg.guidance_scal': (1.5, 'guidance_scale'),
    'test_cfg.total_substep': (3, 'total_substeps'),
    'evaluation.0.sample_kwargs.test_cfg_override.temprature': (0.3, 'temperature'),
    'evaluation.0.sample_kwargs.test_cfg_overide': ({}, 'test_cfg_override'),
    'evaluation.0.feed_batchsize': (8, 'feed_batch_size'),
    'optimizer.diffusion.weigth_decay': (0.1, 'weight_decay'),
    'lr_config.warmup_iter': (3, 'warmup_iters'),
    'data.worker_per_gpu': (1, 'workers_per_gpu'),
    'data.train.splitt': ('train', 'split'),
    'data.train_dataloader.samples_per_gp': (3, 'samples_per_gpu'),
    'checkpoint_config.intervall': (3, 'interval'),
    'custom_hooks.0.start_itr': (3, 'start_iter'),
    'custom_hooks.0.momentum_cfg.gama': (3, 'gamma'),
    'log_config.intervall': (3, 'interval'),
    'runner.gc_intervall': (3, 'gc_interval'),
}


@pytest.mark.parametrize(('key', 'value', 'suggestion'), [(k, *v) for k, v in MISSPELT.items()], ids=list(MISSPELT))
def test_misspelt_keys(key, value, suggestion):
    with pytest.raises(ConfigError) as error:
        check_config(load_config(PUBLISHED_STYLE, {key: value}))
    message = str(error.value)
    assert f'{key}: ' in message
    assert f'did you mean {suggestion!r}?' in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ('key', 'value', 'suggestion'),
    [
        ('model.type', 'LatentDiffusionClassImag', 'LatentDiffusionClassImage'),
        ('model.diffusion.type', 'PiFlowImitaton', 'PiFlowImitation'),
        ('model.diffusion.denoising.type', 'GMDiTTransformer2DModelV3', 'GMDiTTransformer2DModelV2'),
        ('data.train.type', 'Digit', 'Digits'),
        ('evaluation.0.type', 'GenerativeEvalHok', 'GenerativeEvalHook'),
        ('evaluation.0.data', 'vla', 'val'),
        ('custom_hooks.0.momentum_policy', 'kararas', 'karras'),
        ('log_config.hooks.1.type', 'TensorBoardLoggerHook', 'TensorboardLoggerHook'),
        ('lr_config.policy', 'CosineAnealing', 'CosineAnnealing'),
        ('runner.type', 'DynamicIterBasedRuner', 'DynamicIterBasedRunner'),
    ],
)
def test_misspelt_values(key, value, suggestion):
    with pytest.raises(ConfigError) as error:
        check_config(load_config(PUBLISHED_STYLE, {key: value}))
    assert f'{key}: {value!r}' in str(error.value)
    assert f'did you mean {suggestion!r}?' in str(error.value)


@pytest.mark.parametrize(
    ('written', 'meant'),
    [('optimzer', 'optimizer'), ('chekpoint_config', 'checkpoint_config'), ('evalution', 'evaluation')],
)
def test_misspelt_sections(written, meant):
    values = load_config(PUBLISHED_STYLE).to_dict()
    values[written] = values.pop(meant)
    with pytest.raises(ConfigError, match=f'{written}: .*did you mean {meant!r}'):
        check_config(Config(values))


def test_helper_variables_are_tolerated():
    values = load_config(PUBLISHED_STYLE).to_dict()
    values.update(temperature=0.3, step=4, methods=['a'], guidance_scales=(1, 2), my_dict={'a': 1}, resolution=8)
    check_config(Config(values))


@pytest.mark.parametrize('section', ['model', 'data', 'optimizer', 'total_iters'])
def test_missing_sections(section):
    values = load_config(PUBLISHED_STYLE).to_dict()
    del values[section]
    with pytest.raises(ConfigError, match=f'{section}: missing'):
        check_config(Config(values))


def test_evaluation_needs_no_optimizer():
    values = load_config(PUBLISHED_STYLE).to_dict()
    for section in ('optimizer', 'total_iters', 'lr_config', 'custom_hooks'):
        del values[section]
    check_config(Config(values), training=False)


def test_all_problems_are_listed():
    with pytest.raises(ConfigError) as error:
        check_config(changed(train_cfg__nffe=1, test_cfg__nffe=1, runner__typ='x'))
    assert all(key in str(error.value) for key in ('train_cfg.nffe', 'test_cfg.nffe', 'runner.typ'))


@pytest.mark.parametrize(
    ('key', 'value', 'expected'),
    [
        ('train_cfg.nfe', 'two', 'int'),
        ('total_iters', 'many', 'int'),
        ('total_iters', 0, 'positive'),
        ('train_cfg.policy_dropout', [0.1], 'float'),
        ('lr_config.warmup_ratio', 'small', 'float'),
        ('evaluation', {'type': 'GenerativeEvalHook'}, 'list'),
        ('data.train', 'digits', 'dict'),
        ('optimizer.diffusion', 'AdamW', 'dict'),
        ('data.train_dataloader.samples_per_gpu', 0, 'positive'),
    ],
)
def test_values_of_the_wrong_kind(key, value, expected):
    with pytest.raises(ConfigError) as error:
        check_config(load_config(PUBLISHED_STYLE, {key: value}))
    assert f'{key}: found' in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize('key', ['fp16', 'apex_amp'])
def test_precision_sections_of_the_old_kind_are_refused(key):
    with pytest.raises(ConfigError, match=f'{key}: .*torch_dtype'):
        check_config(changed(**{f'{key}__loss_scale': 512.0}))


def test_argument_that_belongs_at_the_top_level():
    with pytest.raises(ConfigError, match=r'model\.train_cfg: belongs at the top level'):
        check_config(changed(model__train_cfg={}))


@pytest.mark.parametrize(
    ('options', 'key'),
    [
        ({'test_cfg.guidance_scale': 0.5}, 'test_cfg.guidance_scale'),
        ({'train_cfg.teacher_test_cfg.guidance_scale': -1.0}, 'train_cfg.teacher_test_cfg.guidance_scale'),
        (
            {'evaluation.0.sample_kwargs.test_cfg_override.guidance_scale': 0.2},
            'evaluation.0.sample_kwargs.test_cfg_override.guidance_scale',
        ),
        ({'train_cfg.teacher_test_cfg.guidance_interval': [0, 600]}, 'train_cfg.teacher_test_cfg.guidance_interval'),
        ({'train_cfg.teacher_test_cfg.guidance_interval': [0.7, 0.1]}, 'train_cfg.teacher_test_cfg.guidance_interval'),
        ({'model.teacher.num_timesteps': 1000}, 'model.diffusion.num_timesteps'),
        ({'train_cfg.grad_accum_batch_size': 7}, 'train_cfg.grad_accum_batch_size'),
    ],
)
def test_values_that_contradict_each_other(options, key):
    with pytest.raises(ConfigError) as error:
        check_config(load_config(PUBLISHED_STYLE, options))
    assert f'{key}: found' in str(error.value) or f'{key}: 1 differs' in str(error.value)


def dx_config(segment_size: float, shift: float, nfe: int, final_step_size_scale: float) -> Config:
    values = load_config(PUBLISHED_STYLE).to_dict()
    student = values['model']['diffusion']
    network = student['denoising']
    for key in ('num_gaussians', 'logstd_inner_dim', 'gm_num_logstd_layers'):
        del network[key]
    network.update(type='DXDiTTransformer2DModel', n_grid=10)
    student.update(policy_type='DX', policy_kwargs={'segment_size': segment_size, 'shift': shift})
    student['timestep_sampler']['shift'] = 3.2
    for section in ('train_cfg', 'test_cfg'):
        values[section].update(nfe=nfe, final_step_size_scale=final_step_size_scale)
    values['train_cfg'].pop('policy_dropout')
    return Config(values)


def test_grid_that_fits_the_segments():
    check_config(dx_config(1 / 3.5, 3.2, nfe=4, final_step_size_scale=0.5))


@pytest.mark.parametrize(('segment_size', 'shift', 'key'), [(1 / 4, 3.2, 'segment_size'), (1 / 3.5, 1.0, 'shift')])
def test_grid_that_does_not_fit_the_segments(segment_size, shift, key):
    with pytest.raises(ConfigError, match=rf'model\.diffusion\.policy_kwargs\.{key}: found'):
        check_config(dx_config(segment_size, shift, nfe=4, final_step_size_scale=0.5))


def test_other_number_of_steps_than_trained_is_only_noted(caplog):
    with caplog.at_level(logging.WARNING, 'lakonlab.config'):
        check_config(changed(test_cfg__nfe=2))
    assert 'train_cfg.nfe is 1 and test_cfg.nfe is 2' in caplog.text


def test_old_names_of_keys_are_accepted():
    values = load_config(PUBLISHED_STYLE).to_dict()
    values['train_cfg']['gm_dropout'] = values['train_cfg'].pop('policy_dropout')
    check_config(Config(values))


def test_checking_leaves_the_config_alone():
    cfg = load_config(PUBLISHED_STYLE)
    check_config(cfg)
    before = copy.deepcopy(cfg.to_dict())
    check_config(cfg)
    assert cfg.to_dict() == before


def test_custom_imports(tmp_path, monkeypatch):
    module = tmp_path / 'my_lakonlab_parts.py'
    module.write_text(
        'from lakonlab.registry import DATASETS\n'
        '@DATASETS.register_module(force=True)\n'
        'class MyDigits:\n'
        '    def __init__(self, size): pass\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    imports = {'custom_imports.imports': ['my_lakonlab_parts']}
    data = {'data.train': {'type': 'MyDigits', 'size': 3}}
    check_config(load_config(PUBLISHED_STYLE, {**imports, **data}))
    with pytest.raises(ConfigError, match=r'data\.train: MyDigits needs size'):
        check_config(load_config(PUBLISHED_STYLE, {**imports, 'data.train': {'type': 'MyDigits'}}))
    with pytest.raises(ConfigError, match='no_such_parts'):
        check_config(load_config(PUBLISHED_STYLE, {'custom_imports.imports': ['no_such_parts']}))


class Base:
    def __init__(self, a, b=2):
        pass


class Forwarding(Base):
    def __init__(self, c=3, **kwargs):
        super().__init__(**kwargs)


class Open:
    def __init__(self, a, **kwargs):
        pass


def test_arguments_are_followed_through_kwargs():
    arguments = arguments_of(Forwarding)
    assert (arguments.names, arguments.required, arguments.is_open) == ({'a', 'b', 'c'}, {'a'}, False)
    assert arguments_of(Open).is_open
    assert arguments_of(Base, positional=1).names == {'b'}


@pytest.mark.parametrize(
    ('value', 'hint', 'expected'),
    [
        (1, int, True),
        (1e9, int, True),
        (1.5, int, False),
        (1, float, True),
        ('1', float, False),
        (None, int | None, True),
        ([1, 2], tuple[int, ...], True),
        (3, tuple[int, ...], False),
        ({}, dict, True),
        (False, float, True),
    ],
)
def test_what_fits_a_type(value, hint, expected):
    assert fits(value, hint) is expected
