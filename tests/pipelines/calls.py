"""Calls of tiny pipelines."""

import logging

import torch

from tests.pipelines.adapters import write_adapter

CALL = dict(height=32, width=48, max_sequence_length=32)
PROMPTS = ['a red heart', 'the sea at night']


def load(folders, pipeline, tmp_path=None, **adapter):
    """The pipeline of a family; with ``tmp_path``, with an adapter."""
    pipe = pipeline.from_pretrained(folders[pipeline])
    pipe.set_progress_bar_config(disable=True)
    if tmp_path is not None:
        write_adapter(tmp_path / 'adapter', pipe.transformer, **adapter)
        assert pipe.load_piflow_adapter(tmp_path, subfolder='adapter') == 'transformer_piflow'
    return pipe


def said(caplog):
    """What this package warned of."""
    ours = [record for record in caplog.records if record.name.startswith('lakonlab')]
    return [record for record in ours if record.levelno >= logging.WARNING]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images(pipe, prompt=PROMPTS[0], seed=1, **call):
    call = {'generator': generators(seed)[0], 'output_type': 'pt', **CALL, **call}
    return pipe(prompt, **call).images
