# One-step student of a REPA teacher, whose times run to 1.
_base_ = ['./_train.py']

name = 'gmrepa_k32_imagenet_piid_1step_8gpus'

teacher_weights = 'huggingface://Lakonik/pi-Flow-ImageNet/teachers/repa_imagenet.pth'
model = dict(
    diffusion=dict(denoising=dict(pretrained=teacher_weights), num_timesteps=1),
    teacher=dict(denoising=dict(pretrained=teacher_weights), num_timesteps=1),
)

train_cfg = dict(
    nfe=1,
    teacher_test_cfg=dict(guidance_scale=3.2, guidance_interval=[0, 0.7], orthogonal_guidance=False),
)
test_cfg = dict(nfe=1)
total_iters = 140000
