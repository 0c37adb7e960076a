# Qwen-Image, guided by the empty prompt.
_base_ = ['./_qwen_test.py']

name = 'qwen_test'

model = dict(
    diffusion=dict(
        # lengths in latent pixels, of which a token has four
        timestep_sampler=dict(
            type='ContinuousTimeStepSampler',
            use_dynamic_shifting=True,
            base_seq_len=256 * 4,
            max_seq_len=8192 * 4,
            base_logshift=0.5,
            max_logshift=0.9,
        )
    )
)
test_cfg = dict(num_timesteps=50, guidance_scale=4.0, sampler_kwargs=dict(terminal_sigma=0.02))
