"""The page that turns prompts into images, in a browser."""

import socket
from argparse import Namespace

import pytest
from PIL import Image

from lakonlab.ui.text_to_image_app import BLOCKS, LARGEST_SEED, serve, settled_seed, text_to_image_app
from tests.ui import browser

PROMPT = 'a red heart'


def test_seeds():
    assert settled_seed(7) == settled_seed(7.0) == 7
    assert len({settled_seed(-1) for _ in range(5)} | {settled_seed(None)}) > 1
    for seed in (-2, LARGEST_SEED + 1):
        with pytest.raises(ValueError, match='expected -1 for a random one'):
            settled_seed(seed)


@pytest.fixture(scope='module')
def requests():
    """Calls that the page made."""
    return []


@pytest.fixture(scope='module')
def address(tmp_path_factory, requests):
    """Of the page, for a tiny FLUX with an adapter."""
    browser.require()
    from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
    from lakonlab.ui.generate_app import generator_of
    from tests import tiny_components
    from tests.pipelines.adapters import write_adapter

    folder = tmp_path_factory.mktemp('page')
    pipe = PiFluxPipeline.from_pretrained(tiny_components.flux_folder(folder / 'base'))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_piflow_adapter(write_adapter(folder / 'adapter', pipe.transformer))
    make = generator_of({4: pipe})

    def generate(**call):
        requests.append(call)
        if call['prompt'].endswith('too much'):
            raise RuntimeError(f'{call["prompt"]}: out of memory')
        image = make(**call)
        assert isinstance(image, Image.Image)
        return image.resize((4 * image.width, 4 * image.height))

    with browser.served(
        lambda: text_to_image_app(generate, 'Tiny FLUX', width=96, height=64, steps=(4, 8, 4, 4))
    ) as at:
        yield at


@pytest.fixture(scope='module')
def tab(address):
    with browser.started() as tab:
        yield tab


@pytest.fixture
def page(tab, address, requests):
    """The page as it is at first, with a prompt."""
    requests.clear()
    browser.visit(tab, address)
    tab.locator('#prompt textarea').fill(PROMPT)
    return tab


def generate(page, requests, before=None):
    """Press the button; gives the address of the image, which is another one than before, and the call."""
    from playwright.sync_api import expect

    image = page.locator('#image img')
    page.locator('#generate').click()
    expect(image).to_be_visible()
    if before is not None:
        expect(image).not_to_have_attribute('src', before)
    return image.get_attribute('src'), requests[-1]


def test_generating_and_seeds(page, requests):
    """Generate, with another seed, and with the one that was used last."""
    from playwright.sync_api import expect

    browser.shown(page, 'last-seed', '^$')
    page.locator('#reuse-seed').click()
    first, call = generate(page, requests)
    assert call == dict(prompt=PROMPT, seed=42, width=96, height=64, steps=4)
    assert browser.size(page.locator('#image img')) == (4 * 96, 4 * 64)
    browser.shown(page, 'last-seed', '^42$')
    browser.look(page, 'generated')
    browser.enter(page, 'seed', 7)
    second, call = generate(page, requests, first)
    assert call['seed'] == 7
    page.locator('#random-seed').click()
    expect(browser.box(page, 'seed')).to_have_value('-1')
    third, call = generate(page, requests, second)
    seed = call['seed']
    assert seed not in (7, 42)
    browser.shown(page, 'last-seed', f'^{seed}$')
    page.locator('#reuse-seed').click()
    expect(browser.box(page, 'seed')).to_have_value(str(seed))
    browser.enter(page, 'seed', 42)
    again, call = generate(page, requests, third)
    assert (again, call['seed']) == (first, 42)


def test_swapping_and_steps(page, requests):
    from playwright.sync_api import expect

    page.locator('#swap').click()
    expect(browser.box(page, 'width')).to_have_value('64')
    expect(browser.box(page, 'height')).to_have_value('96')
    browser.drag(page, 'steps', 1.0)
    expect(browser.box(page, 'steps')).to_have_value('8')
    first, call = generate(page, requests)
    assert call == dict(prompt=PROMPT, seed=42, width=64, height=96, steps=8)
    browser.look(page, 'swapped')
    browser.enter(page, 'steps', 4)
    _, call = generate(page, requests, first)
    assert call['steps'] == 4


def test_errors(page, requests):
    """They are shown, nothing is made, and what is right goes on working."""
    from playwright.sync_api import expect

    page.locator('#prompt textarea').fill('  ')
    page.locator('#generate').click()
    expect(page.get_by_text('The prompt is empty')).to_be_visible()
    browser.look(page, 'empty_prompt')
    page.locator('#prompt textarea').fill(PROMPT)
    browser.enter(page, 'seed', -5)
    page.locator('#generate').click()
    expect(page.get_by_text('the seed is -5: expected -1 for a random one')).to_be_visible()
    assert not requests
    browser.enter(page, 'seed', 3)
    page.locator('#prompt textarea').fill('too much')
    page.locator('#generate').click()
    expect(page.get_by_text('out of memory')).to_be_visible()
    expect(page.locator('#image img')).to_have_count(0)
    browser.shown(page, 'last-seed', '^$')
    page.locator('#prompt textarea').fill(PROMPT)
    first, call = generate(page, requests)
    assert call['seed'] == 3
    browser.shown(page, 'last-seed', '^3$')
    browser.enter(page, 'seed', 4)
    page.locator('#prompt textarea').fill('far too much')
    page.locator('#generate').click()
    expect(page.get_by_text('far too much: out of memory')).to_be_visible()
    expect(page.locator('#image img')).to_have_attribute('src', first)
    browser.shown(page, 'last-seed', '^3$')


@pytest.mark.parametrize('width', browser.WIDTHS)
def test_layout(tab, address, requests, width):
    """Nothing sticks out, and the image is in view once it is there, also on a phone."""
    from playwright.sync_api import expect

    browser.visit(tab, address, width)
    browser.check_layout(tab)
    browser.look(tab, f'text_to_image_{width}')
    tab.locator('#prompt textarea').fill(PROMPT)
    generate(tab, requests)
    expect(tab.locator('#image img')).to_be_in_viewport(ratio=0.9)
    browser.check_layout(tab)
    browser.look(tab, f'generated_{width}')


def test_a_port_that_is_taken():
    browser.require()
    import gradio

    with socket.socket() as taken, gradio.Blocks(**BLOCKS) as app:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f'error: .*{port}'):
            serve(app, Namespace(host='127.0.0.1', port=port, share=False))
