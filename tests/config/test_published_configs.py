"""Configs of the published models: what they say, and what they build at full size, on the meta device."""

import gzip
import json
from pathlib import Path

import pytest

from lakonlab.config.check import check_config
from lakonlab.config.load import load_config
from lakonlab.models.architecture.roles import named_state
from lakonlab.runner.dry_run import build_on_meta

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
MANIFESTS = ROOT / 'tests' / 'data' / 'manifests'
FOLDERS = ('piflow_imagenet', 'piqwen', 'piflux', 'misc', 'gmflow')
NAMES = sorted(f'{path.parent.name}/{path.stem}' for folder in FOLDERS for path in (CONFIGS / folder).glob('[!_]*.py'))
TRAINED = [name for name in NAMES if name.endswith('gpus')]
ROLES = ('teacher', 'diffusion', 'diffusion_ema')
ON_ADAPTERS = [name for name in TRAINED if name.startswith(('piqwen', 'piflux'))]


def load(name):
    cfg = load_config(CONFIGS / f'{name}.py')
    check_config(cfg, training=name in TRAINED, planning=True)
    return cfg


def manifest(name, part='student'):
    return json.loads(gzip.decompress((MANIFESTS / f'{name.replace("/", ".")}.{part}.json.gz').read_bytes()))


def plain(options):
    """Arguments as a config of the reference would list them; the order of targets is of no meaning."""
    options = json.loads(json.dumps({key: value for key, value in options.items() if value is not None}))
    if 'lora_target_modules' in options:
        options['lora_target_modules'] = sorted(options['lora_target_modules'])
    return options


def state_of(network):
    return {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix('torch.'), int(tensor.requires_grad)]
        for name, tensor in named_state(network)
    }


def test_no_config_is_missing():
    published = {
        path.name.removesuffix('.student.json.gz').replace('.', '/', 1) for path in MANIFESTS.glob('*.student.json.gz')
    }
    assert set(NAMES) == published


@pytest.mark.parametrize('name', NAMES)
def test_arguments_are_the_published_ones(name):
    cfg = load(name)
    assert cfg.name == Path(name).name
    recorded = manifest(name)
    diffusion = cfg.model.diffusion
    assert {'checkpointing': False, **plain(diffusion.denoising)} == {
        'checkpointing': False,
        **plain(recorded['build']),
    }
    assert diffusion.get('policy_type') == recorded['policy_type']
    assert plain(diffusion.get('policy_kwargs') or {}) == (recorded['policy_kwargs'] or {})
    if cfg.model.get('teacher'):
        assert plain(cfg.model.teacher.denoising) == plain(manifest(name, 'teacher')['build'])


@pytest.mark.parametrize('name', NAMES)
def test_networks_have_the_published_names_and_shapes(name):
    model = build_on_meta(load(name), locate=False)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    recorded = manifest(name)
    student = state_of(model.diffusion.denoising)
    assert student == recorded['state']
    if getattr(model, 'teacher', None) is not None:
        assert state_of(model.teacher.denoising) == manifest(name, 'teacher')['state']
    if name in TRAINED:
        average = state_of(model.diffusion_ema.denoising)
        assert {key: value[:2] for key, value in average.items()} == {key: value[:2] for key, value in student.items()}
        assert not any(trained for _, _, trained in average.values())
    if name in ON_ADAPTERS:
        exported = {key.replace('.default', ''): shape for key, (shape, _, trained) in student.items() if trained}
        assert exported == {key: shape for key, (shape, *_) in manifest(name, 'adapter')['tensors'].items()}
        # there is one base
        state = {role: dict(named_state(getattr(model, role).denoising)) for role in ROLES}
        base = {id(tensor) for tensor in state['teacher'].values()}
        assert {id(tensor) for tensor in state['diffusion'].values() if not tensor.requires_grad} <= base
        own = {role: {id(tensor) for tensor in state[role].values()} - base for role in ROLES[1:]}
        assert not own['diffusion'] & own['diffusion_ema']
        assert len(own['diffusion']) == len(own['diffusion_ema']) == len(exported)


def value_at(node, dotted):
    for key in dotted.split('.'):
        node = node[int(key) if isinstance(node, (list, tuple)) else key] if node is not None else None
    return node


