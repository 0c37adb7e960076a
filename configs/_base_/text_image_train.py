# Distillation of a text-to-image teacher by adapters on a base that teacher, student and average share.
_base_ = ['./runtime.py']

model = dict(
    diffusion=dict(
        denoising=dict(freeze=True, checkpointing=True, use_lora=True, lora_rank=256, lora_dropout=0.05),
        flow_loss=dict(
            type='DiffusionMSELoss',
            data_info=dict(pred='u_t_pred', target='u_t'),
            rescale_mode='constant',
            rescale_cfg=dict(scale=30.0),
        ),
    ),
    teacher=dict(type='GaussianFlow', denoising=dict(freeze=True), num_timesteps=1, denoising_mean_mode='U'),
    tie_teacher=True,
)

train_cfg = dict(
    batch_teacher=False,  # at 1024 x 1024 pixels a micro-batch fills a GPU
    total_substeps=128,
    window_substeps=3,
    diffusion_grad_clip=50.0,
    diffusion_grad_clip_begin_iter=100,
)

optimizer = {'diffusion': dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)}
lr_config = dict(policy='fixed', warmup='linear', warmup_iters=100, warmup_ratio=0.001)
custom_hooks = [dict(_base_.custom_hooks[0], start_iter=100)]
checkpoint_config = dict(interval=100, must_save_interval=200)
evaluation = [
    dict(
        type='GenerativeEvalHook',
        data='val',
        prefix='student',
        interval=100,
        feed_batch_size=32,
        viz_num=256,
        metrics=[dict(type='CLIPSimilarity'), dict(type='HPSv2'), dict(type='ColorStats')],
        save_best_ckpt=False,
    )
]
