# What Qwen-Image and its students are measured by.
_base_ = ['../_base_/benchmark_prompts.py']

embeddings = dict(pad_seq_len=512, negative_prompt_kwargs=dict(prompt=''))
data = dict(test=embeddings, test2=embeddings)

evaluation = [_base_.benchmarks.qwen_hpsv2, _base_.benchmarks.coco10k]