IMAGENET = {
    'optimizer.diffusion.type': 'AdamW8bit',
    'optimizer.diffusion.lr': 5e-5,
    'optimizer.diffusion.weight_decay': 0,
    'data.train_dataloader.samples_per_gpu': 512,
    'data.val_dataloader.samples_per_gpu': 125,
    'lr_config.warmup_iters': 400,
    'train_cfg.diffusion_grad_clip': 50,
    'train_cfg.diffusion_grad_clip_begin_iter': 400,
    'train_cfg.policy_dropout': 0.05,
    'train_cfg.num_intermediate_states': 2,
    'train_cfg.teacher_test_cfg.orthogonal_guidance': False,
    'model.diffusion.flow_loss.rescale_cfg.scale': 3,
    'custom_hooks.0.start_iter': 400,
    'checkpoint_config.interval': 400,
    'checkpoint_config.must_save_interval': 800,
    'evaluation.0.interval': 400,
    'evaluation.0.metrics.0.num_images': 50000,
}
TEXT = {
    'optimizer.diffusion.type': 'AdamW8bit',
    'optimizer.diffusion.lr': 1e-4,
    'optimizer.diffusion.weight_decay': 0,
    'lr_config.warmup_iters': 100,
    'train_cfg.nfe': 4,
    'test_cfg.nfe': 4,
    'train_cfg.final_step_size_scale': 0.5,
    'test_cfg.final_step_size_scale': 0.5,
    'train_cfg.window_substeps': 3,
    'train_cfg.diffusion_grad_clip': 50,
    'train_cfg.diffusion_grad_clip_begin_iter': 100,
    'model.tie_teacher': True,
    'model.diffusion.timestep_sampler.shift': 3.2,
    'model.teacher.timestep_sampler.shift': 3.2,
    'model.diffusion.flow_loss.rescale_cfg.scale': 30,
    'custom_hooks.0.start_iter': 100,
    'checkpoint_config.interval': 100,
    'checkpoint_config.must_save_interval': 200,
    'evaluation.0.interval': 100,
    'data.train.latent_size': (16, 128, 128),
}
QWEN = {
    **TEXT,
    'total_iters': 9000,
    'train_cfg.num_intermediate_states': 2,
    'train_cfg.teacher_test_cfg.guidance_scale': 4,
    'train_cfg.grad_accum_batch_size': 4,
}
FLUX = {
    **TEXT,
    'total_iters': 3000,
    'train_cfg.num_intermediate_states': 4,
    'train_cfg.num_decay_iters': 2000,
    'train_cfg.distilled_guidance_scale': 3.5,
    'train_cfg.teacher_test_cfg.distilled_guidance_scale': 3.5,
    'test_cfg.distilled_guidance_scale': 3.5,
}
DATA_BASED = {'model.diffusion.type': 'PiFlowImitation', 'data.train_dataloader.samples_per_gpu': 8}
DATA_FREE = {'model.diffusion.type': 'PiFlowImitationDataFree', 'data.train_dataloader.samples_per_gpu': 2}
MIXTURE = {'train_cfg.policy_dropout': 0.1, 'test_cfg.temperature': 0.3}
TABLE = {
    'piflow_imagenet/gmdit_k32_imagenet_piid_1step_8gpus': {
        **IMAGENET,
        'train_cfg.nfe': 1,
        'total_iters': 140000,
        'model.diffusion.num_timesteps': 1000,
        'model.teacher.num_timesteps': 1000,
        'train_cfg.teacher_test_cfg.guidance_scale': 2.7,
        'train_cfg.teacher_test_cfg.guidance_interval': [0, 600],
    },
    'piflow_imagenet/gmrepa_k32_imagenet_piid_1step_8gpus': {
        **IMAGENET,
        'train_cfg.nfe': 1,
        'total_iters': 140000,
        'model.diffusion.num_timesteps': 1,
        'model.teacher.num_timesteps': 1,
        'train_cfg.teacher_test_cfg.guidance_scale': 3.2,
        'train_cfg.teacher_test_cfg.guidance_interval': [0, 0.7],
    },
    'piflow_imagenet/gmrepa_k32_imagenet_piid_2step_8gpus': {
        **IMAGENET,
        'train_cfg.nfe': 2,
        'train_cfg.final_step_size_scale': 1,
        'total_iters': 24000,
        'train_cfg.teacher_test_cfg.guidance_scale': 2.8,
        'train_cfg.teacher_test_cfg.guidance_interval': [0, 0.7],
    },
    'piqwen/gmqwen_k8_piid_4step_32gpus': {**QWEN, **DATA_BASED, **MIXTURE},
    'piqwen/gmqwen_k8_datafree_piid_4step_32gpus': {**QWEN, **DATA_FREE, **MIXTURE},
    'piqwen/dxqwen_n10_piid_4step_32gpus': {**QWEN, **DATA_BASED},
    'piqwen/dxqwen_p10_piid_4step_32gpus': {**QWEN, **DATA_BASED},
    'piflux/gmflux_k8_piid_4step_32gpus': {**FLUX, **DATA_BASED, **MIXTURE},
    'piflux/gmflux_k8_piid_8step_32gpus': {
        **FLUX,
        **DATA_BASED,
        'train_cfg.nfe': 8,
        'test_cfg.nfe': 8,
        'train_cfg.policy_dropout': 0.1,
        'test_cfg.temperature': 0.7,
    },
    'piflux/gmflux_k8_datafree_piid_4step_32gpus': {**FLUX, **DATA_FREE, **MIXTURE},
    'piflux/dxflux_n10_piid_4step_32gpus': {**FLUX, **DATA_BASED},
}
EVERYWHERE = {
    'optimizer.diffusion.betas': (0.9, 0.95),
    'lr_config.policy': 'fixed',
    'lr_config.warmup': 'linear',
    'lr_config.warmup_ratio': 0.001,
    'train_cfg.total_substeps': 128,
    'test_cfg.total_substeps': 128,
    'model.diffusion_use_ema': True,
    'custom_hooks.0.momentum_policy': 'karras',
    'custom_hooks.0.momentum_cfg.gamma': 7,
    'checkpoint_config.max_keep_ckpts': 1,
    'module_wrapper': 'ddp',
}


