# Sharding of qwen.py; and a text encoder, so that `model` is in two bases.
model = dict(
    text_encoder=dict(
        type='PretrainedQwenImageTextEncoder',
        model_name_or_path='Qwen/Qwen-Image',
        torch_dtype='bfloat16',
        max_sequence_length=512,
        pad_seq_len=512))
train_cfg = dict(grad_accum_batch_size=1)
optimizer = {'diffusion': dict(type='AdamW')}
module_wrapper = 'fsdp'
fsdp_kwargs = dict(
    param_dtype='bfloat16',
    reduce_dtype='float32',
    use_orig_params=True,
    wrap_frozen_modules=True,
    fsdp_modules=['diffusers.models.transformers.transformer_qwenimage.QwenImageTransformerBlock'],
    exclude_keys=['vae'],
    tie_key_mappings=['teacher->diffusion', 'teacher->diffusion_ema'])
