# Sampling of the published gmflux_k8_piid_8step.
_base_ = ['./_gm_k8.py', './_test.py']

name = 'gmflux_k8_piid_8step_test'

adapter = f'{_base_.adapters}/gmflux_k8_piid_8step/diffusion_pytorch_model.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained_adapter=adapter)))
test_cfg = dict(nfe=8, temperature=0.7)
