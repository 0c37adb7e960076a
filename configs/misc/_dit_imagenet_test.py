# Sampling of an ImageNet teacher in 12 Euler steps. A config adds its weights, its unit of time and its guidance.
_base_ = ['../_base_/imagenet.py']

model = dict(
    type='LatentDiffusionClassImage',
    vae=_base_.vae,
    diffusion=dict(
        type='GaussianFlow',
        denoising=dict(type='DiTTransformer2DModelMod', torch_dtype='bfloat16', **_base_.transformer),
        denoising_mean_mode='U',
    ),
    inference_only=True,
)

test_cfg = dict(sampler='FlowEulerODE', num_timesteps=12, orthogonal_guidance=False)

evaluation = [dict(_base_.benchmark, prefix='euler12', interval=None)]
