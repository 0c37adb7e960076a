# Sampling of FLUX.1-dev by Euler's method. A config adds the number of steps.
_base_ = ['../piflux/_flux.py', '../piflux/_text_encoder.py', '../piflux/_benchmarks.py']

model = dict(
    diffusion=dict(
        type='GaussianFlow',
        denoising=dict(type='FluxTransformer2DModel', **_base_.network),
        # lengths in latent pixels, of which a token has four
        timestep_sampler=dict(
            type='ContinuousTimeStepSampler',
            use_dynamic_shifting=True,
            base_seq_len=256 * 4,
            max_seq_len=4096 * 4,
            base_logshift=0.5,
            max_logshift=1.15,
        ),
    ),
    inference_only=True,
)
test_cfg = dict(sampler='FlowEulerODE')
