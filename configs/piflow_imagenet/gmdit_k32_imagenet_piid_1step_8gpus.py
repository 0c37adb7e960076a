# One-step student of an FM-DiT teacher, whose times run to 1000.
_base_ = ['./_train.py']

name = 'gmdit_k32_imagenet_piid_1step_8gpus'

teacher_weights = 'huggingface://Lakonik/pi-Flow-ImageNet/teachers/flowdit_imagenet.pth'
model = dict(
    diffusion=dict(denoising=dict(pretrained=teacher_weights), num_timesteps=1000),
    teacher=dict(denoising=dict(pretrained=teacher_weights), num_timesteps=1000),
)

train_cfg = dict(
    nfe=1,
    teacher_test_cfg=dict(guidance_scale=2.7, guidance_interval=[0, 600], orthogonal_guidance=False),
)
test_cfg = dict(nfe=1)
total_iters = 140000
