# Every process holds all weights; 8-bit moments and micro-batches of 4 let them fit.
model = dict(diffusion=dict(denoising=dict(freeze_exclude_autocast_dtype='bfloat16')))
train_cfg = dict(grad_accum_batch_size=4)
optimizer = {'diffusion': dict(type='AdamW8bit')}
module_wrapper = 'ddp'
