# What training and sampling of all ImageNet students share: 32 Gaussians per latent pixel.
_base_ = ['../_base_/imagenet.py']

model = dict(
    type='LatentDiffusionClassImage',
    vae=_base_.vae,
    diffusion=dict(
        type='PiFlowImitation',
        policy_type='GMFlow',
        denoising=dict(
            type='GMDiTTransformer2DModelV2',
            num_gaussians=32,
            logstd_inner_dim=1024,
            gm_num_logstd_layers=2,
            **_base_.transformer,
        ),
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=1.0, logit_normal_enable=False),
        denoising_mean_mode='U',
    ),
    diffusion_use_ema=True,
)
test_cfg = dict(total_substeps=128)
