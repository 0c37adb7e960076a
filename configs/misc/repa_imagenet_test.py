# The REPA teacher of pi-Flow, whose times run to 1.
_base_ = ['./_dit_imagenet_test.py']

name = 'repa_imagenet_test'

weights = 'huggingface://Lakonik/pi-Flow-ImageNet/teachers/repa_imagenet.pth'
model = dict(diffusion=dict(denoising=dict(pretrained=weights), num_timesteps=1))

test_cfg = dict(guidance_scale=3.2, guidance_interval=[0, 0.7])
