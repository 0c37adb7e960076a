"""Lists of the files that belong to a data set of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lakonlab.datasets.text_files import decoded, read_lines
from lakonlab.storage import files

NAME_KEYS = ('filename', 'image_hash')
BUCKET_KEYS = ('bucket_id', 'size_idx')
SUFFIXES = ('.jsonl', '.jsonl.gz', '.json')


@dataclass(frozen=True)
class Datalist:
    """What a list says of every item, in its order."""

    names: list[str]
    """Names of the files without extension."""
    bucket_ids: list[int] | None = None
    """Bucket of every item; None if the list has none."""
    image_sizes: list[tuple[int, int]] | None = None
    """Height and width to which every image is brought; None if the list does not say."""


def read_datalist(path: str | Path, setting: str) -> Datalist:
    """Read a list of files.

    A ``.jsonl`` or ``.jsonl.gz`` file has a JSON object in each line: the name of a file without extension as
    ``filename`` or ``image_hash``, and, in all lines or in none, its bucket as ``bucket_id`` or ``size_idx`` and its
    ``image_size``, ``[height, width]``. A ``.json`` file is a list of paths, of which the file's name without extension
    counts.

    Args:
        path: The file, local or a URL.
        setting: Argument that names it, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has another form, or nothing in it.
    """
    text = str(path)
    if not text.endswith(SUFFIXES):
        raise ValueError(f'{setting}={text!r}: expected a file that ends in one of {", ".join(SUFFIXES)}')
    if not files.is_file(path):
        raise FileNotFoundError(f'{setting}={text!r}: there is no such file')
    if text.endswith('.json'):
        found = _parsed(decoded(files.read_bytes(path), text), text)
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError(f'{text}: expected a list of paths')
        datalist = Datalist([PurePosixPath(name).stem for name in found])
    else:
        datalist = _from_lines(text)
    if not datalist.names:
        raise ValueError(f'{text}: the list is empty')
    return datalist


def list_images(directory: str | Path, extension: str, setting: str) -> Datalist:
    """The files of a folder that end in ``extension``, by name; for images that no list names.

    Args:
        directory: The folder, local or a URL.
        extension: Such as ``'.png'``.
        setting: Argument that names the folder, for messages.

    Raises:
        FileNotFoundError: It holds no such file.
    """
    names = sorted(name.removesuffix(extension) for name in files.list_names(directory) if name.endswith(extension))
    if not names:
        raise FileNotFoundError(f'{setting}={str(directory)!r}: there is no file in it that ends in {extension!r}')
    return Datalist(names)


def _from_lines(path: str) -> Datalist:
    names: list[str] = []
    columns: dict[str, list] = {'bucket_ids': [], 'image_sizes': []}
    for where, record in _records(path):
        names.append(str(_first(record, NAME_KEYS, where)))
        bucket = next((record[key] for key in BUCKET_KEYS if key in record), None)
        found = {'bucket_ids': bucket, 'image_sizes': record.get('image_size')}
        if bucket is not None and not isinstance(bucket, int):
            raise ValueError(f'{where}: the bucket is {bucket!r}, expected a whole number')
        for key, value in found.items():
            if value is None:
                continue
            if len(columns[key]) != len(names) - 1:
                raise ValueError(f'{where}: has {_called(key)}, which lines before it have not')
            columns[key].append(_size(value, where) if key == 'image_sizes' else value)
        for key, values in columns.items():
            if values and len(values) != len(names):
                raise ValueError(f'{where}: lacks {_called(key)}, which lines before it have')
    return Datalist(names, columns['bucket_ids'] or None, columns['image_sizes'] or None)


def _records(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f'{path}, line {number}'
        record = _parsed(line, where)
        if not isinstance(record, dict):
            raise ValueError(f'{where}: expected an object with {" or ".join(NAME_KEYS)}, found {line.strip()!r}')
        yield where, record


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{where}: is no JSON: {error}') from error


def _first(record: Mapping[str, Any], keys: tuple[str, ...], where: str) -> Any:
    for key in keys:
        if key in record:
            return record[key]
    raise ValueError(f'{where}: expected {" or ".join(keys)}, found {sorted(record)}')


def _size(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
        raise ValueError(f'{where}: image_size is {value!r}, expected [height, width]')
    return value[0], value[1]


def _called(column: str) -> str:
    return 'a bucket' if column == 'bucket_ids' else 'image_size'
