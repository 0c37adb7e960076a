# Sampling of the published gmrepa_k32_imagenet_piid_1step.
_base_ = ['./_test.py']

name = 'gmrepa_k32_imagenet_piid_1step_test'

weights = 'huggingface://Lakonik/pi-Flow-ImageNet/gmrepa_k32_imagenet_piid_1step/diffusion_pytorch_model.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained=weights), num_timesteps=1))

test_cfg = dict(nfe=1)
