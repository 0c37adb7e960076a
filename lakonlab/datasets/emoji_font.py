"""Pictures and names of emoji: the bitmaps of a colour font, and the list of the Unicode Consortium."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIATION_SELECTOR = 0xFE0F
SKIN_TONES = range(0x1F3FB, 0x1F400)
LIGATURES = 4
"""Kind of a lookup that replaces a sequence of glyphs by one."""


@dataclass(frozen=True)
class EmojiName:
    """A line of the list."""

    code_points: tuple[int, ...]
    group: str
    subgroup: str
    name: str

    @property
    def has_skin_tone(self) -> bool:
        """Whether it is one of the five variants of another emoji."""
        return any(code in SKIN_TONES for code in self.code_points)


def read_names(text: str, where: str) -> list[EmojiName]:
    """Read ``emoji-test.txt`` of the Unicode Consortium: every fully qualified emoji in its order.

    Args:
        text: The content of the file.
        where: Its path, for messages.

    Raises:
        ValueError: There is no emoji in it.
    """
    names = []
    group = subgroup = ''
    for line in text.split('\n'):
        if line.startswith('# group:'):
            group = line.partition(':')[2].strip()
        elif line.startswith('# subgroup:'):
            subgroup = line.partition(':')[2].strip()
        elif not line.startswith('#') and '; fully-qualified' in line:
            codes, _, comment = line.partition(';')
            name = re.sub(r'^\S+ E[\d.]+ ', '', comment.partition('#')[2].strip())  # the character and its version
            names.append(EmojiName(tuple(int(code, 16) for code in codes.split()), group, subgroup, name))
    if not names:
        raise ValueError(f'{where}: there is no line of a fully-qualified emoji in it; expected emoji-test.txt')
    return names


class EmojiFont:
    """A font that holds its glyphs as PNG images, such as Noto Color Emoji.

    Args:
        path: The file.

    Raises:
        ImportError: The package ``fontTools`` is missing.
        ValueError: It is no such font.
    """

    def __init__(self, path: str | Path):
        try:
            from fontTools.ttLib import TTFont, TTLibError
        except ImportError as error:
            raise ImportError('emoji need the package fontTools: pip install fonttools') from error

        try:
            font = TTFont(path, lazy=True)
            missing = [table for table in ('cmap', 'CBDT', 'CBLC', 'GSUB') if table not in font]
        except TTLibError as error:
            raise ValueError(f'{path}: is no font: {error}') from error
        if missing:
            raise ValueError(f'{path}: has no table {missing[0]!r}; expected a font with bitmaps in colour (CBDT)')
        self._glyph_of_code = font.getBestCmap()
        self._bitmaps = font['CBDT'].strikeData[0]
        self._ligatures = dict(_ligatures(font['GSUB'].table))

    def picture(self, code_points: Sequence[int]) -> bytes | None:
        """The PNG file of a character or sequence of characters; None if the font has none."""
        glyphs = tuple(self._glyph_of_code.get(code) for code in code_points if code != VARIATION_SELECTOR)
        glyph = glyphs[0] if len(glyphs) == 1 else self._ligatures.get(glyphs)
        return self._bitmaps[glyph].imageData if glyph in self._bitmaps else None


def _ligatures(table: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Sequences of glyphs and what stands for each."""
    for lookup in table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            subtable = getattr(subtable, 'ExtSubTable', subtable)
            if subtable.LookupType != LIGATURES:
                continue
            for first, ligatures in subtable.ligatures.items():
                for ligature in ligatures:
                    yield (first, *ligature.Component), ligature.LigGlyph


def on_background(png: bytes, size: int, background: str):
    """A picture with transparency, in the middle of a square of one colour, as an RGB image.

    Args:
        png: The file.
        size: Side of the square in pixels.
        background: Colour, as PIL names it.
    """
    from PIL import Image

    with Image.open(io.BytesIO(png)) as file:
        glyph = file.convert('RGBA')
    side = max(glyph.size)
    square = Image.new('RGBA', (side, side), background)
    square.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.convert('RGB').resize((size, size), Image.Resampling.LANCZOS)
