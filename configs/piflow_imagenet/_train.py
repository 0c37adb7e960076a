# Distillation of an ImageNet teacher. A config adds the teacher's weights, its unit of time, and its guidance.
_base_ = ['./_student.py', '../_base_/runtime.py']

model = dict(
    diffusion=dict(
        denoising=dict(torch_dtype='float32', autocast_dtype='bfloat16', checkpointing=True),
        flow_loss=dict(
            type='DiffusionMSELoss',
            data_info=dict(pred='u_t_pred', target='u_t'),
            rescale_mode='constant',
            rescale_cfg=dict(scale=3.0),
        ),
    ),
    teacher=dict(
        type='GaussianFlow',
        denoising=dict(
            type='DiTTransformer2DModelMod',
            freeze=True,
            torch_dtype='bfloat16',
            **_base_.transformer,
        ),
        denoising_mean_mode='U',
    ),
)

train_cfg = dict(
    batch_teacher=False,  # 512 images fill a GPU
    num_intermediate_states=2,
    policy_dropout=0.05,
    total_substeps=128,
    diffusion_grad_clip=50.0,
    diffusion_grad_clip_begin_iter=400,
)

optimizer = {'diffusion': dict(type='AdamW8bit', lr=5e-5, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='fixed', warmup='linear', warmup_iters=400, warmup_ratio=0.001)
custom_hooks = [dict(_base_.custom_hooks[0], start_iter=400)]
checkpoint_config = dict(interval=400, must_save_interval=800)
evaluation = [dict(_base_.benchmark, prefix='student', interval=400)]
module_wrapper = 'ddp'
