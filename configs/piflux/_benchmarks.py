# What FLUX.1 and its students are measured by.
_base_ = ['../_base_/benchmark_prompts.py']

evaluation = [_base_.benchmarks.flux_hpsv2, _base_.benchmarks.coco10k]
