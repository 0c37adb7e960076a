# Four-step student of Qwen-Image whose policy is a grid of times.
_base_ = ['./_dx_n10.py', './_train.py', './_data.py', '../_base_/data_based.py', './_ddp_train.py']

name = 'dxqwen_n10_piid_4step_32gpus'

model = dict(diffusion=dict(denoising=dict(freeze_exclude=_base_.trained_layers)))
