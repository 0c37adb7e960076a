# pi-ID distillation into a one-step student whose policy is a mixture of 8 Gaussians per pixel.
_base_ = ['./_base_/student.py']

name = 'gmdit_k8_digits_piid_1step'

model = dict(
    diffusion=dict(
        policy_type='GMFlow',
        denoising=dict(
            type='GMDiTTransformer2DModelV2',
            pretrained=_base_.teacher_weights,
            num_gaussians=8,
            logstd_inner_dim=64,
            gm_num_logstd_layers=2,
            **_base_.transformer,
        ),
    ),
)

train_cfg = dict(nfe=1, policy_dropout=0.05)
test_cfg = dict(nfe=1)
