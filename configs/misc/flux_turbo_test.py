# FLUX.1-dev with the adapter FLUX.1-Turbo-Alpha.
_base_ = ['./_flux_test.py']

name = 'flux_turbo_test'

adapter = 'huggingface://alimama-creative/FLUX.1-Turbo-Alpha/diffusion_pytorch_model.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained_lora=adapter, pretrained_lora_scale=1.0)))
test_cfg = dict(num_timesteps=8)
