# Fashion-MNIST in 16 x 16 pixels, and how samples are looked at. Times are in the unit of the models, [0, 1].

# the network that teacher and student share, 0.75 million parameters
transformer = dict(
    num_attention_heads=4,
    attention_head_dim=24,
    in_channels=1,
    num_layers=4,
    sample_size=16,
    patch_size=2,
    num_embeds_ada_norm=10,
    torch_dtype='float32',
    checkpointing=False,
)

latent_size = (1, 16, 16)
dataset = dict(type='FashionMNIST', image_size=16, negative_label=10)
data = dict(
    workers_per_gpu=0,
    train=dict(split='train', **dataset),
    val=dict(split='val', test_mode=True, num_test_images=500, **dataset),
    val2=dict(split='val', test_mode=True, num_test_images=100, **dataset),
    train_dataloader=dict(samples_per_gpu=64),
    val_dataloader=dict(samples_per_gpu=100),
    test_dataloader=dict(samples_per_gpu=100),
)

metrics = [dict(type='ReferenceRMSE'), dict(type='SamplingSpeed')]
# a glance while training
preview = dict(
    type='GenerativeEvalHook', data='val2', prefix='preview', interval=500, feed_batch_size=100, viz_num=100, metrics=[]
)

guidance = dict(guidance_scale=1.5, guidance_interval=[0, 0.7], orthogonal_guidance=False)
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
