# Sampling of gmdit_k8_imagenet_8gpus: two grids of steps and substeps, two solvers, and a sweep over guidance.
_base_ = ['./gmdit_k8_imagenet_8gpus.py']

name = 'gmdit_k8_imagenet_test'

weights = 'huggingface://Lakonik/gmflow_imagenet_k8_ema/transformer/diffusion_pytorch_model.bf16.safetensors'
model = dict(
    vae=_base_.vae,
    diffusion=dict(
        denoising=dict(pretrained=weights, torch_dtype='bfloat16', autocast_dtype=None, checkpointing=False)
    ),
    inference_only=True,
)

guidance_scales = [0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18]
guidance_scales += [0.21, 0.25, 0.29, 0.34, 0.39, 0.45, 0.52, 0.59, 0.67, 0.75]
solvers = dict(
    gmode2=dict(sampler='FlowEulerODE', output_mode='mean', order=2),
    gmsde2=dict(sampler='FlowSDE', output_mode='sample', order=2),
)
steps_and_substeps = [(8, 16), (32, 4)]

evaluation = [
    dict(
        type='GenerativeEvalHook',
        data='val',
        prefix=f'{solver}_g{scale}_steps{steps}',
        interval=None,
        feed_batch_size=125,
        viz_num=256,
        metrics=[dict(type='SamplingSpeed')],
        sample_kwargs=dict(
            test_cfg_override=dict(guidance_scale=scale, num_timesteps=steps, num_substeps=substeps, **solvers[solver]),
        ),
    )
    for steps, substeps in steps_and_substeps
    for solver in solvers
    for scale in guidance_scales
]
