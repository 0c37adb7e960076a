# Four-step student of FLUX.1-dev with a mixture policy, trained at noised images.
_base_ = ['./_gm_k8.py', './_train.py', './_data.py', '../_base_/data_based.py', './_ddp_train.py']

name = 'gmflux_k8_piid_4step_32gpus'

lora_target_modules = [*_base_.adapted_layers, *_base_.adapted_outputs]
model = dict(
    diffusion=dict(
        denoising=dict(freeze_exclude=_base_.trained_layers, lora_target_modules=lora_target_modules),
    )
)
train_cfg = dict(policy_dropout=0.1)
