# What all students of FLUX.1-dev share; the last step is half as long as the others.
_base_ = ['./_flux.py']

shift = 3.2
model = dict(
    diffusion=dict(
        denoising=_base_.network,
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=shift, logit_normal_enable=False),
    ),
    diffusion_use_ema=True,
)
test_cfg = dict(nfe=4, final_step_size_scale=0.5, total_substeps=128)
