# FLUX.1-dev: the transformer, whose times run to 1, and the autoencoder.
network = dict(
    patch_size=2,
    pretrained='huggingface://black-forest-labs/FLUX.1-dev/transformer/diffusion_pytorch_model.safetensors.index.json',
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
    torch_dtype='bfloat16',
)
model = dict(
    type='LatentDiffusionTextImage',
    vae=dict(
        type='PretrainedVAE',
        model_name_or_path='black-forest-labs/FLUX.1-dev',
        subfolder='vae',
        use_slicing=True,
        torch_dtype='bfloat16',
    ),
    diffusion=dict(num_timesteps=1, denoising_mean_mode='U'),
)
test_cfg = dict(distilled_guidance_scale=3.5)
