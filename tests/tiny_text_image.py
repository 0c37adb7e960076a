"""A tiny text-to-image model of each family, and batches for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lakonlab.models.architecture.roles import named_state
from lakonlab.registry import MODELS, MODULES

SIZES = {
    'Flux': dict(
        patch_size=2,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ),
    'QwenImage': dict(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    ),
}
HEADS = {'GM': dict(num_gaussians=3, logstd_inner_dim=12), 'DX': dict(n_grid=3)}
TRAINED = {'GM': ['proj_out_means', 'proj_out_logweights', 'proj_out_logstds', 'norm_out', 'lora']}
LORA_TARGETS = {
    'Flux': ['proj_mlp', 'ff.net.0.proj', 'ff.net.2', 'timestep_embedder.linear_1'],
    'QwenImage': ['img_mlp.net.0.proj', 'img_mlp.net.2', 'timestep_embedder.linear_1'],
}
LATENT_SIZE = (4, 4, 6)
SECTIONS = dict(
    train_cfg=dict(
        nfe=2,
        num_intermediate_states=2,
        window_substeps=2,
        total_substeps=16,
        distilled_guidance_scale=3.5,
        teacher_test_cfg=dict(distilled_guidance_scale=3.5),
    ),
    test_cfg=dict(nfe=2, total_substeps=16, latent_size=LATENT_SIZE, distilled_guidance_scale=3.5),
)


def teacher_file(family: str, folder: Path, seed: int = 0) -> str:
    """Weights of a teacher, drawn at random, in a file."""
    generator = torch.Generator().manual_seed(seed)
    network = MODULES.build({'type': f'{family}Transformer2DModel', **SIZES[family]})
    state = {
        name: torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.dim() < 2 else tensor.shape[-1] ** -0.5)
        for name, tensor in named_state(network)
    }
    path = folder / f'{family}_{seed}.safetensors'
    save_file(state, path)
    return str(path)


def config(family: str, policy: str, weights: str, **changes: Any) -> dict[str, Any]:
    """Config of a student, its teacher and its average, as published for LoRA distillation."""
    exclude = TRAINED.get(policy, ['self.proj_out', 'norm_out', 'lora'])
    policy_kwargs = dict(segment_size=1 / 2, shift=3.2) if policy == 'DX' else None
    shift = dict(type='ContinuousTimeStepSampler', shift=3.2)
    model = dict(
        type='LatentDiffusionTextImage',
        diffusion=dict(
            type='PiFlowImitation',
            policy_type={'GM': 'GMFlow', 'DX': 'DX'}[policy],
            policy_kwargs=policy_kwargs,
            denoising=dict(
                type=f'{policy}{family}Transformer2DModel',
                freeze=True,
                freeze_exclude=exclude,
                pretrained=weights,
                use_lora=True,
                lora_target_modules=LORA_TARGETS[family],
                lora_rank=4,
                checkpointing=True,
                **HEADS[policy],
                **SIZES[family],
            ),
            flow_loss=dict(
                type='DiffusionMSELoss',
                data_info=dict(pred='u_t_pred', target='u_t'),
                rescale_mode='constant',
                rescale_cfg=dict(scale=30.0),
            ),
            num_timesteps=1,
            timestep_sampler=shift,
        ),
        diffusion_use_ema=True,
        teacher=dict(
            type='GaussianFlow',
            denoising=dict(type=f'{family}Transformer2DModel', freeze=True, pretrained=weights, **SIZES[family]),
            num_timesteps=1,
            timestep_sampler=shift,
        ),
        tie_teacher=True,
    )
    model = copy.deepcopy(model)
    for dotted, value in changes.items():
        node = model
        *path, key = dotted.split('__')
        for part in path:
            node = node[part]
        node[key] = value
    return model


def build(model: dict[str, Any], family: str = 'Flux', seed: int = 0, **train_cfg: Any) -> nn.Module:
    """The model of a config; Qwen-Image has no guidance embedded."""
    torch.manual_seed(seed)
    sections = copy.deepcopy(SECTIONS)
    sections['train_cfg'].update(train_cfg)
    if family != 'Flux':
        for section in (sections['train_cfg'], sections['test_cfg'], sections['train_cfg']['teacher_test_cfg']):
            section.pop('distilled_guidance_scale', None)
    return MODELS.build({**copy.deepcopy(model), **sections})


def batch(family: str, batch_size: int = 2, text_length: int = 5, seed: int = 0) -> dict[str, Any]:
    """Latents and embedded prompts; of Qwen-Image's, the first is shorter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    embedded = {'encoder_hidden_states': normal(batch_size, text_length, 20)}
    if family == 'Flux':
        embedded['pooled_projections'] = normal(batch_size, 12)
    else:
        mask = torch.ones(batch_size, text_length, dtype=torch.long)
        mask[0, text_length - 2 :] = 0
        embedded['encoder_hidden_states_mask'] = mask
    return {'latents': normal(batch_size, *LATENT_SIZE), 'prompt_embed_kwargs': embedded}


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that are trained, by role names."""
    return {name: value for name, value in named_state(module) if value.requires_grad}