@pytest.mark.parametrize('name', TABLE)
def test_hyperparameters_are_the_published_ones(name):
    cfg = load(name).to_dict()
    expected = {**EVERYWHERE, **TABLE[name]}
    assert {key: value_at(cfg, key) for key in expected} == expected
    if cfg['model']['diffusion']['policy_type'] == 'DX':
        assert not cfg['train_cfg'].get('policy_dropout')
        assert 'temperature' not in cfg['test_cfg']


def test_the_table_is_complete():
    assert {name for name in TRAINED if not name.startswith('gmflow')} == set(TABLE)


def combined(tmp_path, folder, *bases):
    """A config on some files of a folder."""
    path = tmp_path / 'mine.py'
    listed = [str(CONFIGS / folder / base) for base in bases]
    path.write_text(f'_base_ = {listed!r}\n', encoding='utf-8')
    cfg = load_config(path)
    check_config(cfg, planning=True)
    return cfg


@pytest.mark.parametrize('folder', ['piqwen', 'piflux'])
@pytest.mark.parametrize('strategy', ['_ddp_train.py', '_fsdp_train.py'])
def test_prompts_may_be_embedded_while_training(tmp_path, folder, strategy):
    """Both files hold ``model``."""
    data = ('_data.py', '../_base_/data_free.py')
    cfg = combined(tmp_path, folder, '_gm_k8.py', '_train.py', *data, strategy, '_text_encoder.py')
    assert cfg.model.text_encoder.type.endswith('TextEncoder')
    is_ddp = strategy.startswith('_ddp')
    assert cfg.model.diffusion.denoising.get('freeze_exclude_autocast_dtype') == ('bfloat16' if is_ddp else None)
    assert cfg.module_wrapper == ('ddp' if is_ddp else 'fsdp')
    assert cfg.optimizer.diffusion.type == ('AdamW8bit' if is_ddp else 'AdamW')
    assert cfg.optimizer.diffusion.lr == 1e-4
    micro_batch = {'piqwen': 4, 'piflux': None}[folder] if is_ddp else 1
    assert cfg.train_cfg.get('grad_accum_batch_size') == micro_batch
    assert bool(cfg.get('fsdp_kwargs')) != is_ddp
