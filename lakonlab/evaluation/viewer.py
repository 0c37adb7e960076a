"""A page to look at samples: one HTML file with its style and script in it, beside the images or with them inside."""

from __future__ import annotations

import base64
import html
import json
import logging
import mimetypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote, unquote

from lakonlab.evaluation.plain import finite
from lakonlab.storage import files
from lakonlab.storage.paths import as_local

logger = logging.getLogger('lakonlab.evaluation')

PARTS = Path(__file__).parent / 'viewer_page'
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@dataclass
class Column:
    """A run whose samples are shown.

    Args:
        name: What it is called above its images.
        numbers: Name -> value of its metrics; a text where a page says that it is not finite.
        facts: What else a reader may want to know, as plain data: protocol, checkpoint, sampling arguments.
    """

    name: str
    numbers: Mapping[str, float | str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Item:
    """A sample, as each run made it.

    Args:
        id: Number of the sample in its data set.
        caption: The prompt, or the class.
        sources: For each column the URL of the image or video, relative to the page or absolute; None if there is none.
        noise: For each column the hash of the noise that the sample started from; None where it is not known, as on
            pages of real images and on those of versions that did not say.
    """

    id: int
    caption: str
    sources: list[str | None]
    noise: list[str | None] = field(default_factory=list)

    def __post_init__(self):
        self.noise = self.noise or [None] * len(self.sources)

    @property
    def shares_noise(self) -> bool | None:
        """Whether all runs that have it started from one noise; None if that is not known of all, or if one has it."""
        hashes = [noise for source, noise in zip(self.sources, self.noise, strict=True) if source is not None]
        if len(set(hashes) - {None}) > 1:
            return False
        return None if None in hashes or len(hashes) < 2 else True


@dataclass
class Gallery:
    """What a page shows.

    Args:
        title: Its title.
        columns: Runs side by side, at least one.
        items: Samples in the order in which they are shown.
    """

    title: str
    columns: list[Column]
    items: list[Item]

    def page(self) -> str:
        """The page as HTML; no text in it can become markup or script."""
        data = json.dumps(finite(asdict(self)), ensure_ascii=False, allow_nan=False, default=str)
        for character in '<>&\u2028\u2029':
            data = data.replace(character, f'\\u{ord(character):04x}')
        # a lone half of a surrogate pair cannot be written in UTF-8
        data = re.sub('[\ud800-\udfff]', lambda found: f'\\u{ord(found[0]):04x}', data)
        title = html.escape(self.title).encode(errors='replace').decode()
        parts = {name: (PARTS / file).read_text(encoding='utf-8') for name, file in _FILES.items()}
        return Template(parts.pop('PAGE')).substitute(parts, TITLE=title, DATA=data)

    def write(self, path: str | Path) -> None:
        """Write the page, all or nothing.

        Args:
            path: The file, of any scheme.
        """
        files.write_text(path, self.page())


_FILES = {'PAGE': 'page.html', 'STYLE': 'style.css', 'SCRIPT': 'viewer.js'}


def read_page(path: str | Path) -> Gallery:
    """What a page shows, read from the page.

    Args:
        path: A file that :meth:`Gallery.write` made, of any scheme.

    Raises:
        ValueError: It is another file.
        OSError: There is no such file.
    """
    found = DATA.search(files.read_text(path))
    if found is None:
        raise ValueError(f'{path} is no page of samples')
    data = json.loads(found[1])
    columns = [Column(**column) for column in data['columns']]
    return Gallery(data['title'], columns, [Item(**item) for item in data['items']])


def url_from(page: str | Path, target: str | Path) -> str:
    """URL of a file as a page refers to it: relative where both are in one place, so that they can be moved together.

    Args:
        page: The page.
        target: The file, or a URL, which comes back as it is.
    """
    if _is_url(str(target)):
        return str(target)
    try:
        path = files.relative_to(target, files.parent_of(page))
    except files.StorageError as error:
        raise ValueError(
            f'{page} cannot show {target}: put the page where the images are, or the images into the page'
        ) from error
    return quote(path)


def _is_url(source: str) -> bool:
    """Whether a browser finds an image by itself, from wherever the page is."""
    return source.startswith('data:') or files.scheme_of(source) in ('http', 'https')


def side_by_side(
    pages: Sequence[str | Path],
    output: str | Path,
    names: Sequence[str] | None = None,
    embed: bool = False,
    any_noise: bool = False,
) -> Gallery:
    """Show several runs beside each other, whose samples have the same numbers, captions and initial noise.

    Args:
        pages: Their pages.
        output: Where the common page will be.
        names: What the runs are called; None for the titles of their pages.
        embed: Put the images into the page, so that it can be sent as one file.
        any_noise: Show samples of the same number too that started from different noise; the page marks them.

    Returns:
        What the common page shows: every sample that any of them has, in order.

    Raises:
        ValueError: A sample has different captions: they are of different data; or it started from different noise; or
            the pages cannot be shown together; or a page names a file to embed that is no image below its folder.
    """
    if names is not None and len(names) != len(pages):
        raise ValueError(f'{len(names)} names for {len(pages)} pages: expected one for each')
    galleries = [read_page(path) for path in pages]
    seeds = {column.facts.get('sampling_seed') for gallery in galleries for column in gallery.columns} - {None}
    if len(seeds) > 1:
        logger.warning(
            'sampling_seed is %s: what samplers draw beyond the initial noise is not the same',
            ', '.join(map(str, sorted(seeds))),
        )
    total = sum(len(gallery.columns) for gallery in galleries)
    columns: list[Column] = []
    items: dict[int, Item] = {}
    for index, (path, gallery) in enumerate(zip(pages, galleries)):
        offset = len(columns)
        for column in gallery.columns:
            name = names[index] if names is not None else gallery.title
            if len(gallery.columns) > 1:
                name = f'{name}: {column.name}'
            columns.append(Column(name, column.numbers, column.facts))
        for item in gallery.items:
            row = items.setdefault(item.id, Item(item.id, item.caption, [None] * total))
            if row.caption != item.caption:
                raise ValueError(
                    f'{path}: sample {item.id} is {item.caption!r}, but {row.caption!r} in a page before it: '
                    'these are samples of different data'
                )
            end = offset + len(item.sources)
            row.sources[offset:end] = [_moved(source, path, output, embed) for source in item.sources]
            row.noise[offset:end] = item.noise
    common = Gallery(
        ' | '.join(column.name for column in columns), columns, [items[number] for number in sorted(items)]
    )
    _check_noise(common, any_noise)
    return common


def _check_noise(gallery: Gallery, any_noise: bool) -> None:
    """Refuse samples that started from different noise, unless they are wanted; say of which it is not known."""
    compared = [item for item in gallery.items if len(item.sources) - item.sources.count(None) > 1]
    different = [item for item in compared if item.shares_noise is False]
    unknown = [item for item in compared if item.shares_noise is None]
    if different:
        first = different[0]
        hashes = [f'{noise} in {column.name!r}' for column, noise in zip(gallery.columns, first.noise) if noise]
        text = (
            f'{len(different)} of {len(compared)} samples did not start from the same noise (other seeds, data or size '
            f'of latents): sample {first.id} from {", ".join(hashes)}'
        )
        if not any_noise:
            raise ValueError(f'{text}; to see them side by side all the same, pass --any-noise')
        logger.warning('%s', text)
    if unknown:
        silent = {
            column.name
            for item in unknown
            for column, source, noise in zip(gallery.columns, item.sources, item.noise, strict=True)
            if source is not None and noise is None
        }
        logger.warning(
            'of %d of %d samples it is not known whether they started from the same noise, because %s does not say '
            '(real images, or a page of a version that did not write it)',
            len(unknown),
            len(compared),
            ', '.join(map(repr, sorted(silent))),
        )


def _is_below(target: str | Path, folder: str | Path) -> bool:
    """Whether a file is in a folder or one below it, wherever links lead."""
    if files.scheme_of(target) != files.scheme_of(folder):
        return False
    if files.scheme_of(target) == 'file':
        return as_local(target).resolve().is_relative_to(as_local(folder).resolve())
    return '..' not in files.relative_to(target, folder).split('/')


def _moved(source: str | None, page: str | Path, output: str | Path, embed: bool) -> str | None:
    """The URL by which another page refers to an image of a page."""
    if source is None or _is_url(source):
        return source
    target = files.reached_from(files.parent_of(page), unquote(source))
    if not embed:
        return url_from(output, target)
    kind = mimetypes.guess_type(str(target))[0] or ''
    if not kind.startswith(('image/', 'video/')) or not _is_below(target, files.parent_of(page)):
        raise ValueError(
            f'{page} names {source!r}, which is not put into another page: only images and videos below the folder of '
            'the page that shows them are'
        )
    if not files.is_file(target):
        return None
    return f'data:{kind};base64,{base64.b64encode(files.read_bytes(target)).decode()}'
