"""Emoji with their Unicode names as captions: a small text-to-image data set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from lakonlab.datasets.emoji_font import EmojiFont, EmojiName, on_background, read_names
from lakonlab.datasets.noise import seeded_noise
from lakonlab.datasets.text_files import decoded
from lakonlab.registry import DATASETS
from lakonlab.storage import files

FONT_PATH = '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf'
NAMES_PATH = '/usr/share/unicode/emoji/emoji-test.txt'
DEBIAN_PACKAGES = {'font_path': 'fonts-noto-color-emoji', 'names_path': 'unicode-data'}


class Pictures(NamedTuple):
    """What was read."""

    names: list[EmojiName]
    pixels: np.ndarray
    """(N, S, S, 3), unsigned bytes."""


@DATASETS.register_module()
class Emoji(Dataset):
    """Pictures of emoji for training, or noise for sampling; the captions are their names, as Unicode gives them.

    The pictures are the bitmaps of the font Noto Color Emoji, the names those of ``emoji-test.txt``; on Debian and
    Ubuntu the packages ``fonts-noto-color-emoji`` and ``unicode-data`` have them.

    Args:
        font_path: The font, local or a URL.
        names_path: The names, local or a URL.
        image_size: Side of the pictures in pixels.
        groups: Only emoji of these groups of Unicode, such as ``'Animals & Nature'``; None for all.
        subgroups: Only emoji of these subgroups, such as ``'animal-bird'``; None for all.
        skin_tones: Whether to have the five variants of hands and people too.
        background: Colour behind the pictures, as PIL names it.
        negative_prompt: Text from which guidance moves away; None to leave it out.
        test_mode: Items hold noise to start sampling from, and captions in turn, instead of pictures.
        num_test_images: Number of items in test mode; None for one for each emoji.

    Raises:
        ValueError: An argument is out of range.
    """

    needs_text_encoder = 'the captions are texts'

    def __init__(
        self,
        font_path: str = FONT_PATH,
        names_path: str = NAMES_PATH,
        image_size: int = 32,
        groups: Sequence[str] | None = None,
        subgroups: Sequence[str] | None = None,
        skin_tones: bool = False,
        background: str = 'white',
        negative_prompt: str | None = '',
        test_mode: bool = False,
        num_test_images: int | None = None,
    ):
        if image_size < 1:
            raise ValueError(f'image_size={image_size}: expected a positive number of pixels')
        if num_test_images is not None and num_test_images < 1:
            raise ValueError(f'num_test_images={num_test_images}: expected a positive number of samples')
        self.font_path = font_path
        self.names_path = names_path
        self.image_size = image_size
        self.groups = groups
        self.subgroups = subgroups
        self.skin_tones = skin_tones
        self.background = background
        self.negative_prompt = negative_prompt
        self.test_mode = test_mode
        self.num_test_images = num_test_images

    def _path_of(self, setting: str) -> str:
        path = getattr(self, setting)
        if not files.is_file(path):
            raise FileNotFoundError(
                f'{setting}={path!r}: there is no such file; apt-get install {DEBIAN_PACKAGES[setting]} puts it into '
                f'{FONT_PATH if setting == "font_path" else NAMES_PATH}, or name the file'
            )
        return path

    @cached_property
    def pictures(self) -> Pictures:
        """The emoji that are chosen and that the font has, read when first needed."""
        names_path = self._path_of('names_path')
        names = read_names(decoded(files.read_bytes(names_path), names_path), names_path)
        for setting, attribute in (('groups', 'group'), ('subgroups', 'subgroup')):
            self._require_known(setting, {getattr(name, attribute) for name in names})
        chosen = [
            name
            for name in names
            if (self.groups is None or name.group in self.groups)
            and (self.subgroups is None or name.subgroup in self.subgroups)
            and (self.skin_tones or not name.has_skin_tone)
        ]
        font = EmojiFont(files.fetch(self._path_of('font_path')))
        found = [(name, png) for name in chosen if (png := font.picture(name.code_points)) is not None]
        if not found:
            raise ValueError(f'groups={self.groups!r}, subgroups={self.subgroups!r}: there is no emoji in both')
        pixels = [np.asarray(on_background(png, self.image_size, self.background)) for _, png in found]
        return Pictures([name for name, _ in found], np.stack(pixels))

    def _require_known(self, setting: str, known: set[str]) -> None:
        for name in getattr(self, setting) or ():
            if name not in known:
                raise ValueError(f'{setting}: found {name!r}, expected some of {", ".join(map(repr, sorted(known)))}')

    def __len__(self) -> int:
        size = len(self.pictures.names)
        return self.num_test_images or size if self.test_mode else size

    def __getitem__(self, index: int) -> dict:
        """Return one item.

        Args:
            index: Number of the item, ``0 <= index < len(self)``.

        Returns:
            ``ids`` int, ``name``, the caption, ``prompt_kwargs`` and ``negative_prompt_kwargs`` with a ``prompt``, and
            ``images`` (3, S, S) in [0, 1] or, in test mode, ``noise`` of that shape; float32.

        Raises:
            IndexError: ``index`` is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'item {index} of an Emoji data set of {len(self)}')
        number = index % len(self.pictures.names)
        caption = self.pictures.names[number].name
        item = {'ids': index, 'name': caption, 'prompt_kwargs': {'prompt': caption}}
        if self.negative_prompt is not None:
            item['negative_prompt_kwargs'] = {'prompt': self.negative_prompt}
        if self.test_mode:
            return {**item, 'noise': seeded_noise(index, (3, self.image_size, self.image_size))}
        picture = torch.from_numpy(self.pictures.pixels[number].copy())
        return {**item, 'images': picture.permute(2, 0, 1).float() / 255}
