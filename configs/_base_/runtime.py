# How runs of the published models log, save and average.
log_config = dict(interval=10, hooks=[dict(type='TextLoggerHook'), dict(type='TensorboardLoggerHook')])
checkpoint_config = dict(by_epoch=False, max_keep_ckpts=1, out_dir='checkpoints/')
custom_hooks = [
    dict(
        type='ExponentialMovingAverageHook',
        module_keys=('diffusion_ema',),
        interp_mode='lerp',
        interval=1,
        momentum_policy='karras',
        momentum_cfg=dict(gamma=7.0),
        priority='VERY_HIGH',
    )
]
runner = dict(type='DynamicIterBasedRunner', pass_training_status=True, ckpt_trainable_only=True, gc_interval=20)
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
cudnn_benchmark = True
