"""The page that turns prompts into images, in a browser."""

import pytest
from PIL import Image

from lakonlab.ui.text_to_image_app import LARGEST_SEED, settled_seed


def test_seeds():
    assert settled_seed(7) == settled_seed(7.0) == 7
    assert len({settled_seed(-1) for _ in range(5)} | {settled_seed(None)}) > 1
    for seed in (-2, LARGEST_SEED + 1):
        with pytest.raises(ValueError, match='expected -1 for a random one'):
            settled_seed(seed)


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """Generate, change the seed, reuse it, swap the sizes; an empty prompt is an error that is shown."""
    from tests.ui import browser

    browser.require()
    import torch
    from diffusers import FluxTransformer2DModel
    from playwright.sync_api import expect

    from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
    from lakonlab.ui.generate_app import generator_of
    from lakonlab.ui.text_to_image_app import text_to_image_app
    from tests import tiny_components
    from tests.pipelines.adapters import write_adapter

    base = tiny_components.flux_folder(tmp_path / 'base')
    transformer = FluxTransformer2DModel.from_pretrained(base, subfolder='transformer')
    pipe = PiFluxPipeline.from_pretrained(base)
    pipe.load_piflow_adapter(write_adapter(tmp_path / 'adapter', transformer))
    calls = []
    make = generator_of({4: pipe})

    def generate(**call):
        calls.append(call)
        image = make(**call)
        assert isinstance(image, Image.Image)
        return image.resize((4 * image.width, 4 * image.height))

    app = text_to_image_app(generate, 'Tiny FLUX', width=96, height=64, steps=(4, 8, 4, 4))
    with torch.inference_mode(False), browser.opened(app) as page:
        image = page.locator('#image img')
        page.locator('#prompt textarea').fill('a red heart')
        page.locator('#generate').click()
        expect(image).to_be_visible()
        first = image.get_attribute('src')
        assert calls == [dict(prompt='a red heart', seed=42, width=96, height=64, steps=4)]
        browser.look(page, 'generated')

        page.locator('#random-seed').click()
        expect(page.locator('#seed input')).to_have_value('-1')
        page.locator('#generate').click()
        expect(image).not_to_have_attribute('src', first)
        seed = browser.number(page, 'last-seed')
        assert calls[1]['seed'] == seed != 42
        page.locator('#reuse-seed').click()
        expect(page.locator('#seed input')).to_have_value(str(seed))

        page.locator('#swap').click()
        expect(page.locator('#width input[type=number]')).to_have_value('64')
        expect(page.locator('#height input[type=number]')).to_have_value('96')
        second = image.get_attribute('src')
        page.locator('#generate').click()
        expect(image).not_to_have_attribute('src', second)
        assert calls[2] == dict(prompt='a red heart', seed=seed, width=64, height=96, steps=4)
        browser.look(page, 'swapped')

        page.locator('#prompt textarea').fill('  ')
        page.locator('#generate').click()
        expect(page.get_by_text('The prompt is empty')).to_be_visible()
        browser.look(page, 'empty_prompt')
        assert len(calls) == 3
