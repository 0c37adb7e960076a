# Handwritten digits: data, logging, and how samples are measured. Times are in the unit of the models, [0, 1].

data = dict(
    workers_per_gpu=0,
    train=dict(type='Digits', split='train', negative_label=10),
    val=dict(
        type='Digits', split='val', negative_label=10, latent_size=(1, 8, 8), test_mode=True, num_test_images=2000
    ),
    train_dataloader=dict(samples_per_gpu=64),
    val_dataloader=dict(samples_per_gpu=500),
    test_dataloader=dict(samples_per_gpu=500),
)

features = dict(type='DigitClassifier')
image_metrics = [
    dict(type='FrechetDistance', extractor=features, reference=dict(type='Digits', split='val')),
    dict(type='ClassAccuracy', extractor=features),
    dict(type='FeatureDiversity', extractor=features),
]
metrics = [*image_metrics, dict(type='ReferenceRMSE'), dict(type='SamplingSpeed')]

guidance = dict(guidance_scale=1.5, guidance_interval=[0, 0.7], orthogonal_guidance=False)
teacher_steps = 32  # at which the teacher's own ODE counts as solved

log_config = dict(interval=50, hooks=[dict(type='TextLoggerHook'), dict(type='TensorboardLoggerHook')])
checkpoint_config = dict(interval=200, must_save_interval=1000, by_epoch=False, max_keep_ckpts=1, out_dir='checkpoints/')
runner = dict(type='DynamicIterBasedRunner', pass_training_status=True, ckpt_trainable_only=True, gc_interval=100)
dist_params = dict(backend='gloo')
log_level = 'INFO'
load_from = None
workflow = [('train', 100)]
module_wrapper = 'ddp'
