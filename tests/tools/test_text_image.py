"""Tiny FLUX and Qwen-Image models through the whole path: prompts, distillation with roles, resume, samples."""

import pytest
import torch

from lakonlab.config.check import check_config
from lakonlab.config.load import load_config
from lakonlab.models.architecture.roles import named_state
from lakonlab.runner.resume import StartingPoint
from lakonlab.runner.runner import Runner
from tests import tiny_components, tiny_text_image

TOTAL_ITERS = 20
ENCODERS = {'Flux': 'PretrainedFluxTextEncoder', 'QwenImage': 'PretrainedQwenImageTextEncoder'}
AUTOENCODERS = {'Flux': 'PretrainedVAE', 'QwenImage': 'PretrainedVAEQwenImage'}
KINDS = [(family, kind) for family in ENCODERS for kind in ('GM', 'DX', 'data-free')]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('pipelines')
    return {
        'Flux': tiny_components.flux_folder(root / 'flux'),
        'QwenImage': tiny_components.qwen_image_folder(root / 'qwen'),
    }


def write_config(path, family, kind, folder):
    """A config file of a run, as a user would write it."""
    policy = 'DX' if kind == 'DX' else 'GM'
    sizes = {**tiny_components.SIZES[family], 'patch_size': 2}
    if family == 'QwenImage':
        sizes['out_channels'] = 16
    model = tiny_text_image.config(family, policy, str(folder / 'transformer'))
    for part in ('diffusion', 'teacher'):
        denoising = model[part]['denoising']
        denoising.update(sizes, torch_dtype='bfloat16')
        for key in tiny_text_image.SIZES[family].keys() - sizes.keys():
            denoising.pop(key)
    model['diffusion']['denoising'].update(lora_dropout=0.05, freeze_exclude_autocast_dtype='bfloat16')
    if kind == 'data-free':
        model['diffusion']['type'] = 'PiFlowImitationDataFree'
    model['text_encoder'] = dict(type=ENCODERS[family], model_name_or_path=str(folder), max_sequence_length=32)
    model['vae'] = dict(
        type=AUTOENCODERS[family], model_name_or_path=str(folder), subfolder='vae', torch_dtype='bfloat16'
    )
    guidance = dict(distilled_guidance_scale=3.5) if family == 'Flux' else {}
    teacher = guidance or dict(guidance_scale=4.0)
    content = dict(
        name=path.stem,
        custom_imports=dict(imports=['tests.tiny_prompts']),
        model=model,
        train_cfg=dict(
            nfe=2,
            num_intermediate_states=2,
            total_substeps=16,
            teacher_test_cfg=teacher,
            grad_accum_batch_size=1,
            diffusion_grad_clip=50.0,
            **guidance,
            **({} if policy == 'DX' else dict(policy_dropout=0.1)),
        ),
        test_cfg=dict(nfe=2, total_substeps=16, latent_size=tiny_text_image.LATENT_SIZE, **guidance),
        optimizer={'diffusion': dict(type='AdamW', lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)},
        data=dict(
            train=dict(type='TinyPrompts', negative=not guidance),
            train_dataloader=dict(samples_per_gpu=2),
            val=dict(type='TinyPrompts', test_mode=True),
        ),
        total_iters=TOTAL_ITERS,
        checkpoint_config=dict(interval=TOTAL_ITERS // 2, out_dir='checkpoints'),
        custom_hooks=[dict(type='ExponentialMovingAverageHook', momentum_policy='karras', start_iter=2)],
        log_config=dict(interval=5, hooks=[dict(type='TextLoggerHook')]),
    )
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in content.items()))
    return load_config(path)


def run(cfg, work_dir, resume_from=None):
    runner = Runner.from_cfg(cfg, work_dir=work_dir)
    if resume_from is not None:
        runner.starting_point = StartingPoint(resume_from, 'resume', 'of the test')
    runner.train()
    return runner


def state_of(runner):
    """What was trained and its average, copied."""
    state = runner.strategy.model_state(runner.model)
    return {name: pieces.tensors[0].clone() for name, pieces in state.items()}


@pytest.mark.parametrize(('family', 'kind'), KINDS, ids=['-'.join(kind) for kind in KINDS])
def test_whole_path(family, kind, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = write_config(tmp_path / 'tiny.py', family, kind, folders[family])
    check_config(cfg)
    whole = run(cfg, 'work_dirs/whole')
    trained = state_of(whole)
    again = run(cfg, 'work_dirs/again', tmp_path / 'checkpoints' / 'whole' / f'iter_{TOTAL_ITERS // 2}')
    assert again.first_iter == TOTAL_ITERS // 2
    resumed = state_of(again)
    assert trained.keys() == resumed.keys()
    for name, tensor in trained.items():
        assert torch.equal(tensor, resumed[name]), name

    fresh = Runner.from_cfg(cfg, work_dir='work_dirs/fresh')
    moved = [name for name, tensor in state_of(fresh).items() if not torch.equal(tensor, trained[name])]
    assert len(moved) == len(trained)
    teacher = dict(named_state(fresh.model.teacher))
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in named_state(whole.model.teacher))

    model = whole.model.eval()
    dataset = cfg.data.val
    from tests.tiny_prompts import TinyPrompts

    items = [TinyPrompts(test_mode=dataset.test_mode)[index] for index in range(2)]
    noise = torch.stack([item['noise'] for item in items])
    prompts = {'prompt': [item['prompt_kwargs']['prompt'] for item in items]}
    for role in ('student', 'ema'):
        pictures = model.val_step({'noise': noise, 'prompt_kwargs': prompts}, role=role)['pred_imgs']
        assert pictures.shape == (2, 3, 32, 48)
        assert bool(pictures.isfinite().all())
