# What text-to-image models are measured by: the 3,200 prompts of HPSv2 (`test`) and 10,000 captions of COCO (`test2`).
prompts = dict(type='ImagePrompt', latent_size=(16, 128, 128), test_mode=True)
data = dict(
    workers_per_gpu=1,
    prefetch_factor=2,
    test=dict(
        data_root='data/t2i-prompts-hpsv2',
        prompt_dataset_kwargs=dict(path='Lakonik/t2i-prompts-hpsv2'),
        **prompts,
    ),
    test2=dict(
        data_root='data/t2i-prompts-coco-10k',
        prompt_dataset_kwargs=dict(path='Lakonik/t2i-prompts-coco-10k'),
        **prompts,
    ),
    test_dataloader=dict(samples_per_gpu=1),
)

# images of HPSv2's prompts are compared with the teacher's, those of COCO's with photographs
num_images = dict(test=3200, test2=10000)
references = dict(qwen_hpsv2='test', flux_hpsv2='test', coco10k='test2')
benchmarks = {
    reference: dict(
        type='GenerativeEvalHook',
        data=split,
        interval=None,
        feed_batch_size=32,
        viz_num=128,
        metrics=[
            dict(
                type='InceptionMetrics',
                num_images=num_images[split],
                reference_pkl=f'huggingface://Lakonik/inception_feats/{reference}_inception.pkl',
            ),
            # of a crop at full resolution
            dict(
                type='InceptionMetrics',
                num_images=num_images[split],
                center_crop=True,
                reference_pkl=f'huggingface://Lakonik/inception_feats/{reference}_patch_inception.pkl',
                prefix='patch',
            ),
            dict(type='CLIPSimilarity'),
            dict(type='HPSv2'),
            dict(type='VQAScore'),
            dict(type='ColorStats'),
        ],
        save_best_ckpt=False,
    )
    for reference, split in references.items()
}
