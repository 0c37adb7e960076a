# FLUX.1-schnell, which has no guidance embedded and takes up to 256 text tokens.
_base_ = ['./_flux_test.py']

name = 'flux_schnell_test'

repository = 'black-forest-labs/FLUX.1-schnell'
weights = f'huggingface://{repository}/transformer/diffusion_pytorch_model.safetensors.index.json'
model = dict(
    diffusion=dict(
        denoising=dict(pretrained=weights, guidance_embeds=False),
        timestep_sampler=dict(_delete_=True, type='ContinuousTimeStepSampler', shift=1.0),
    ),
    vae=dict(model_name_or_path=repository),
    text_encoder=dict(model_name_or_path=repository, max_sequence_length=256),
)
test_cfg = dict(num_timesteps=4, distilled_guidance_scale=None)
