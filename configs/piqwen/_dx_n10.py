# The policy is the clean image as a function of time, on a grid of 10 times over one of the 1 + 1 + 1 + 0.5 segments.
_base_ = ['./_student.py']

trained_layers = ['proj_out', 'norm_out', 'lora']
model = dict(
    diffusion=dict(
        policy_type='DX',
        policy_kwargs=dict(segment_size=1 / 3.5, shift=_base_.shift),
        denoising=dict(type='DXQwenImageTransformer2DModel', n_grid=10),
    )
)
