# Imitation at noised images: every prompt needs its image, or the image's latents in the cache.
model = dict(diffusion=dict(type='PiFlowImitation'))
data = dict(
    workers_per_gpu=4,
    prefetch_factor=4,
    train=dict(image_dir='images', image_datalist_path='data/text_to_image/images.jsonl'),
    train_dataloader=dict(samples_per_gpu=8),
)
