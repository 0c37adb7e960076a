# Qwen-Image with the four-step adapter of Qwen-Image-Lightning.
_base_ = ['./_qwen_test.py']

name = 'qwen_lightning_test'

adapter = 'huggingface://lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-4steps-V1.0.safetensors'
model = dict(
    diffusion=dict(
        denoising=dict(pretrained_lora=adapter),
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=3.0),
    )
)
test_cfg = dict(num_timesteps=4)
