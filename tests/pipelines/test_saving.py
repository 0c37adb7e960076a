"""Saving pipelines, and opening what was saved."""

import shutil

import pytest
import torch

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from tests.pipelines.adapters import write_adapter
from tests.pipelines.calls import images, load, said


def open_saved(kind, folder, **options):
    pipe = kind.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_adapters_of_an_earlier_pipeline_are_removed(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    saved, adapters = tmp_path / 'saved', tmp_path / 'saved' / 'piflow_adapters'
    pipe.save_pretrained(saved)
    shutil.copytree(adapters / 'transformer', adapters / 'transformer_2')
    (adapters / 'transformer_2' / 'notes.txt').write_text('not of this package')
    pipe.save_pretrained(saved)
    assert sorted(str(file.relative_to(adapters)) for file in adapters.rglob('*') if file.is_file()) == [
        'adapters.json',
        'transformer/config.json',
        'transformer/diffusion_pytorch_model.safetensors',
        'transformer_2/notes.txt',
    ]
    shutil.rmtree(adapters / 'transformer_2')
    pipe.unload_piflow_adapter()
    pipe.save_pretrained(saved)
    assert not adapters.exists()
    assert getattr(kind.from_pretrained(saved).transformer, 'piflow', None) is None


def test_opening_a_part_of_what_was_saved(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / 'saved')
    prompts = open_saved(kind, tmp_path / 'saved', transformer=None, vae=None)
    assert prompts.transformer is None
    assert prompts.encode_prompt('a red heart')[0].isfinite().all()
    bare = load(folders, kind).transformer
    for transformer in (pipe.transformer, bare):
        again = open_saved(kind, tmp_path / 'saved', transformer=transformer)
        assert again.transformer.piflow.where.startswith(str(tmp_path))
        assert again.scheduler.config.shift == 3.2
        torch.testing.assert_close(images(again), expected, rtol=0, atol=1e-5)
    assert again.transformer.piflow.base is bare


def test_a_compiled_student(folders, tmp_path):
    kind = PiFluxPipeline
    pipe = load(folders, kind, tmp_path)
    expected = images(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend='eager')
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-4)
    pipe.save_pretrained(tmp_path / 'saved')
    torch.testing.assert_close(images(open_saved(kind, tmp_path / 'saved')), expected, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    pipe.transformer.fuse_lora()
    with pytest.raises(ValueError, match='call unfuse_lora first'):
        pipe.save_pretrained(tmp_path / 'saved')
    pipe.transformer.unfuse_lora()
    base = pipe.transformer.piflow.base
    pipe.unload_piflow_adapter()
    assert pipe.transformer is base


@pytest.mark.parametrize('how', ['whole', 'in place', 'blocks'])
def test_a_compiled_base(folders, tmp_path, caplog, how):
    pipe = load(folders, PiFluxPipeline)
    base = pipe.transformer
    adapter = write_adapter(tmp_path / 'adapter', base)
    if how == 'whole':
        pipe.transformer = torch.compile(base, backend='eager')
    elif how == 'in place':
        base.compile(backend='eager')
    else:
        base.compile_repeated_blocks(backend='eager')
    pipe.load_piflow_adapter(adapter)
    assert [record.message.removeprefix('the FluxTransformer2DModel was compiled, ') for record in said(caplog)] == [
        'the student of it is not: compile after loading the adapter'
    ]
    assert images(pipe).isfinite().all()


def test_unloading_styles_after_all_was_deleted(folders, kind, tmp_path, caplog):
    pipe = load(folders, kind, tmp_path)
    pipe.delete_adapters('transformer_piflow')
    pipe.unload_lora_weights()
    images(pipe)
    assert "the adapter 'transformer_piflow' of pi-Flow is not active" in caplog.text
