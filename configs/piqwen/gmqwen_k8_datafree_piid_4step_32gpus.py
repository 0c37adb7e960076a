# Four-step student of Qwen-Image with a mixture policy, trained without images.
_base_ = ['./_gm_k8.py', './_train.py', './_data.py', '../_base_/data_free.py', './_ddp_train.py']

name = 'gmqwen_k8_datafree_piid_4step_32gpus'

model = dict(diffusion=dict(denoising=dict(freeze_exclude=_base_.trained_layers)))
train_cfg = dict(policy_dropout=0.1)
