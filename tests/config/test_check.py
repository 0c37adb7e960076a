"""What is wrong with a config is said before anything starts: the key, what was found, the nearest valid name."""

from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path

import pytest
from mmengine.config import Config

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.config.signature import arguments_of, fits
from lakonlab.registry import MODULES

ROOT = Path(__file__).parents[2]
PUBLISHED_STYLE = ROOT / 'tests' / 'data' / 'published_style_digits.py'
SHIPPED = sorted((ROOT / 'configs').glob('[!_]*/[!_]*.py'))
HERE = ('digits', 'emoji', 'fashion_mnist', 'gmflow')  # folders of configs that need nothing but this version


MY_LOSS = {'type': 'MyLoss', 'data_info': {'a': 'b'}, 'rescale_cfg': {'c': 1}, 'log_cfgs': {'type': 'mine'}}


class MyLoss:
    """A loss of a user's own, which does not say what is in its dicts."""

    def __init__(self, data_info, rescale_cfg, log_cfgs):
        pass


def changed(**options) -> Config:
    """The published-style config with some keys set; ``__`` stands for a dot."""
    return load_config(PUBLISHED_STYLE, {key.replace('__', '.'): value for key, value in options.items()})


@pytest.mark.parametrize('path', SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_configs_pass(path, caplog):
    cfg = load_config(path)
    with caplog.at_level(logging.WARNING, 'lakonlab.config'):
        check_config(cfg, training=not cfg.model.get('inference_only'), planning=path.parent.name not in HERE)
    said = [record.getMessage() for record in caplog.records if record.name == 'lakonlab.config']
    assert all('needs bitsandbytes' in message for message in said)
    if path.parent.name in HERE:
        assert not caplog.records


def test_published_style_passes_and_legacy_keys_are_reported_once(caplog):
    cfg = load_config(PUBLISHED_STYLE)
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        check_config(cfg)
        check_config(cfg)
    assert caplog.text.count('without effect here') == caplog.text.count('workflow') == 1
    assert 'workflow' not in cfg
    assert cfg.save_interval == 100  # helper variables stay


MISSPELT = {
    'model.diffusion.denoising.num_gausians': (8, 'num_gaussians'),
    'model.diffusion.denoising.num_layer': (3, 'num_layers'),
    'model.diffusion.policy_typ': ('GMFlow', 'policy_type'),
    'model.diffusion_use_em': (True, 'diffusion_use_ema'),
    'model.diffusion.flow_loss.rescale_mod': ('constant', 'rescale_mode'),
    'model.diffusion.flow_loss.rescale_cfg.sclae': (3.0, 'scale'),
    'model.diffusion.flow_loss.log_cfgs.typ': ('quartile', 'type'),
    'model.diffusion.flow_loss.data_info.prd': ('u_t_pred', 'pred'),
    'model.diffusion.timestep_sampler.shft': (1.0, 'shift'),
    'model.teacher.timestep_sampler.shft': (1.0, 'shift'),
    'model.teacher.denoising.freze': (True, 'freeze'),
    'train_cfg.policy_dropuot': (0.1, 'policy_dropout'),
    'train_cfg.diffusion_grad_clp': (1.0, 'diffusion_grad_clip'),
    'train_cfg.teacher_test_cfg.guidance_scal': (1.5, 'guidance_scale'),
    'train_cfg.teacher_test_cfg.sampler_kwargs.terminal_sigm': (0.1, 'terminal_sigma'),
    'test_cfg.total_substep': (3, 'total_substeps'),
    'test_cfg.sampler_kwargs.use_fp65': (True, 'use_fp64'),
    'evaluation.0.sample_kwargs.test_cfg_override.sampler_kwargs.use_fp65': (True, 'use_fp64'),
    'evaluation.0.sample_kwargs.test_cfg_override.temprature': (0.3, 'temperature'),
    'evaluation.0.sample_kwargs.test_cfg_overide': ({}, 'test_cfg_override'),
    'evaluation.0.feed_batchsize': (8, 'feed_batch_size'),
    'optimizer.diffusion.weigth_decay': (0.1, 'weight_decay'),
    'optimizer.diffusion.paramwise_cfg.custom_key': ({}, 'custom_keys'),
    'optimizer.diffusion.paramwise_cfg.custom_keys.proj_out.lr_mul': (0.1, 'lr_mult'),
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
        ('module_wrapper', 'fdsp2', 'fsdp2'),
        ('log_level', 'INFOS', 'INFO'),
        ('test_cfg.sampler', 'FlowMapSD', 'FlowMapSDE'),
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
        ('total_iters', 0, 'at least 1'),
        ('train_cfg.policy_dropout', [0.1], 'float'),
        ('lr_config.warmup_ratio', 'small', 'float'),
        ('evaluation', {'type': 'GenerativeEvalHook'}, 'list'),
        ('data.train', 'digits', 'dict'),
        ('optimizer.diffusion', 'AdamW', 'dict'),
        ('data.train_dataloader.samples_per_gpu', 0, 'at least 1'),
        ('data.samples_per_gpu', 0, 'at least 1'),
        ('data.workers_per_gpu', -1, 'at least 0'),
        ('data.val_dataloader.workers_per_gpu', -1, 'at least 0'),
        ('checkpoint_config.interval', 0, 'at least 1'),
        ('checkpoint_config.interval', 'often', 'at least 1'),
        ('checkpoint_config.must_save_interval', 0, 'at least 1'),
        ('checkpoint_config.max_keep_ckpts', 0, 'at least 1, or -1'),
        ('checkpoint_config.max_keep_ckpts', -2, 'at least 1, or -1'),
        ('evaluation.0.interval', 0, 'at least 1'),
        ('evaluation.0.interval', 2.5, 'at least 1'),
        ('evaluation.0.viz_num', -3, 'at least 0'),
        ('evaluation.0.feed_batch_size', 0, 'at least 1'),
        ('evaluation.0.metrics', 'fid', 'list'),
        ('evaluation.0.metrics', ['fid'], 'dict'),
        ('log_config.interval', 0, 'at least 1'),
        ('optimizer.diffusion.lr', 0, 'positive'),
        ('optimizer.diffusion.lr', '2e-3', 'positive'),
        ('optimizer.diffusion.lr', True, 'positive'),
        ('optimizer.diffusion.paramwise_cfg', [], 'dict'),
        ('optimizer.diffusion.paramwise_cfg.custom_keys', ['proj_out'], 'dict'),
        ('optimizer.diffusion.paramwise_cfg.custom_keys.proj_out.decay_mult', 'none', 'number'),
        ('optimizer.teacher', {'type': 'AdamW', 'lr': 1e-3}, 'never trained'),
        ('model.diffusion.flow_loss.rescale_cfg', 3.0, 'dict'),
        ('train_cfg.nfe', 0, 'at least 1'),
        ('train_cfg.max_raw_t', 1.5, 'from 0 to 1'),
        ('train_cfg.diffusion_grad_clip', -1.0, 'at least 0'),
        ('train_cfg.teacher_test_cfg.num_timesteps', 0, 'at least 1'),
        ('test_cfg.total_substeps', 0, 'at least 1'),
        ('evaluation.0.sample_kwargs.test_cfg_override.total_substeps', 0, 'at least 1'),
        ('evaluation.0.reference_kwargs.test_cfg_override.shift', 0, 'positive'),
    ],
)
def test_values_of_the_wrong_kind(key, value, expected):
    with pytest.raises(ConfigError) as error:
        check_config(load_config(PUBLISHED_STYLE, {key: value}))
    message = str(error.value)
    assert message.count(f'{key}: found') == message.count('\n') or 'evaluation.0.metrics' in message
    assert expected in message


