# Sampling of the published gmqwen_k8_datafree_piid_4step.
_base_ = ['./_gm_k8.py', './_test.py']

name = 'gmqwen_k8_datafree_piid_4step_test'

adapter = f'{_base_.adapters}/gmqwen_k8_datafree_piid_4step/diffusion_pytorch_model.safetensors'
model = dict(diffusion=dict(denoising=dict(pretrained_adapter=adapter)))
