# The policy is the clean image as a function of time, on a grid of 10 times over one of the 1 + 1 + 1 + 0.5 segments.
_base_ = ['./_student.py']

trained_layers = ['self.proj_out', 'norm_out', 'lora']
# those of the single blocks alone: the layer of this name at the root is the head, which is trained itself
adapted_outputs = [f'single_transformer_blocks.{block}.proj_out' for block in range(_base_.network.num_single_layers)]
model = dict(
    diffusion=dict(
        policy_type='DX',
        policy_kwargs=dict(segment_size=1 / 3.5, shift=_base_.shift),
        denoising=dict(type='DXFluxTransformer2DModel', n_grid=10, out_channels=64),
    )
)