@pytest.mark.parametrize('value', [None, 'x', [], {'a': 1}, float('inf')], ids=repr)
@pytest.mark.parametrize(
    'key',
    [
        'log_config.hooks',
        'total_iters',
        'module_wrapper',
        'model.diffusion.policy_type',
        'model.diffusion.policy_kwargs',
        'model.diffusion.flow_loss',
        'model.teacher.num_timesteps',
        'model.diffusion.timestep_sampler',
        'train_cfg.teacher_test_cfg.guidance_interval',
        'custom_hooks.0.type',
        'custom_hooks.0.momentum_policy',
        'evaluation.0.metrics',
        'evaluation.0.interval',
        'evaluation.0.sample_kwargs',
        'optimizer.diffusion.paramwise_cfg',
        'test_cfg.sampler_kwargs',
    ],
)
def test_strange_values_are_accepted_or_refused_as_errors_of_the_config(key, value):
    *path, last = key.split('.')
    values = node = load_config(PUBLISHED_STYLE).to_dict()
    for name in path:
        node = node[int(name) if name.isdigit() else name]
    node[last] = value
    with contextlib.suppress(ConfigError):
        check_config(Config(values))


def test_an_interval_of_evaluation_that_changes():
    check_config(changed(evaluation__0__interval={'milestones': [100], 'interval': [10, 50]}))
    with pytest.raises(ConfigError, match=r'evaluation\.0\.interval\.interval: found 1 intervals'):
        check_config(changed(evaluation__0__interval={'milestones': [100], 'interval': [10]}))
    with pytest.raises(ConfigError, match=r"evaluation\.0\.interval\.milestone: .*did you mean 'milestones'"):
        check_config(changed(evaluation__0__interval={'milestone': [100], 'interval': [10]}))
    with pytest.raises(ConfigError, match=r'evaluation\.0\.interval\.interval\.1: found 0'):
        check_config(changed(evaluation__0__interval={'milestones': [100], 'interval': [10, 0]}))


