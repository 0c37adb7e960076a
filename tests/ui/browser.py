"""A headless browser on a page of gradio; what is needed for it is said where it is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

#: Milliseconds until something that should appear counts as missing.
PATIENCE = 60_000


def require() -> None:
    """Skip the module's tests where a package is missing."""
    pytest.importorskip('gradio', reason="the web pages need gradio: pip install 'lakonlab[demo]'")
    pytest.importorskip('playwright', reason='the browser is driven by playwright: pip install playwright')
    if shutil.which('chromium') is None:
        pytest.skip('there is no chromium: apt-get install chromium', allow_module_level=True)


@contextlib.contextmanager
def opened(app):
    """Serve an app on a free port of this machine, and open it.

    Args:
        app: A ``gradio.Blocks``.
    """
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)

    _, address, _ = app.queue().launch(prevent_thread_lock=True, quiet=True, server_name='127.0.0.1')
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
            page = browser.new_page(viewport={'width': 1200, 'height': 900})
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            yield page
            browser.close()
    finally:
        app.close()


def look(page, name: str) -> None:
    """Keep a screenshot in the folder that ``LAKONLAB_SCREENSHOTS`` names, if it does."""
    folder = os.environ.get('LAKONLAB_SCREENSHOTS')
    if folder:
        page.wait_for_timeout(700)  # until messages have appeared
        page.screenshot(path=Path(folder, f'{name}.png'))


def number(page, name: str) -> int:
    """Value of the box of numbers, or of the slider, with an id."""
    return int(float(page.locator(f'#{name} input[type=number]').input_value()))
