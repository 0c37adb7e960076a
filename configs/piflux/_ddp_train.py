# Every process holds all weights; 8-bit moments let them fit.
model = dict(diffusion=dict(denoising=dict(freeze_exclude_autocast_dtype='bfloat16')))
optimizer = {'diffusion': dict(type='AdamW8bit')}
module_wrapper = 'ddp'