@pytest.mark.parametrize('metric', [{'tpye': 'SamplingSpeed'}, {}])
def test_metrics_without_a_type(metric):
    with pytest.raises(ConfigError, match=r"evaluation\.0\.metrics\.1: 'type' is missing"):
        check_config(changed(evaluation__0__metrics=[{'type': 'SamplingSpeed'}, metric]))
    with pytest.raises(ConfigError, match=r"evaluation\.0\.metrics: 'type' is missing"):
        check_config(changed(evaluation__0__metrics={'tpye': 'SamplingSpeed'}))
    with pytest.raises(ConfigError, match=r"evaluation\.0\.metrics\.0\.extractor: 'type' is missing"):
        check_config(changed(evaluation__0__metrics=[{'type': 'ClassAccuracy', 'extractor': metric}]))


def test_parts_of_the_model_without_a_type():
    values = load_config(PUBLISHED_STYLE).to_dict()
    network = values['model']['diffusion']['denoising']
    network['tpye'] = network.pop('type')
    with pytest.raises(ConfigError, match=r"model\.diffusion\.denoising: 'type' is missing .is 'tpye' a misspelling"):
        check_config(Config(values))


def test_rescaling_that_would_have_no_effect():
    values = load_config(PUBLISHED_STYLE).to_dict()
    del values['model']['diffusion']['flow_loss']['rescale_mode']
    with pytest.raises(ConfigError, match=r"flow_loss\.rescale_cfg: found .*rescale_mode='constant'"):
        check_config(Config(values))


def test_a_loss_that_declares_nothing_is_left_alone(monkeypatch):
    monkeypatch.setitem(MODULES.module_dict, 'MyLoss', MyLoss)
    check_config(changed(model__diffusion__flow_loss=MY_LOSS))


def test_the_solver_is_the_default_of_who_samples():
    check_config(changed(test_cfg__sampler_kwargs={'h': 1.0}))
    check_config(changed(test_cfg__sampler='FlowSDE', test_cfg__sampler_kwargs={'terminal_sigma': 0.1}))
    with pytest.raises(ConfigError, match=r'sampler_kwargs\.terminal_sigma: .*argument of FlowMapSDEScheduler'):
        check_config(changed(test_cfg__sampler_kwargs={'terminal_sigma': 0.1}))
    reference = {'role': 'teacher', 'test_cfg_override': {'num_timesteps': 4, 'sampler_kwargs': {'h': 1.0}}}
    with pytest.raises(ConfigError, match=r'sampler_kwargs\.h: .*argument of FlowEulerODEScheduler'):
        check_config(changed(evaluation__0__reference_kwargs=reference))


@pytest.mark.parametrize(
    ('section', 'key'),
    [('train_cfg.teacher_test_cfg', 'temperature'), ('evaluation.0.reference_kwargs.test_cfg_override', 'nfe')],
)
def test_keys_that_only_the_student_reads(section, key):
    options = {'evaluation.0.reference_kwargs.role': 'teacher', f'{section}.{key}': 1}
    with pytest.raises(ConfigError, match=rf'{section}\.{key}: .* is no key that this model reads'):
        check_config(load_config(PUBLISHED_STYLE, options))


@pytest.mark.parametrize('key', ['nfe'])
def test_required_keys_of_training(key):
    values = load_config(PUBLISHED_STYLE).to_dict()
    del values['train_cfg'][key]
    check_config(Config(copy.deepcopy(values)), training=False)
    with pytest.raises(ConfigError, match=rf'train_cfg\.{key}: missing; PiFlowImitation needs it'):
        check_config(Config(values))


