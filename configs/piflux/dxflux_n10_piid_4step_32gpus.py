# Four-step student of FLUX.1-dev whose policy is a grid of times.
_base_ = ['./_dx_n10.py', './_train.py', './_data.py', '../_base_/data_based.py', './_ddp_train.py']

name = 'dxflux_n10_piid_4step_32gpus'

lora_target_modules = [*_base_.adapted_layers, *_base_.adapted_outputs]
model = dict(
    diffusion=dict(
        denoising=dict(freeze_exclude=_base_.trained_layers, lora_target_modules=lora_target_modules),
    )
)
