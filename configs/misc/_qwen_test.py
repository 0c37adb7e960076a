# Sampling of Qwen-Image by Euler's method. A config adds the number of steps and the shift of time.
_base_ = ['../piqwen/_qwen_image.py', '../piqwen/_text_encoder.py', '../piqwen/_benchmarks.py']

model = dict(
    diffusion=dict(type='GaussianFlow', denoising=dict(type='QwenImageTransformer2DModel', **_base_.network)),
    inference_only=True,
)
test_cfg = dict(sampler='FlowEulerODE')