@pytest.mark.parametrize('key', ['model.teacher', 'model.diffusion.flow_loss'])
def test_parts_that_training_needs(key):
    values = load_config(PUBLISHED_STYLE).to_dict()
    *path, last = key.split('.')
    node = values
    for name in path:
        node = node[name]
    del node[last]
    check_config(Config(copy.deepcopy(values)), training=False)
    with pytest.raises(ConfigError, match=rf'{key}: missing; .*PiFlowImitation'):
        check_config(Config(values))


def test_what_an_optimizer_may_train():
    options = {'type': 'AdamW', 'lr': 1e-3}
    values = load_config(PUBLISHED_STYLE).to_dict()
    values['optimizer'] = {'diffusion.denoising': options}
    check_config(Config(copy.deepcopy(values)))
    for key, message in {
        'teacher': "found 'teacher', but model.teacher is never trained",
        'teacher.denoising': "found 'teacher.denoising', but model.teacher is never trained",
        'difusion': "did you mean 'diffusion'",
    }.items():
        values['optimizer'] = {key: options}
        with pytest.raises(ConfigError, match=rf'optimizer\.{key}: .*{message}'):
            check_config(Config(copy.deepcopy(values)))


def test_older_places_of_the_teacher_guidance(caplog):
    values = load_config(PUBLISHED_STYLE).to_dict()
    del values['train_cfg']['teacher_test_cfg']['guidance_scale']
    values['train_cfg'].update(teacher_guidance_scale=1.5, teacher_distilled_guidance_scale=2.0)
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        check_config(Config(copy.deepcopy(values)))
    for key in ('guidance_scale', 'distilled_guidance_scale'):
        expected = f'train_cfg.teacher_{key} is the older name of train_cfg.teacher_test_cfg.{key}'
        assert [expected in record.getMessage() for record in caplog.records].count(True) == 1
    values['train_cfg']['teacher_guidance_scale'] = 0.5
    with pytest.raises(ConfigError, match=r'train_cfg\.teacher_guidance_scale: found 0\.5'):
        check_config(Config(values))


def test_published_names_and_options_of_hooks(caplog):
    options = {'clear_reals': False, 'dist': True}
    values = load_config(PUBLISHED_STYLE).to_dict()
    values['custom_hooks'][0]['type'] = 'ExponentialMovingAverageHookMod'
    values['evaluation'] = [{**entry, **options, 'metric_cpu_offload': True} for entry in values['evaluation'] * 2]
    values['evaluation'][1].update(prefix='again', viz_dir=None)
    cfg = Config(values)
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        check_config(cfg)
    assert cfg.custom_hooks[0].type == 'ExponentialMovingAverageHook'
    assert not set(options) & set(cfg.evaluation[1])
    assert cfg.evaluation[1].metric_cpu_offload  # it has an effect
    assert caplog.text.count('ExponentialMovingAverageHookMod') == 1
    for key in options:
        assert caplog.text.count(f'evaluation.{key} ') == 1


def with_metric(**metric) -> Config:
    """A config of the published style that measures with one metric."""
    values = load_config(PUBLISHED_STYLE).to_dict()
    values['evaluation'] = [{**values['evaluation'][0], 'metrics': [metric]}]
    return Config(values)


PUBLISHED_NETWORK = 'https://host/metrics/inception-2015-12-05.pt'


@pytest.mark.parametrize(
    'wanted', [{'type': 'StyleGAN', 'inception_path': PUBLISHED_NETWORK}, {'type': 'StyleGAN'}, None]
)
def test_the_published_inception_network_is_the_one_that_is_used(caplog, wanted):
    cfg = with_metric(type='InceptionMetrics', reference='a.npz', inception_args=wanted)
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        check_config(cfg)
    assert 'evaluation.metrics.inception_args (the network is that of inception-2015-12-05' in caplog.text
    assert 'inception_args' not in cfg.evaluation[0].metrics[0]


@pytest.mark.parametrize(
    'wanted',
    [{'type': 'pytorch'}, {'type': 'StyleGAN', 'inception_path': 'mine.pt'}, {'type': 'StyleGAN', 'size': 3}, 'a.pt'],
)
def test_another_inception_network_is_not_dropped_silently(wanted):
    with pytest.raises(ConfigError, match=r'inception_args: found .*name another network by extractor'):
        check_config(with_metric(type='InceptionMetrics', reference='a.npz', inception_args=wanted))


