# The policy is the clean image as a polynomial of time with 10 coefficients.
_base_ = ['./_student.py']

trained_layers = ['proj_out', 'norm_out', 'lora']
model = dict(
    diffusion=dict(
        policy_type='DX',
        policy_kwargs=dict(mode='polynomial', shift=_base_.shift),
        denoising=dict(type='DXQwenImageTransformer2DModel', p_order=10),
    )
)
