# Distillation of Qwen-Image.
_base_ = ['./_student.py', '../_base_/text_image_train.py']

# the last block's text MLP has no effect on the image
text_mlps = [f'transformer_blocks.{block}.txt_mlp' for block in range(_base_.network.num_layers - 1)]
model = dict(
    diffusion=dict(
        denoising=dict(
            lora_target_modules=[
                'img_mlp.net.0.proj',
                'img_mlp.net.2',
                'timestep_embedder.linear_1',
                'timestep_embedder.linear_2',
                *(f'{mlp}.net.0.proj' for mlp in text_mlps),
                *(f'{mlp}.net.2' for mlp in text_mlps),
            ]
        )
    ),
    teacher=dict(
        denoising=dict(type='QwenImageTransformer2DModel', **_base_.network),
        timestep_sampler=_base_.model.diffusion.timestep_sampler,
    ),
)

train_cfg = dict(
    nfe=4,
    final_step_size_scale=0.5,
    num_intermediate_states=2,
    teacher_test_cfg=dict(guidance_scale=4.0),
)
total_iters = 9000
