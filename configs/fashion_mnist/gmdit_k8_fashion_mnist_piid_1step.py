# pi-ID distillation into a one-step student whose policy is a mixture of 8 Gaussians per pixel.
_base_ = ['./_base_/fashion_mnist.py']

name = 'gmdit_k8_fashion_mnist_piid_1step'
teacher_weights = 'checkpoints/dit_fashion_mnist_teacher/latest'

model = dict(
    type='LatentDiffusionClassImage',
    diffusion=dict(
        type='PiFlowImitation',
        policy_type='GMFlow',
        denoising=dict(
            type='GMDiTTransformer2DModelV2',
            pretrained=teacher_weights,
            num_gaussians=8,
            logstd_inner_dim=96,
            gm_num_logstd_layers=2,
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
        denoising=dict(type='DiTTransformer2DModelMod', freeze=True, pretrained=teacher_weights, **_base_.transformer),
        num_timesteps=1,
        denoising_mean_mode='U',
    ),
)

train_cfg = dict(
    nfe=1,
    num_intermediate_states=2,
    policy_dropout=0.05,
    teacher_test_cfg=_base_.guidance,
    total_substeps=128,
    diffusion_grad_clip=50.0,
    diffusion_grad_clip_begin_iter=50,
)
test_cfg = dict(nfe=1, total_substeps=128, latent_size=_base_.latent_size)

optimizer = {'diffusion': dict(type='AdamW', lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='fixed', warmup='linear', warmup_iters=50, warmup_ratio=0.001)
total_iters = 600
custom_hooks = [dict(_base_.average, start_iter=50)]
evaluation = [
    _base_.preview,
    dict(
        type='GenerativeEvalHook',
        data='val',
        prefix='student',
        interval=None,
        feed_batch_size=100,
        viz_num=100,
        metrics=_base_.metrics,
        reference_kwargs=dict(role='teacher', test_cfg_override=dict(num_timesteps=_base_.teacher_steps)),
    ),
]
