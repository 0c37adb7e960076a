# Handwritten digits: data, logging, and how samples are measured. Times are in the unit of the models, [0, 1].

# the network that teacher and students share
transformer = dict(
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=1,
    num_layers=3,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
    torch_dtype='float32',
    checkpointing=False,
)

data = dict(
    workers_per_gpu=0,
    train=dict(type='Digits', split='train', negative_label=10),
    val=dict(type='Digits', split='val', negative_label=10, test_mode=True, num_test_images=1000),
    val2=dict(type='Digits', split='val', negative_label=10, test_mode=True, num_test_images=200),
    train_dataloader=dict(samples_per_gpu=64),
    val_dataloader=dict(samples_per_gpu=250),
    test_dataloader=dict(samples_per_gpu=250),
)

features = dict(type='DigitClassifier')
image_metrics = [
    dict(type='FrechetDistance', extractor=features, reference=dict(type='Digits', split='val')),
    dict(type='ClassAccuracy', extractor=features),
    dict(type='FeatureDiversity', extractor=features),
]
metrics = [*image_metrics, dict(type='ReferenceRMSE'), dict(type='SamplingSpeed')]
# a glance while training; the evaluations proper are left to tools/test.py
preview = dict(
    type='GenerativeEvalHook',
    data='val2',
    prefix='preview',
    interval=500,
    feed_batch_size=500,
    viz_num=100,
    metrics=image_metrics,
)

guidance = dict(guidance_scale=1.5, guidance_interval=[0, 0.7], orthogonal_guidance=False)
teacher_steps = 32  # at which the teacher's own ODE counts as solved

log_config = dict(interval=50, hooks=[dict(type='TextLoggerHook'), dict(type='TensorboardLoggerHook')])
checkpoint_config = dict(
    interval=200, must_save_interval=1000, by_epoch=False, max_keep_ckpts=1, out_dir='checkpoints/'
)
runner = dict(type='DynamicIterBasedRunner', pass_training_status=True, ckpt_trainable_only=True, gc_interval=100)
dist_params = dict(backend='gloo')
log_level = 'INFO'
load_from = None
module_wrapper = 'ddp'
