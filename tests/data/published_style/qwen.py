# Distillation of Qwen-Image as a file of October 2025 would have it.
_base_ = ['./qwen_model.py', './qwen_fsdp.py']

name = 'gmqwen_published_style'
save_interval = 100
must_save_interval = 200
eval_interval = 100
work_dir = f'work_dirs/{name}'

train_cfg = dict(
    gm_dropout=0.1,
    num_intermediate_states=2,
    window_substeps=3,
    teacher_guidance_scale=4.0,
    nfe=4,
    final_step_size_scale=0.5,
    total_substeps=128,
    diffusion_grad_clip=50.0,
    diffusion_grad_clip_begin_iter=100)
test_cfg = dict(nfe=4, final_step_size_scale=0.5, total_substeps=128, temperature=0.3)

optimizer = {'diffusion': dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)}
data = dict(
    workers_per_gpu=4,
    train=dict(
        type='ImagePrompt',
        data_root='data/t2i',
        cache_dir='preproc_qwen',
        cache_datalist_path='data/t2i/preproc_qwen.jsonl.gz',
        negative_prompt_embeds_path='data/qwen_empty_prompt_embeds.pth',
        negative_prompt_kwargs=dict(prompt=''),
        pad_seq_len=512,
        end_ind=-128,
        latent_size=(16, 128, 128)),
    train_dataloader=dict(samples_per_gpu=8, num_threads=8),
    val=dict(
        type='ImagePrompt',
        data_root='data/t2i',
        cache_dir='preproc_qwen',
        cache_datalist_path='data/t2i/preproc_qwen.jsonl.gz',
        pad_seq_len=512,
        start_ind=-128,
        repeat=2,
        latent_size=(16, 128, 128),
        test_mode=True),
    val_dataloader=dict(samples_per_gpu=1),
    test_dataloader=dict(samples_per_gpu=1),
    persistent_workers=True,
    prefetch_factor=4)
lr_config = dict(policy='fixed', warmup='linear', warmup_iters=100, warmup_ratio=0.001)
checkpoint_config = dict(
    interval=save_interval, must_save_interval=must_save_interval, by_epoch=False, max_keep_ckpts=1,
    out_dir='checkpoints/', create_symlink=True)

evaluation = []
for temperature, prefix in ((0.3, 'cool'), (1.0, 'warm')):
    evaluation.append(dict(
        type='GenerativeEvalHook',
        data='val',
        prefix=prefix,
        interval=eval_interval,
        feed_batch_size=32,
        viz_num=256,
        sample_kwargs=dict(test_cfg_override=dict(temperature=temperature)),
        metrics=[dict(type='CLIPSimilarity'), dict(type='HPSv2'), dict(type='ColorStats')],
        viz_dir=f'viz/{name}/{prefix}',
        clear_reals=True,
        save_best_ckpt=False))

total_iters = 9000
log_config = dict(interval=10, hooks=[dict(type='TextLoggerHook'), dict(type='TensorboardLoggerHook')])
custom_hooks = [
    dict(
        type='ExponentialMovingAverageHookMod',
        module_keys=('diffusion_ema', ),
        interp_mode='lerp',
        interval=1,
        start_iter=100,
        momentum_policy='karras',
        momentum_cfg=dict(gamma=7.0),
        priority='VERY_HIGH')]
runner = dict(
    type='DynamicIterBasedRunnerMod', pass_training_status=True, ckpt_trainable_only=True, ckpt_fp16=True,
    ckpt_fp16_ema=True, ckpt_bf16_optim=True, gc_interval=20)
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
resume_from = f'checkpoints/{name}/latest.txt'
workflow = [('train', save_interval)]
cudnn_benchmark = True
opencv_num_threads = 0
mp_start_method = 'fork'
