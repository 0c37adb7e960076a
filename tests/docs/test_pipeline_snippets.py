"""The snippets about pipelines run with nothing but repositories, device, dtype and sizes replaced."""

import re
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from PIL import Image

from tests import tiny_components
from tests.pipelines.adapters import write_adapter

ROOT = Path(__file__).parents[2]
PLACES = {
    'Qwen/Qwen-Image': (tiny_components.qwen_image_folder, QwenImageTransformer2DModel),
    'black-forest-labs/FLUX.1-dev': (tiny_components.flux_folder, FluxTransformer2DModel),
}
SIZES = {'width=1920': 'width=48', 'height=1072': 'height=32', 'width=1360': 'width=48', 'height=768': 'height=32'}


def blocks(path):
    return re.findall(r'```python\n(.*?)```', (ROOT / path).read_text(encoding='utf-8'), re.DOTALL)


def replaced(code, folder):
    """A snippet for a tiny base and adapter; none of what is replaced may be missing."""
    base = next(name for name in PLACES if name in code)
    make, transformer = PLACES[base]
    local = make(folder / 'base')
    place, subfolder = re.search(r"load_piflow_adapter\('([^']*)', subfolder='([^']*)'\)", code).groups()
    write_adapter(
        folder / 'adapters' / subfolder, transformer.from_pretrained(local, subfolder='transformer'), recipe=None
    )
    code = code.replace(base, str(local)).replace(place, str(folder / 'adapters'))
    code = code.replace("'cuda'", "'cpu'").replace('torch.bfloat16', 'torch.float32')
    for published, here in SIZES.items():
        code = code.replace(published, here)
    assert '1920' not in code
    assert '1360' not in code
    return code


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(code for code in blocks('README.md') if 'load_piflow_adapter' in code)
    names = {}
    exec(replaced(code, tmp_path), names)
    assert names['adapter'] == 'transformer_piflow'
    assert Image.open('lighthouse.png').size == (48, 32)


def test_pipelines_page(tmp_path):
    """All of its snippets, one after the other."""
    use, other, schedule = blocks('docs/pipelines.md')
    names = {}
    exec(replaced(use, tmp_path), names)
    pipe = names['pipe']
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.use_dynamic_shifting) == (3.2, False)
    assert [image.size for image in names['images']] == [(48, 32)] * 2
    exec(other, names)
    assert issubclass(names['PiSD3Pipeline'], names['PiFlowPipelineMixin'])
    for part in re.split(r'(?=^pipe\.scheduler)', schedule, flags=re.MULTILINE)[1:]:
        exec(schedule.partition('\n\n')[0] + '\n' + part, names)
        assert pipe('a red heart', width=48, height=32, output_type='pt').images.shape == (1, 3, 32, 48)


@pytest.mark.parametrize('page', ['README.md', 'docs/pipelines.md'])
def test_files_that_are_named_exist(page):
    names = re.findall(r'(?:demo|tools|docs)/[\w.]+\.(?:py|md)', (ROOT / page).read_text(encoding='utf-8'))
    assert names
    assert [name for name in names if not (ROOT / name).is_file()] == []
