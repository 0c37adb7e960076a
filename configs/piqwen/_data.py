# Prompts for Qwen-Image, and for the teacher's guidance the empty one.
_base_ = ['../_base_/prompts.py']

embeddings = dict(
    cache_dir='preproc_qwen',
    cache_datalist_path='data/text_to_image/preproc_qwen.jsonl.gz',
    pad_seq_len=512,
    negative_prompt_embeds_path='data/qwen_empty_prompt_embeds.pth',
    negative_prompt_kwargs=dict(prompt=''),
)
data = dict(train=embeddings, val=embeddings)