@pytest.mark.parametrize('kind', ['HPSv2', 'HPSv3', 'VQAScore', 'CLIPSimilarity', 'ColorStats'])
def test_metrics_refuse_arguments_that_they_do_not_have(kind):
    with pytest.raises(ConfigError, match=r'metrics\.0\.inception_args'):
        check_config(with_metric(type=kind, inception_args={'type': 'StyleGAN'}))


def test_best_checkpoint_needs_a_place_and_a_number():
    def with_entry(**entry) -> Config:
        values = load_config(PUBLISHED_STYLE).to_dict()
        values['evaluation'] = [{**values['evaluation'][0], **entry}]
        return Config(values)

    metrics = [{'type': 'SamplingSpeed'}, {'type': 'ReferenceRMSE'}]
    wanted = {'save_best_ckpt': True, 'metrics': metrics, 'reference_kwargs': {'role': 'teacher'}}
    check_config(with_entry(save_best_ckpt=False, best_metric='fid'))  # as published files have it
    check_config(with_entry(**wanted))
    check_config(with_entry(**wanted, best_metric='reference_rmse'))
    check_config(with_entry(**wanted, best_metric=['reference_rmse']))
    distances = [{'type': 'InceptionMetrics', 'reference': 'a.npz', 'prefix': 'patch'}]
    check_config(with_entry(save_best_ckpt=True, metrics=distances, best_metric='patch_fid'))
    for options, message in (
        ({'metrics': distances, 'best_metric': 'patch_kid'}, r"'patch_kid', expected .*: 'patch_fid', 'patch_is'"),
        ({'best_metric': 'fid'}, r"0\.best_metric: found 'fid', expected .* 'reference_rmse'"),
        ({'best_metric': ['reference_rmse', 'fid']}, r"0\.best_metric: found \['reference_rmse', 'fid'\], expected"),
        ({'best_metric': 'samples_per_second'}, r"0\.best_metric: found 'samples_per_second', expected .*'reference"),
        ({'metrics': {'type': 'SamplingSpeed'}}, r'0\.best_metric: found None, but no metric of this entry'),
        ({'interval': None}, r'0\.save_best_ckpt: found True, but interval=None'),
    ):
        with pytest.raises(ConfigError, match=message):
            check_config(with_entry(**{**wanted, **options}))
    without_place = with_entry(**wanted)
    without_place.checkpoint_config = None
    with pytest.raises(ConfigError, match=r'0\.save_best_ckpt: found True, but checkpoint_config is not set'):
        check_config(without_place)
    check_config(without_place, training=False)


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
        (
            {'model.teacher.num_timesteps': 1000, 'model.diffusion.num_timesteps': 1000},
            'train_cfg.teacher_test_cfg.guidance_interval',
        ),
        ({'model.teacher.num_timesteps': 1000}, 'model.diffusion.num_timesteps'),
        ({'train_cfg.grad_accum_batch_size': 7}, 'train_cfg.grad_accum_batch_size'),
    ],
)
def test_values_that_contradict_each_other(options, key):
    with pytest.raises(ConfigError) as error:
        check_config(load_config(PUBLISHED_STYLE, options))
    assert f'{key}: found' in str(error.value) or f'{key}: 1 differs' in str(error.value)


def test_scales_of_guidance_that_mixes_probabilities(monkeypatch):
    monkeypatch.setattr(MODULES.get('GaussianFlow'), 'guidance_is_probabilistic', True, raising=False)
    check_config(changed(train_cfg__teacher_test_cfg__guidance_scale=0.5))


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


def test_grid_sampled_with_another_shift():
    cfg = dx_config(1 / 3.5, 3.2, nfe=4, final_step_size_scale=0.5)
    cfg.test_cfg.shift = 3.2
    check_config(cfg)
    cfg.test_cfg.shift = 1.0
    with pytest.raises(ConfigError, match=r'test_cfg\.shift: found 1.0, but the grid .* laid out for shift=3.2'):
        check_config(cfg)


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


