# The policy is a mixture of 8 Gaussians per latent pixel.
_base_ = ['./_student.py']

trained_layers = ['proj_out_means', 'proj_out_logweights', 'proj_out_logstds', 'norm_out', 'lora']
adapted_outputs = ['proj_out']  # of the single blocks; the layer of this name at the root makes way for the head
model = dict(
    diffusion=dict(
        policy_type='GMFlow',
        denoising=dict(
            type='GMFluxTransformer2DModel',
            num_gaussians=8,
            logstd_inner_dim=1024,
            gm_num_logstd_layers=2,
            logweights_channels=4,
        ),
    )
)
test_cfg = dict(temperature=0.3)
