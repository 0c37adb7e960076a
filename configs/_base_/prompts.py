# Prompts of your own for 1024 x 1024 pixels, one a line; the last 128 are kept to look at while training, two samples
# of each.
prompts = dict(
    type='ImagePrompt',
    data_root='data/text_to_image',
    prompt_dataset_kwargs=dict(path='text', data_files='data/text_to_image/prompts.txt'),
    latent_size=(16, 128, 128),
)
data = dict(
    persistent_workers=True,
    train=dict(end_ind=-128, **prompts),
    val=dict(start_ind=-128, repeat=2, test_mode=True, **prompts),
    val_dataloader=dict(samples_per_gpu=1),
)
