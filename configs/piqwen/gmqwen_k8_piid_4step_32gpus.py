# Four-step student of Qwen-Image with a mixture policy, trained at noised images.
_base_ = ['./_gm_k8.py', './_train.py', './_data.py', '../_base_/data_based.py', './_ddp_train.py']

name = 'gmqwen_k8_piid_4step_32gpus'

model = dict(diffusion=dict(denoising=dict(freeze_exclude=_base_.trained_layers)))
train_cfg = dict(policy_dropout=0.1)
