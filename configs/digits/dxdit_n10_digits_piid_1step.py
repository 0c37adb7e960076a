# A one-step student whose policy is the clean image as a function of time, on a grid of 10 times.
_base_ = ['./_base_/student.py']

name = 'dxdit_n10_digits_piid_1step'

model = dict(
    diffusion=dict(
        policy_type='DX',
        policy_kwargs=dict(segment_size=1.0, shift=1.0),
        denoising=dict(
            type='DXDiTTransformer2DModel',
            pretrained=_base_.teacher_weights,
            n_grid=10,
            **_base_.transformer,
        ),
    ),
)

train_cfg = dict(nfe=1)
test_cfg = dict(nfe=1)
