"""Published-style files are used unmodified: what they mean, what is said of them, and what a run of them would be.

The files are written in the schema of October 2025: older key names, FSDP options, loops at module level,
``latest.txt``, two bases that both hold ``model``. ``tests/tools`` trains one.
"""

import collections
import contextlib
import dataclasses
import importlib
import io
import logging
import os
import re
import sys
from pathlib import Path

import pytest

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.registry import MODULES
from lakonlab.runner import launch
from lakonlab.runner.dry_run import build_on_meta
from tests.tools.test_command_line import arguments

STYLE = Path(__file__).parents[1] / 'data' / 'published_style'
QWEN, IMAGENET = STYLE / 'qwen.py', STYLE / 'dit_imagenet.py'
OWN = Path(__file__).parents[2] / 'configs'
QWEN_REPORTS = [
    'workflow',
    'mp_start_method',
    'data.train_dataloader.num_threads',
    'runner.ckpt_fp16 (',
    'runner.ckpt_bf16_optim',
    'checkpoint_config.create_symlink',
    'fsdp_kwargs.tie_key_mappings',
    'fsdp_kwargs.use_orig_params',
    'evaluation.clear_reals',
    'ExponentialMovingAverageHookMod is called',
    'train_cfg.teacher_guidance_scale is the older name',
    'train_cfg.gm_dropout is the older name',
]
IMAGENET_REPORTS = [
    'data.val_workers_per_gpu',
    'runner.is_dynamic_ddp',
    'test_cfg.guidance_interval guides the teacher too',
    'test_cfg.orthogonal_guidance guides the teacher too',
    "orthogonal_guidance_axis='velocity'",
    'train_cfg.gm_dropout is the older name',
    "'AdamW8bit' needs bitsandbytes",
]


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importlib.import_module('diffusers.loaders.peft')  # which has looked for bitsandbytes by now, and would miss it
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, 'bitsandbytes.optim', None)
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0')
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_PROFILE'):
        monkeypatch.delenv(name, raising=False)
    for name in ('AWS_SHARED_CREDENTIALS_FILE', 'AWS_CONFIG_FILE'):
        monkeypatch.setenv(name, os.devnull)


def checked(path, **options):
    cfg = load_config(path)
    check_config(cfg, planning=True, **options)
    return cfg


@pytest.mark.parametrize(('path', 'reports'), [(QWEN, QWEN_REPORTS), (IMAGENET, IMAGENET_REPORTS)])
def test_what_has_another_name_or_no_meaning_is_said_once(path, reports, caplog):
    with caplog.at_level(logging.INFO, 'lakonlab.config'):
        checked(path)
    said = collections.Counter({text: caplog.text.count(text) for text in reports})
    assert said == dict.fromkeys(reports, 1), said


@pytest.mark.parametrize('path', [QWEN, IMAGENET])
@pytest.mark.parametrize('section', ['train_cfg', 'test_cfg', 'runner', 'data', 'checkpoint_config', 'fsdp_kwargs'])
def test_nothing_is_dropped_silently(path, section):
    """A key that is neither known nor said to be without effect is an error."""
    cfg = load_config(path)
    cfg[section] = {**(cfg.get(section) or {}), 'surely_unknown': 1}
    with pytest.raises(ConfigError, match=rf'{section}\.surely_unknown: '):
        check_config(cfg, planning=True)


def test_a_real_run_is_refused_by_what_is_not_here():
    with pytest.raises(ConfigError, match='AdamW8bit'):
        check_config(load_config(IMAGENET))
    values = load_config(QWEN)
    check_config(values)
    values.evaluation[0].metrics = [dict(type='FutureMetric', anything=1)]
    for planning in (False, True):
        with pytest.raises(ConfigError, match=r"evaluation\.0\.metrics\.0\.type: .*'FutureMetric'"):
            check_config(values, planning=planning)


@pytest.mark.parametrize(
    ('key', 'nearest'), [('cache_directory', 'cache_dir'), ('prompt_dataset_kwarg', 'prompt_dataset_kwargs')]
)
def test_arguments_of_prompt_data_sets_are_checked(key, nearest):
    values = load_config(QWEN)
    values.data.train[key] = 'x'
    with pytest.raises(ConfigError, match=rf"data\.train\.{key}: .*did you mean '{nearest}'"):
        check_config(values, planning=True)


