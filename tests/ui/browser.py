"""A headless browser on pages of gradio; what is needed for it is said where it is missing."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.debian_packages import INSTALLED_AS

#: Milliseconds until something that should appear counts as missing; what appears is not waited for any longer.
PATIENCE = 60_000
WIDTHS = {'laptop': (1280, 800), 'phone': (390, 844)}


def require() -> None:
    """Skip the module's tests where a package is missing."""
    pytest.importorskip('gradio', reason="the web pages need gradio: pip install 'lakonlab[demo]'")
    pytest.importorskip('playwright', reason="the browser is driven by playwright: pip install 'lakonlab[test]'")
    if not Path(INSTALLED_AS['chromium']).exists():
        pytest.skip('chromium not installed: apt-get install chromium', allow_module_level=True)


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """A tab of a browser."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=INSTALLED_AS['chromium'], args=['--no-sandbox'], timeout=PATIENCE
        )
        page = browser.new_page(reduced_motion='reduce')
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


@contextlib.contextmanager
def served(make: Callable[[], Any]) -> Iterator[str]:
    """Serve the ``gradio.Blocks`` that a function makes, on a free port of this machine; gives its address."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_TEMP_DIR', folder)
        app = make()
        _, address, _ = app.queue().launch(prevent_thread_lock=True, quiet=True, server_name='127.0.0.1')
        try:
            yield address
        finally:
            app.close()


def visit(page: Any, address: str, width: str = 'laptop') -> Any:
    """Open a page anew, in a window of one of :data:`WIDTHS`."""
    from playwright.sync_api import expect

    page.set_viewport_size(dict(zip(('width', 'height'), WIDTHS[width])))
    page.goto(address, wait_until='domcontentloaded')
    expect(page.locator('h1')).to_be_visible()
    return page


def look(page: Any, name: str) -> None:
    """Keep a screenshot in the folder that ``LAKONLAB_SCREENSHOTS`` names, if it does."""
    folder = os.environ.get('LAKONLAB_SCREENSHOTS')
    if folder:
        page.wait_for_timeout(700)  # until messages have appeared
        page.screenshot(path=Path(folder, f'{name}.png'), full_page=True, animations='disabled')


def box(page: Any, name: str) -> Any:
    """The box of numbers with an id, or that of a slider with an id."""
    return page.locator(f'#{name} input[type=number]')


def enter(page: Any, name: str, value: int) -> None:
    """Type a number into such a box and leave it."""
    box(page, name).fill(str(value))
    box(page, name).blur()


def drag(page: Any, name: str, share: float) -> None:
    """Drag a slider with the mouse.

    Args:
        page: The tab.
        name: Id of the slider.
        share: Of its length, where it is let go.
    """
    handle = page.locator(f'#{name} input[type=range]')
    handle.scroll_into_view_if_needed()
    least, most = (float(handle.get_attribute(part)) for part in ('min', 'max'))
    now = float(handle.input_value())
    area = handle.bounding_box()
    knob = area['height'] / 2
    across = area['width'] - 2 * knob
    middle = area['y'] + area['height'] / 2
    page.mouse.move(area['x'] + knob + across * (now - least) / (most - least), middle)
    page.mouse.down()
    page.mouse.move(area['x'] + knob + across * share, middle, steps=5)
    page.mouse.up()


def shown(page: Any, identifier: str, text: str) -> None:
    """Wait until a field that is not edited says something, given as a regular expression."""
    from playwright.sync_api import expect

    expect(page.locator(f'#{identifier} textarea, #{identifier} input')).to_have_value(re.compile(text))


def size(image: Any) -> tuple[int, int]:
    """Width and height of an image in pixels, once it is there; one that cannot be decoded is an error."""
    return tuple(image.evaluate('image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])'))


def check_layout(page: Any) -> None:
    """Nothing sticks out of the window at its sides."""
    found = page.evaluate(
        """() => {
          const controls = [...document.querySelectorAll('button, input, textarea, img, h1, p')];
          const name = (e) => `${e.tagName} ${e.closest('[id]')?.id} ${e.textContent.trim() || e.ariaLabel || ''}`;
          const isOut = ({ left, right, width }) => width > 1 && (left < -1 || right > innerWidth + 1);
          const out = controls.filter((e) => e.checkVisibility() && isOut(e.getBoundingClientRect())).map(name);
          return { out, wider: document.documentElement.scrollWidth - innerWidth };
        }"""
    )
    assert found == {'out': [], 'wider': 0}
