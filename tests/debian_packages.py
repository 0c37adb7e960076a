"""Packages of the system that hold real data, and a browser, for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

INSTALLED_AS = {
    'chromium': '/usr/bin/chromium',
    'dataset-fashion-mnist': '/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz',
    'fonts-noto-color-emoji': '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf',
    'unicode-data': '/usr/share/unicode/emoji/emoji-test.txt',
}


def needs(*packages: str) -> pytest.MarkDecorator:
    """Mark for tests that need packages; where one is missing they are skipped, and say how to install it."""
    missing = [package for package in packages if not Path(INSTALLED_AS[package]).exists()]
    names = ' '.join(missing)
    return pytest.mark.skipif(bool(missing), reason=f'{names} not installed: apt-get install {names}')
