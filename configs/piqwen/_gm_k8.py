# The policy is a mixture of 8 Gaussians per latent pixel.
_base_ = ['./_student.py']

trained_layers = ['proj_out_means', 'proj_out_logweights', 'proj_out_logstds', 'norm_out', 'lora']
model = dict(
    diffusion=dict(
        policy_type='GMFlow',
        denoising=dict(
            type='GMQwenImageTransformer2DModel',
            num_gaussians=8,
            logstd_inner_dim=1024,
            gm_num_logstd_layers=2,
            logweights_channels=4,
        ),
    )
)
test_cfg = dict(temperature=0.3)
