"""Prompts as text: the rows of a data set of the Hugging Face library, to be embedded by the model's text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lakonlab.datasets.prompt_record import PromptRecord
from lakonlab.storage.fetch import fetch

SIZE_COLUMNS = ('frames', 'height', 'width')
ARGUMENTS_COLUMN = 'prompt_kwargs'
TEXT_COLUMN = 'text'


class PromptRows:
    """The rows of a prompt data set.

    Args:
        load_kwargs: Arguments of ``datasets.load_dataset``; files that ``data_files`` names may be URLs.
        prompt_key: Column of the prompts. Rows may bring ``prompt_kwargs``, all arguments of the text encoder, instead,
            and ``height``, ``width`` and ``frames`` of the sample in pixels.

    Raises:
        ImportError: The package ``datasets`` is missing.
        ValueError: The data set has no such column, or its length is not known.
    """

    def __init__(self, load_kwargs: Mapping[str, Any], prompt_key: str):
        rows = load_rows(load_kwargs)
        names = list(rows.column_names or ())
        if load_kwargs.get('path') == TEXT_COLUMN and prompt_key not in names:
            rows = rows.rename_column(TEXT_COLUMN, prompt_key)
            names = list(rows.column_names)
        if prompt_key not in names and ARGUMENTS_COLUMN not in names:
            raise ValueError(
                f'prompt_key={prompt_key!r}: {load_kwargs.get("path")!r} has no such column, and no '
                f'{ARGUMENTS_COLUMN!r} either, only {", ".join(map(repr, names))}'
            )
        known = (prompt_key, ARGUMENTS_COLUMN, *SIZE_COLUMNS)
        self.rows = rows.select_columns([name for name in names if name in known])
        self.prompt_key = prompt_key

    def __len__(self) -> int:
        return len(self.rows)

    def records(self, indices: Sequence[int]) -> list[PromptRecord]:
        """The prompts of several rows."""
        return [self[index] for index in indices]

    def __getitem__(self, index: int) -> PromptRecord:
        """The prompt of one row."""
        row = self.rows[int(index)]
        arguments = row.get(ARGUMENTS_COLUMN)
        if arguments is None:
            arguments = {'prompt': row[self.prompt_key]}
        prompt = row.get(self.prompt_key)
        size = tuple(row[name] for name in SIZE_COLUMNS if row.get(name) is not None)
        return PromptRecord(
            prompt=arguments.get('prompt', '') if prompt is None else prompt,
            conditions={'prompt_kwargs': dict(arguments)},
            sample_size=size if len(size) > 1 else None,
        )

    @cached_property
    def bucket_ids(self) -> np.ndarray | None:
        """Number of the size of every row among all that occur, in order; None if rows have no sizes."""
        columns = [name for name in SIZE_COLUMNS if name in self.rows.column_names]
        if not columns:
            return None
        sizes = np.stack([np.asarray(self.rows[name][:], dtype=np.int64) for name in columns], axis=1)
        return np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)


def load_rows(load_kwargs: Mapping[str, Any]):
    """Load a data set of the Hugging Face library; of several splits ``train``, or the first one.

    Args:
        load_kwargs: Arguments of ``datasets.load_dataset``.

    Raises:
        ImportError: The package ``datasets`` is missing.
        ValueError: Its length is not known.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'prompt_dataset_kwargs needs the package datasets, which is not installed: pip install "lakonlab[datasets]"'
        ) from error

    options = dict(load_kwargs)
    if options.get('data_files') is not None:
        options['data_files'] = as_local(options['data_files'])
    loaded = datasets.load_dataset(**options)
    if isinstance(loaded, Mapping):
        loaded = loaded['train'] if 'train' in loaded else next(iter(loaded.values()))
    if not hasattr(loaded, '__len__'):
        raise ValueError(
            f'prompt_dataset_kwargs={dict(load_kwargs)!r}: the data set is streamed, so it has no length; leave out '
            'streaming=True'
        )
    return loaded


def as_local(data_files: Any) -> Any:
    """Files that may be URLs as local ones; also in lists and dicts."""
    if isinstance(data_files, (str, Path)):
        return str(fetch(data_files))
    if isinstance(data_files, Mapping):
        return {key: as_local(value) for key, value in data_files.items()}
    if isinstance(data_files, Sequence):
        return [as_local(value) for value in data_files]
    raise ValueError(f'prompt_dataset_kwargs.data_files={data_files!r}: expected a path, or a list or dict of paths')
