"""Small files of text, and gzipped ones, whose damage is said with their path."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from lakonlab.storage import files


def unzipped(content: bytes, where: str) -> bytes:
    """Unpack a gzip file.

    Args:
        content: The file.
        where: Its path, for messages.

    Raises:
        ValueError: It is damaged, truncated, or none.
    """
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f'{where}: is no whole gzip file: {error}') from error


def decoded(content: bytes, where: str) -> str:
    """Text in UTF-8.

    Args:
        content: The bytes.
        where: Path of the file, for messages.

    Raises:
        ValueError: It is none.
    """
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{where}: is no text in UTF-8: byte {error.start} is {content[error.start]:#04x}') from error


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file.

    Only line feeds end a line: names may hold the other characters at which ``str.splitlines`` splits.

    Args:
        path: The file, local or a URL; gzipped if it ends in ``.gz``.

    Raises:
        MissingFileError: There is no such file.
        ValueError: It is damaged.
    """
    content, where = files.read_bytes(path), str(path)
    return decoded(unzipped(content, where) if where.endswith('.gz') else content, where).split('\n')
