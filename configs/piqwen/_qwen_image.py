# Qwen-Image: the transformer, whose times run to 1, and the autoencoder.
network = dict(
    patch_size=2,
    pretrained='huggingface://Qwen/Qwen-Image/transformer/diffusion_pytorch_model.safetensors.index.json',
    in_channels=64,
    out_channels=64,
    num_layers=60,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=3584,
    axes_dims_rope=(16, 56, 56),
    torch_dtype='bfloat16',
)
model = dict(
    type='LatentDiffusionTextImage',
    vae=dict(
        type='PretrainedVAEQwenImage',
        model_name_or_path='Qwen/Qwen-Image',
        subfolder='vae',
        use_slicing=True,
        torch_dtype='bfloat16',
    ),
    diffusion=dict(num_timesteps=1, denoising_mean_mode='U'),
)
