# Prompts for FLUX.1-dev, which needs no negative ones: its guidance is part of the network.
_base_ = ['../_base_/prompts.py']

embeddings = dict(
    cache_dir='preproc_flux', cache_datalist_path='data/text_to_image/preproc_flux.jsonl.gz', pad_seq_len=512
)
data = dict(train=embeddings, val=embeddings)
