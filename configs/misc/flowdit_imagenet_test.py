# The FM-DiT teacher of pi-Flow, whose times run to 1000.
_base_ = ['./_dit_imagenet_test.py']

name = 'flowdit_imagenet_test'

weights = 'huggingface://Lakonik/pi-Flow-ImageNet/teachers/flowdit_imagenet.pth'
model = dict(diffusion=dict(denoising=dict(pretrained=weights), num_timesteps=1000))

test_cfg = dict(guidance_scale=2.5, guidance_interval=[0, 600])
