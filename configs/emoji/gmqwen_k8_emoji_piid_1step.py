# pi-ID distillation into a one-step student whose policy is a mixture of 8 Gaussians per pixel.
_base_ = ['./_base_/emoji.py']

name = 'gmqwen_k8_emoji_piid_1step'
teacher_weights = 'checkpoints/qwen_emoji_teacher/latest'

model = dict(
    type='LatentDiffusionTextImage',
    text_encoder=_base_.text_encoder,
    diffusion=dict(
        type='PiFlowImitation',
        policy_type='GMFlow',
        denoising=dict(
            type='GMQwenImageTransformer2DModel',
            pretrained=teacher_weights,
            num_gaussians=8,
            logstd_inner_dim=96,
            **_base_.transformer,
        ),
        flow_loss=dict(
            type='DiffusionMSELoss',
            data_info=dict(pred='u_t_pred', target='u_t'),
            rescale_mode='constant',
            rescale_cfg=dict(scale=3.0),
        ),
        num_timesteps=1,
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=1.0, logit_normal_enable=False),
        denoising_mean_mode='U',
    ),
    diffusion_use_ema=True,
    teacher=dict(
        type='GaussianFlow',
        denoising=dict(
            type='QwenImageTransformer2DModel', freeze=True, pretrained=teacher_weights, **_base_.transformer
        ),
        num_timesteps=1,
        denoising_mean_mode='U',
    ),
)

train_cfg = dict(
    nfe=1,
    num_intermediate_states=2,
    policy_dropout=0.05,
    total_substeps=128,
    diffusion_grad_clip=50.0,
    diffusion_grad_clip_begin_iter=50,
)
test_cfg = dict(nfe=1, total_substeps=128, latent_size=_base_.latent_size)

optimizer = {'diffusion': dict(type='AdamW', lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='fixed', warmup='linear', warmup_iters=50, warmup_ratio=0.001)
total_iters = 400
custom_hooks = [dict(_base_.average, start_iter=50)]
evaluation = [
    dict(
        type='GenerativeEvalHook',
        data='val',
        prefix='student',
        interval=200,
        feed_batch_size=19,
        viz_num=19,
        metrics=_base_.metrics,
        reference_kwargs=dict(role='teacher', test_cfg_override=dict(num_timesteps=_base_.teacher_steps)),
    ),
]
