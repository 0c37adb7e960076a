# FLUX.1-dev with the eight-step adapter of Hyper-SD.
_base_ = ['./_flux_test.py']

name = 'hyperflux_test'

adapter = 'huggingface://ByteDance/Hyper-SD/Hyper-FLUX.1-dev-8steps-lora.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained_lora=adapter, pretrained_lora_scale=0.125)))
test_cfg = dict(num_timesteps=8)
