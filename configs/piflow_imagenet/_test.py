# Sampling of a published ImageNet student. A config adds its weights, its unit of time and its number of steps.
_base_ = ['./_student.py']

model = dict(diffusion=dict(denoising=dict(torch_dtype='bfloat16')), inference_only=True)

evaluation = [dict(_base_.benchmark, prefix='student', interval=None)]
