# GMFlow on points of a checkerboard: a mixture of 64 Gaussians, and transitions to much lower noise as targets.
_base_ = ['../_base_/runtime.py']

name = 'gmmlp_k64_checkerboard'

model = dict(
    type='Diffusion2D',
    diffusion=dict(
        type='GMFlow',
        denoising=dict(type='GMFlowMLP2DDenoiser', num_gaussians=64),
        flow_loss=dict(
            type='GMFlowNLLLoss',
            log_cfgs=dict(type='quartile', prefix_name='loss_trans', total_timesteps=1000),
            data_info=dict(pred_means='means', target='x_t_low', pred_logstds='logstds', pred_logweights='logweights'),
            rescale_mode='constant',
            rescale_cfg=dict(scale=2.0),
        ),
        num_timesteps=1000,
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=1.0, logit_normal_enable=False),
        denoising_mean_mode='U',
    ),
    diffusion_use_ema=True,
)

train_cfg = dict(trans_ratio=0.9)
test_cfg = dict(sampler='FlowSDE', output_mode='sample', order=2, num_timesteps=8)  # GM-SDE2

optimizer = {'diffusion': dict(type='AdamW', lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='fixed', warmup='linear', warmup_iters=1000, warmup_ratio=0.001)
total_iters = 200000
custom_hooks = [dict(_base_.custom_hooks[0], start_iter=0)]

data = dict(
    workers_per_gpu=4,
    persistent_workers=True,
    prefetch_factor=16,
    train=dict(type='CheckerboardData', scale=4),
    val=dict(type='CheckerboardData', scale=4, n_samples=1e6, test_mode=True),
    train_dataloader=dict(samples_per_gpu=4096),
    val_dataloader=dict(samples_per_gpu=50000),
)

log_config = dict(interval=1000)
checkpoint_config = dict(interval=20000, must_save_interval=40000)
dist_params = dict(backend='gloo')
module_wrapper = 'ddp'
