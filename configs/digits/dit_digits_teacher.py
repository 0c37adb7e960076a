# The teacher: a small class-conditional DiT (250 thousand parameters) trained by flow matching with label dropout.
_base_ = ['./_base_/digits.py']

name = 'dit_digits_teacher'

model = dict(
    type='LatentDiffusionClassImage',
    diffusion=dict(
        type='GaussianFlow',
        denoising=dict(type='DiTTransformer2DModelMod', **_base_.transformer),
        flow_loss=dict(type='DiffusionMSELoss', data_info=dict(pred='u_t_pred', target='u_t')),
        num_timesteps=1,
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=1.0, logit_normal_enable=False),
        denoising_mean_mode='U',
    ),
    diffusion_use_ema=True,
)

train_cfg = dict(prob_class=0.9, diffusion_grad_clip=10.0, diffusion_grad_clip_begin_iter=100)
test_cfg = _base_.guidance

optimizer = {'diffusion': dict(type='AdamW', lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='CosineAnnealing', min_lr_ratio=0.01, warmup='linear', warmup_iters=100, warmup_ratio=0.001)
total_iters = 4000
custom_hooks = [
    dict(
        type='ExponentialMovingAverageHook',
        module_keys=('diffusion_ema',),
        interp_mode='lerp',
        interval=1,
        start_iter=100,
        momentum_policy='karras',
        momentum_cfg=dict(gamma=7.0),
        priority='VERY_HIGH',
    )
]

evaluation = [
    dict(
        type='GenerativeEvalHook',
        data='val',
        prefix=f'euler{steps}',
        interval=None,
        feed_batch_size=500,
        viz_num=100,
        metrics=_base_.metrics,
        sample_kwargs=dict(test_cfg_override=dict(num_timesteps=steps)),
        reference_kwargs=dict(test_cfg_override=dict(num_timesteps=_base_.teacher_steps)),
    )
    for steps in (1, 2, 4, 8, 32)
]
evaluation.append(dict(_base_.preview, interval=1000, sample_kwargs=dict(test_cfg_override=dict(num_timesteps=8))))
# how far real images are from the held-out ones
evaluation.append(
    dict(
        type='GenerativeEvalHook',
        data='train',
        prefix='real',
        interval=None,
        feed_batch_size=500,
        viz_num=100,
        generate=False,
        metrics=_base_.image_metrics,
    )
)
