# Embeds prompts as they come, instead of reading embeddings that were computed before.
model = dict(
    text_encoder=dict(
        type='PretrainedQwenImageTextEncoder',
        model_name_or_path='Qwen/Qwen-Image',
        max_sequence_length=512,
        pad_seq_len=512,
        torch_dtype='bfloat16',
    )
)
