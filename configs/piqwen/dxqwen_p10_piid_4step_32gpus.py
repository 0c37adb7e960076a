# Four-step student of Qwen-Image whose policy is a polynomial of time.
_base_ = ['./_dx_p10.py', './_train.py', './_data.py', '../_base_/data_based.py', './_ddp_train.py']

name = 'dxqwen_p10_piid_4step_32gpus'

model = dict(diffusion=dict(denoising=dict(freeze_exclude=_base_.trained_layers)))