@pytest.mark.parametrize('value', [[1, 2], 'a text', 3])
def test_helper_variables_whose_names_resemble_sections(value, caplog):
    with caplog.at_level(logging.WARNING, 'lakonlab.config'):
        check_config(Config({**load_config(PUBLISHED_STYLE).to_dict(), 'test_cfgs': value}))
    assert 'taken for a helper variable' in caplog.text
    with pytest.raises(ConfigError, match=r'did you mean .test_cfg.'):
        check_config(Config({**load_config(PUBLISHED_STYLE).to_dict(), 'test_cfgs': {'nfe': 1}}))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'checkpoint_config.by_epoch': True}, 'checkpoint_config.by_epoch: found True'),
        ({'custom_hooks.0.module_keys': ('diffusion_ema2',)}, "custom_hooks.0.module_keys: found 'diffusion_ema2'"),
        (
            {'model.diffusion.timestep_sampler.logit_normal_enable': True},
            'model.diffusion.timestep_sampler.logit_normal_enable: found True',
        ),
        ({'train_cfg.teacher_guidance_scale': 7.0}, 'train_cfg.teacher_guidance_scale: found 7.0'),
        ({'train_cfg.gm_dropout': 0.5}, 'train_cfg.gm_dropout: found 0.5'),
        ({'model.use_condition_latents': True}, 'model.use_condition_latents'),
    ],
)
def test_what_a_run_would_refuse_is_refused_before(options, message):
    """Also where it is only planned."""
    values = load_config(PUBLISHED_STYLE).to_dict()
    for dotted, value in options.items():
        *path, last = dotted.split('.')
        node = values
        for key in path:
            node = node[int(key) if isinstance(node, list) else key]
        node[last] = value
    with pytest.raises(ConfigError) as error:
        check_config(Config(values), planning=True)
    assert message in str(error.value)


def test_equal_values_of_an_older_and_a_present_key_are_fine():
    values = load_config(PUBLISHED_STYLE).to_dict()
    values['train_cfg']['teacher_guidance_scale'] = values['train_cfg']['teacher_test_cfg']['guidance_scale']
    check_config(Config(values))


LATER = {
    'model.use_condition_latents': False,
    'model.vae_2': None,
    'train_cfg.teacher_test_cfg_2': {},
    'runner.gc_interval': -1,
    'runner.pass_training_status': False,
    'log_config.hooks.0.ignore_last': False,
}


def test_arguments_that_change_nothing_are_accepted(caplog):
    values = load_config(PUBLISHED_STYLE).to_dict()
    for dotted, value in LATER.items():
        *path, last = dotted.split('.')
        node = values
        for key in path:
            node = node[int(key) if isinstance(node, list) else key]
        node[last] = value
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        check_config(Config(values))
    for dotted in LATER.keys() - {'runner.gc_interval'}:
        assert dotted.replace('.hooks.0', '.hooks') in caplog.text


def test_what_several_processes_read_is_said(caplog):
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        check_config(changed(module_wrapper='fsdp', find_unused_parameters=True))
    assert 'without effect in one process: find_unused_parameters, dist_params, module_wrapper' in caplog.text


def test_workers_of_published_test_loaders():
    for training, expected in ((False, 3), (True, None)):
        values = load_config(PUBLISHED_STYLE).to_dict()
        values['data']['val_workers_per_gpu'] = 3
        cfg = Config(values)
        check_config(cfg, training=training)
        assert cfg.data.test_dataloader.get('workers_per_gpu') == expected


def test_published_options_of_loaders(caplog):
    def config(**options):
        values = load_config(PUBLISHED_STYLE).to_dict()
        values['data'] = {**values['data'], **options}
        return Config(values)

    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        cfg = config(num_gpus=8, dist=True, drop_last=True, sampler=None, multiprocessing_context='spawn')
        check_config(cfg)
    for key in ('num_gpus', 'dist', 'drop_last'):
        assert f'data.{key} (' in caplog.text
        assert key not in cfg.data
    with pytest.raises(ConfigError, match=r'data\.sampler'):
        check_config(config(sampler=dict(type='DistributedSampler')))


def test_a_policy_without_components_drops_none(caplog):
    cfg = dx_config(1 / 3.5, 3.2, nfe=4, final_step_size_scale=0.5)
    cfg.train_cfg.gm_dropout = 0.05
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        check_config(cfg)
    assert 'gm_dropout' in caplog.text
    assert 'gm_dropout' not in cfg.train_cfg
    cfg.train_cfg.policy_dropout = 0.05
    with pytest.raises(ConfigError, match=r'policy_dropout: found 0.05, but a DX policy'):
        check_config(cfg)


