# Sampling of the published gmrepa_k32_imagenet_piid_2step.
_base_ = ['./_test.py']

name = 'gmrepa_k32_imagenet_piid_2step_test'

weights = 'huggingface://Lakonik/pi-Flow-ImageNet/gmrepa_k32_imagenet_piid_2step/diffusion_pytorch_model.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained=weights), num_timesteps=1))

test_cfg = dict(nfe=2, final_step_size_scale=1.0)
