# Sampling of the published gmflux_k8_piid_4step.
_base_ = ['./_gm_k8.py', './_test.py']

name = 'gmflux_k8_piid_4step_test'

adapter = f'{_base_.adapters}/gmflux_k8_piid_4step/diffusion_pytorch_model.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained_adapter=adapter)))
