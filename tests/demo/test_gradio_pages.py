"""The scripts that serve pages, on tiny bases and adapters: one request each, and a signal that ends them."""

import signal
from argparse import Namespace
from dataclasses import replace

import pytest
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from PIL import Image

from lakonlab.pipelines.recipe import Recipe
from lakonlab.ui.generate_app import build_pipelines, generator_of, slider_of
from lakonlab.ui.pipeline_options import GMFLUX, GMFLUX_8
from tests import tiny_components
from tests.pipelines.adapters import RECIPE, write_adapter


@pytest.mark.slow
@pytest.mark.parametrize(
    ('script', 'folder', 'transformer', 'steps', 'ended_by'),
    [
        ('gradio_gmflux.py', tiny_components.flux_folder, FluxTransformer2DModel, 8, signal.SIGINT),
        ('gradio_gmqwen.py', tiny_components.qwen_image_folder, QwenImageTransformer2DModel, 5, signal.SIGTERM),
    ],
)
def test_script(script, folder, transformer, steps, ended_by, tmp_path):
    pytest.importorskip('gradio', reason="the web pages need gradio: pip install 'lakonlab[demo]'")
    from tests.ui.page_scripts import served

    base = folder(tmp_path / 'base')
    write_adapter(tmp_path / 'adapter', transformer.from_pretrained(base, subfolder='transformer'))
    options = ['--model', base, '--adapter', tmp_path / 'adapter', '--device', 'cpu', '--dtype', 'float32']
    with served(script, tmp_path, *options, ended_by=ended_by) as client:
        call = dict(prompt='a red heart', seed='3', width=96, height=64, steps=steps)
        result, seed = client.predict(*call.values(), api_name='/text_to_img')
        assert Image.open(result).size == (96, 64)
        assert seed == '3'


def test_an_adapter_for_each_number_of_steps(tmp_path):
    """They share the base; from its number of evaluations on, each is used."""
    base = tiny_components.flux_folder(tmp_path / 'base')
    transformer = FluxTransformer2DModel.from_pretrained(base, subfolder='transformer')
    adapters = str(tmp_path / 'adapters')
    published = [replace(which, adapter=adapters) for which in (GMFLUX, GMFLUX_8)]
    for seed, which in enumerate(published):
        recipe = {**RECIPE, 'nfe': which.steps}
        write_adapter(tmp_path / 'adapters' / which.subfolder, transformer, recipe=recipe, seed=seed)
    args = Namespace(
        model=str(base), adapter=adapters, subfolder=None, device='cpu', dtype='float32', offload='none', compile=False
    )
    pipes = build_pipelines(args, published)
    assert list(pipes) == [4, 8]
    assert pipes[4].transformer.piflow.base is pipes[8].transformer.piflow.base
    call = dict(prompt='a red heart', seed=3, width=48, height=32, steps=8)
    with_both = generator_of(pipes)(**call)
    assert with_both == generator_of({4: pipes[8]})(**call) != generator_of({4: pipes[4]})(**call)
    assert slider_of((4, 8, 4, 4), pipes, published) == (4, 8, 4, 4)
    one = build_pipelines(Namespace(**{**vars(args), 'subfolder': GMFLUX.subfolder}), published)
    assert list(one) == [4]


@pytest.mark.parametrize(
    ('nfe', 'slider', 'expected'),
    [
        (2, (4, 8, 4, 4), (2, 8, 2, 1)),
        (8, (4, 8, 4, 4), (4, 8, 8, 4)),
        (6, (4, 8, 4, 4), (4, 8, 6, 1)),
        (16, (4, 8, 4, 4), (4, 16, 16, 4)),
        (2, (4, 50, 4, 1), (2, 50, 2, 1)),
    ],
)
def test_a_page_begins_with_what_an_adapter_was_trained_for(nfe, slider, expected):
    """And it is used for fewer evaluations than the page was made for, too."""

    class Pipe:
        transformer = Namespace(piflow=Namespace(recipe=Recipe(nfe=nfe)))

        def __call__(self, prompt, num_inference_steps, **options):
            return Namespace(images=[num_inference_steps])

    pipes = {GMFLUX.steps: Pipe()}
    assert slider_of(slider, pipes, (GMFLUX, GMFLUX_8)) == expected
    assert generator_of(pipes)('a red heart', 3, 48, 32, expected[2]) == nfe
