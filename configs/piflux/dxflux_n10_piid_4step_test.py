# Sampling of the published dxflux_n10_piid_4step.
_base_ = ['./_dx_n10.py', './_test.py']

name = 'dxflux_n10_piid_4step_test'

adapter = f'{_base_.adapters}/dxflux_n10_piid_4step/diffusion_pytorch_model.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained_adapter=adapter)))
evaluation = _base_.evaluation[:1]
