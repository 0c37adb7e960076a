# ImageNet 256x256: latents computed before training, labelled noise to sample from, the network of the DiT family, and
# how samples are measured.

# the network that teachers and students share
transformer = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, num_layers=28, sample_size=32)

vae = dict(type='PretrainedVAE', model_name_or_path='stabilityai/sd-vae-ft-ema', del_encoder=True, use_slicing=True)

labels = dict(label2name_path='data/imagenet/imagenet1000_clsidx_to_labels.txt', negative_label=1000)
data = dict(
    workers_per_gpu=4,
    persistent_workers=True,
    prefetch_factor=64,
    train=dict(
        type='ImageNet',
        data_root='data/imagenet/train_cache',
        datalist_path='data/imagenet/train_cache.txt',
        **labels,
    ),
    val=dict(type='ImageNet', latent_size=(4, 32, 32), test_mode=True, num_test_images=50000, **labels),
    train_dataloader=dict(samples_per_gpu=512),
    val_dataloader=dict(samples_per_gpu=125),
    test_dataloader=dict(samples_per_gpu=125),
)

benchmark = dict(
    type='GenerativeEvalHook',
    data='val',
    feed_batch_size=125,
    viz_num=256,
    metrics=[
        dict(
            type='InceptionMetrics',
            num_images=50000,
            resize=False,
            reference_pkl='huggingface://Lakonik/inception_feats/imagenet256_inception_adm.pkl',
        )
    ],
    save_best_ckpt=False,
)
