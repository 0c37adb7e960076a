# Embeds prompts as they come, instead of reading embeddings that were computed before.
model = dict(
    text_encoder=dict(
        type='PretrainedFluxTextEncoder',
        model_name_or_path='black-forest-labs/FLUX.1-dev',
        max_sequence_length=512,
        torch_dtype='bfloat16',
    )
)
