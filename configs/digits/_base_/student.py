# What all digit students share: the teacher, how it is imitated, and the schedule of training.
_base_ = ['./digits.py']

teacher_weights = 'checkpoints/dit_digits_teacher/latest'

model = dict(
    type='LatentDiffusionClassImage',
    diffusion=dict(
        type='PiFlowImitation',
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
        denoising=dict(type='DiTTransformer2DModelMod', freeze=True, pretrained=teacher_weights, **_base_.transformer),
        num_timesteps=1,
        denoising_mean_mode='U',
    ),
)

train_cfg = dict(
    num_intermediate_states=2,
    teacher_test_cfg=_base_.guidance,
    total_substeps=128,
    diffusion_grad_clip=50.0,
    diffusion_grad_clip_begin_iter=50,
)
test_cfg = dict(total_substeps=128)

optimizer = {'diffusion': dict(type='AdamW', lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='fixed', warmup='linear', warmup_iters=50, warmup_ratio=0.001)
total_iters = 1000
custom_hooks = [
    dict(
        type='ExponentialMovingAverageHook',
        module_keys=('diffusion_ema',),
        interp_mode='lerp',
        interval=1,
        start_iter=50,
        momentum_policy='karras',
        momentum_cfg=dict(gamma=7.0),
        priority='VERY_HIGH',
    )
]
evaluation = [
    _base_.preview,
    dict(
        type='GenerativeEvalHook',
        data='val',
        prefix='student',
        interval=None,
        feed_batch_size=500,
        viz_num=100,
        metrics=_base_.metrics,
        reference_kwargs=dict(role='teacher', test_cfg_override=dict(num_timesteps=_base_.teacher_steps)),
    ),
]
