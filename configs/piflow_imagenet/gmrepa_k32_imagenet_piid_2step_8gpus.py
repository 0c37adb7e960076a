# Two-step student of the REPA teacher.
_base_ = ['./gmrepa_k32_imagenet_piid_1step_8gpus.py']

name = 'gmrepa_k32_imagenet_piid_2step_8gpus'

train_cfg = dict(nfe=2, final_step_size_scale=1.0, teacher_test_cfg=dict(guidance_scale=2.8))
test_cfg = dict(nfe=2, final_step_size_scale=1.0)
total_iters = 24000
