# Weights, gradients and moments are divided among the processes of a node.
train_cfg = dict(grad_accum_batch_size=1)
optimizer = {'diffusion': dict(type='AdamW')}
module_wrapper = 'fsdp'
fsdp_kwargs = dict(
    param_dtype='bfloat16',
    reduce_dtype='float32',
    fsdp_modules=[
        'diffusers.models.transformers.transformer_flux.FluxTransformerBlock',
        'diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock',
    ],
    exclude_keys=['vae'],
)