@pytest.mark.parametrize(
    ('section', 'key', 'value', 'message'),
    [
        ('test_cfg', 'sigmas', [1.0, 0.5], r'test_cfg\.sigmas: makes segments of 0.5, 0.5'),
        ('test_cfg', 'sigmas', [1, 0.9, 0.8, 0.7], r'test_cfg\.sigmas: makes segments of 0.1, 0.1, 0.1, 0.7'),
        ('test_cfg', 'use_dynamic_shifting', True, r'test_cfg\.use_dynamic_shifting: found True, but the grid'),
    ],
)
def test_grid_sampled_in_other_ways_than_it_is_laid_out(section, key, value, message):
    cfg = dx_config(1 / 3.5, 3.2, nfe=4, final_step_size_scale=0.5)
    if key == 'sigmas':
        del cfg.test_cfg['nfe'], cfg.test_cfg['final_step_size_scale']
    cfg[section][key] = value
    with pytest.raises(ConfigError, match=message):
        check_config(cfg)


def test_grid_sampled_at_the_times_it_is_laid_out_for():
    cfg = dx_config(1 / 3.5, 3.2, nfe=4, final_step_size_scale=0.5)
    cfg.test_cfg.sigmas = [1 - step / 3.5 for step in range(4)]
    check_config(cfg)
    cfg.test_cfg.nfe = 3
    with pytest.raises(ConfigError, match=r'test_cfg\.sigmas: has 4 entries, but nfe is 3'):
        check_config(cfg)


@pytest.mark.parametrize(('key', 'value'), [('shift', 3.2), ('nfe', 2), ('final_step_size_scale', 0.5)])
@pytest.mark.parametrize('path', ['test_cfg', 'evaluation.0.sample_kwargs.test_cfg_override'])
def test_sampling_unlike_training_is_noted(key, value, path, caplog):
    values = load_config(PUBLISHED_STYLE).to_dict()
    values['train_cfg']['final_step_size_scale'] = 1.0
    values['evaluation'][0].setdefault('sample_kwargs', {})['test_cfg_override'] = {}
    node = values
    for part in path.split('.'):
        node = node[int(part) if isinstance(node, list) else part]
    node[key] = value
    with caplog.at_level(logging.WARNING, 'lakonlab.config'):
        check_config(Config(values))
    assert f'{path}.{key} is {value}: samples differ from what is trained' in caplog.text


@pytest.mark.parametrize('metrics', [{'type': 'ReferenceRMSE'}, [{'type': 'ColorStats'}, {'type': 'ReferenceLPIPS'}]])
@pytest.mark.parametrize('planning', [False, True])
def test_what_is_compared_needs_something_to_compare_with(metrics, planning):
    values = load_config(PUBLISHED_STYLE).to_dict()
    values['evaluation'] = [{**values['evaluation'][0], 'metrics': metrics}]
    with pytest.raises(ConfigError, match=r'evaluation\.0: Reference\w+ compares with reference samples, but referenc'):
        check_config(Config(values), planning=planning)
    values['evaluation'][0]['reference_kwargs'] = {'role': 'teacher'}
    check_config(Config(values), planning=planning)


def test_entries_of_evaluation_are_told_apart():
    def check(*entries):
        values = load_config(PUBLISHED_STYLE).to_dict()
        values['data']['val2'] = values['data']['val']
        values['evaluation'] = [{**values['evaluation'][0], **entry} for entry in entries]
        check_config(Config(values))

    check({'viz_dir': 'viz/a'}, {'data': 'val2', 'viz_dir': 'viz/b'}, {'prefix': 'x', 'viz_dir': None})
    check({'viz_dir': 'viz/a'}, {'data': 'val2', 'viz_dir': 'viz/a', 'viz_num': 0})
    with pytest.raises(
        ConfigError, match=r"evaluation\.1 and evaluation\.2: found 2 entries of the name 'val2', "
    ) as found:
        check({}, {'data': 'val2', 'prefix': ''}, {'data': 'val2', 'prefix': '', 'viz_num': 0})
    assert 'evaluation.0 and' in str(found.value)  # two folders are the same, too; the third writes no images
    assert str(found.value).count('\n') == 2
    with pytest.raises(
        ConfigError, match=r"evaluation\.0 and evaluation\.1: found 2 entries with viz_dir='s3://bucket/v'"
    ):
        check({'viz_dir': 's3://bucket/v'}, {'data': 'val2', 'viz_dir': 's3://bucket/v/'})
