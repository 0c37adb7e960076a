# The teacher: a class-conditional DiT trained by flow matching with label dropout.
_base_ = ['./_base_/fashion_mnist.py']

name = 'dit_fashion_mnist_teacher'

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
test_cfg = dict(latent_size=_base_.latent_size, **_base_.guidance)

optimizer = {'diffusion': dict(type='AdamW', lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='CosineAnnealing', min_lr_ratio=0.01, warmup='linear', warmup_iters=100, warmup_ratio=0.001)
total_iters = 1500
custom_hooks = [dict(_base_.average, start_iter=100)]

evaluation = [
    dict(
        type='GenerativeEvalHook',
        data='val',
        prefix=f'euler{steps}',
        interval=None,
        feed_batch_size=100,
        viz_num=100,
        metrics=_base_.metrics,
        sample_kwargs=dict(test_cfg_override=dict(num_timesteps=steps)),
        reference_kwargs=dict(test_cfg_override=dict(num_timesteps=_base_.teacher_steps)),
    )
    for steps in (1, 4, 32)
]
evaluation.append(dict(_base_.preview, sample_kwargs=dict(test_cfg_override=dict(num_timesteps=8))))
