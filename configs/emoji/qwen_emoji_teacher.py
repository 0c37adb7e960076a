# The teacher: a small transformer of Qwen-Image's kind, trained from scratch by flow matching.
_base_ = ['./_base_/emoji.py']

name = 'qwen_emoji_teacher'

model = dict(
    type='LatentDiffusionTextImage',
    text_encoder=_base_.text_encoder,
    diffusion=dict(
        type='GaussianFlow',
        denoising=dict(type='QwenImageTransformer2DModel', **_base_.transformer),
        flow_loss=dict(type='DiffusionMSELoss', data_info=dict(pred='u_t_pred', target='u_t')),
        num_timesteps=1,
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=1.0, logit_normal_enable=False),
        denoising_mean_mode='U',
    ),
    diffusion_use_ema=True,
)

train_cfg = dict(diffusion_grad_clip=10.0, diffusion_grad_clip_begin_iter=100)
test_cfg = dict(latent_size=_base_.latent_size)

optimizer = {'diffusion': dict(type='AdamW', lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='CosineAnnealing', min_lr_ratio=0.01, warmup='linear', warmup_iters=50, warmup_ratio=0.001)
total_iters = 600
custom_hooks = [dict(_base_.average, start_iter=50)]

evaluation = [
    dict(
        type='GenerativeEvalHook',
        data='val',
        prefix=f'euler{steps}',
        interval=interval,
        feed_batch_size=19,
        viz_num=19,
        metrics=_base_.metrics if steps < _base_.teacher_steps else [],
        sample_kwargs=dict(test_cfg_override=dict(num_timesteps=steps)),
        reference_kwargs=dict(test_cfg_override=dict(num_timesteps=_base_.teacher_steps)),
    )
    for steps, interval in ((1, None), (4, None), (32, 200))
]
