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

# Near the end of a segment this policy's velocity is divided by a tiny noise level; averaged over a window of 8 of the
# 128 substeps the loss stays bounded, without a window training diverges.
train_cfg = dict(nfe=1, window_substeps=8)
test_cfg = dict(nfe=1)
