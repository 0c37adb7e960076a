# Sampling of the published gmdit_k32_imagenet_piid_1step.
_base_ = ['./_test.py']

name = 'gmdit_k32_imagenet_piid_1step_test'

weights = 'huggingface://Lakonik/pi-Flow-ImageNet/gmdit_k32_imagenet_piid_1step/diffusion_pytorch_model.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained=weights), num_timesteps=1000))

test_cfg = dict(nfe=1)
