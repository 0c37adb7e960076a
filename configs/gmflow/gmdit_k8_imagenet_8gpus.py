# GMFlow on ImageNet 256x256, in latents of the Stable Diffusion autoencoder computed before training.
_base_ = ['../_base_/imagenet.py', '../_base_/runtime.py']

name = 'gmdit_k8_imagenet_8gpus'

model = dict(
    type='LatentDiffusionClassImage',
    diffusion=dict(
        type='GMFlow',
        denoising=dict(
            type='GMDiTTransformer2DModel',
            num_gaussians=8,
            logstd_inner_dim=1024,
            gm_num_logstd_layers=2,
            torch_dtype='float32',
            autocast_dtype='bfloat16',
            checkpointing=True,
            **_base_.transformer,
        ),
        spectrum_net=dict(type='SpectrumMLP', base_size=(4, 32, 32), layers=[64, 8], torch_dtype='float32'),
        spectral_loss_weight=4.0,
        flow_loss=dict(
            type='GMFlowNLLLoss',
            log_cfgs=dict(type='quartile', prefix_name='loss_trans', total_timesteps=1000),
            data_info=dict(pred_means='means', target='x_t_low', pred_logstds='logstds', pred_logweights='logweights'),
            rescale_mode='constant',
            rescale_cfg=dict(scale=8.0),
        ),
        num_timesteps=1000,
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=1.0, logit_normal_enable=True),
        denoising_mean_mode='U',
    ),
    diffusion_use_ema=True,
)

train_cfg = dict(trans_ratio=0.5, prob_class=0.9, diffusion_grad_clip=10.0, diffusion_grad_clip_begin_iter=1000)
test_cfg = dict(latent_size=(4, 32, 32))

# published with AdamW8bit, which needs bitsandbytes: --cfg-options optimizer.diffusion.type=AdamW8bit
optimizer = {
    'diffusion': dict(
        type='AdamW',
        lr=2e-4,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        paramwise_cfg=dict(custom_keys={'bias': dict(decay_mult=0.0)}),
    )
}
lr_config = dict(policy='fixed', warmup='linear', warmup_iters=1000, warmup_ratio=0.001)
total_iters = 200000
custom_hooks = [
    dict(
        _base_.custom_hooks[0],
        start_iter=0,
        momentum_policy='rampup',
        momentum_cfg=dict(ema_kimg=30000, ema_rampup=0.05, batch_size=4096, eps=1e-8),
    )
]

checkpoint_config = dict(interval=1000, must_save_interval=40000)
module_wrapper = 'ddp'
