# Distillation of FLUX.1-dev. A config adds which output layers of blocks get an adapter.
_base_ = ['./_student.py', '../_base_/text_image_train.py']

adapted_layers = [
    'proj_mlp',
    'ff.net.0.proj',
    'ff.net.2',
    'ff_context.net.0.proj',
    'ff_context.net.2',
    'timestep_embedder.linear_1',
    'timestep_embedder.linear_2',
]
model = dict(
    teacher=dict(
        denoising=dict(type='FluxTransformer2DModel', **_base_.network),
        timestep_sampler=_base_.model.diffusion.timestep_sampler,
    ),
)

train_cfg = dict(
    nfe=4,
    final_step_size_scale=0.5,
    num_intermediate_states=4,
    num_decay_iters=2000,
    distilled_guidance_scale=3.5,
    teacher_test_cfg=dict(distilled_guidance_scale=3.5),
)
total_iters = 3000