def test_older_keys_mean_what_the_present_ones_mean(monkeypatch):
    """The sections of the parts, as they see them, equal those of our own config."""
    cfg = checked(IMAGENET)
    own = load_config(OWN / 'piflow_imagenet' / 'gmdit_k32_imagenet_piid_1step_8gpus.py')
    models = {}
    for name, config in {'published style': cfg, 'own': own}.items():
        config.model.diffusion.denoising.num_layers = config.model.teacher.denoising.num_layers = 1
        models[name] = build_on_meta(config, locate=False)
    ours, theirs = models['own'], models['published style']
    # batch_teacher is ours, and changes no number
    read = dataclasses.replace(theirs.diffusion.train_section(), batch_teacher=False)
    assert read == ours.diffusion.train_section()
    assert theirs.diffusion.train_section().policy_dropout == 0.05
    scale, section = theirs.teacher_guidance()
    assert scale == ours.teacher_guidance()[0] == 2.7
    # orthogonal_guidance of the published-style file is 0.5, along the velocity as up to 0.1.1
    read = theirs.teacher.test_section(section)
    expected = ours.teacher.test_section(ours.teacher_guidance()[1])
    assert list(read.guidance_interval) == list(expected.guidance_interval) == [0, 600]
    assert (read.orthogonal_guidance, read.orthogonal_guidance_axis) == (0.5, 'velocity')


def test_helper_variables_and_loops_of_a_file():
    cfg = checked(QWEN)
    assert [entry.prefix for entry in cfg.evaluation] == ['cool', 'warm']
    assert [entry.sample_kwargs.test_cfg_override.temperature for entry in cfg.evaluation] == [0.3, 1.0]
    assert cfg.checkpoint_config.interval == 100
    assert cfg.custom_hooks[0].type == 'ExponentialMovingAverageHook'
    assert cfg.model.text_encoder.type == 'PretrainedQwenImageTextEncoder'
    assert cfg.model.diffusion.denoising.lora_rank == 256
    assert MODULES.get(cfg.model.vae.type) is not None


def output_of(command, *args, **options):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command(arguments(*args, cfg_options=None, no_validate=False, dry_run=True, **options)) == 0
    return out.getvalue()


@pytest.mark.parametrize('path', [QWEN, IMAGENET])
def test_the_tools_plan_it(path, tmp_path):
    plan = output_of(launch.train, path, plan_world_size='8,32')
    assert ('This run cannot start yet: data sets lack what is said above' in plan) == (path == QWEN)
    assert ("MISSING: data.train: cache_dir='preproc_qwen': there is no folder data/t2i" in plan) == (path == QWEN)
    # nobody has that bucket
    assert ('This run cannot start yet: checkpoint_config.out_dir' in plan) == (path == IMAGENET)
    sharded = re.findall(r'^  fsdp +(\d+) ', plan, re.MULTILINE)
    assert sharded == ['8', '32']
    if path == QWEN:
        assert 'begins' not in plan
        assert 'starts from the beginning' in plan
        assert '21,421,519,490' in plan
    else:
        assert 'begins where its checkpoints say, which cannot be looked at' in plan
        assert re.search(
            r'^  checkpoints +s3://bucket/checkpoints/\w+\n +NOT WRITABLE: cannot write to', plan, re.MULTILINE
        )

    plan = output_of(launch.test, path)
    names = ['val_cool', 'val_warm'] if path == QWEN else ['val_step1']
    listed = [line.strip() for line in plan.splitlines()]
    assert [name for name in names if name in listed] == names
    assert ('temperature=1.0' in plan) == (path == QWEN)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_that_cannot_start_is_said(tmp_path):
    (tmp_path / 'x.py').write_text(
        f"_base_ = {str(QWEN)!r}\nmodel = dict(diffusion=dict(denoising=dict(pretrained='x')))"
    )
    plan = output_of(launch.test, tmp_path / 'x.py')
    assert 'This evaluation cannot start yet: the weights of model.diffusion.denoising.pretrained' in plan
