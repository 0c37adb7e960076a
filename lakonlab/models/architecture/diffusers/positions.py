"""Where tokens are: the position arguments of transformers of the diffusers library, by configuration.

A config maps the name of an argument to ``dict(kind=..., ...)``; :data:`POSITION_KINDS` lists the kinds. Positions are
in float32 whatever the network computes in: bfloat16 does not tell whole numbers above 256 apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """What positions depend on."""

    batch_size: int
    rows: int
    """Rows of image tokens."""
    columns: int
    """Columns of image tokens."""
    text_length: int
    device: torch.device


def image_positions(layout: Layout, width: int = 3, row: int = 1, column: int = 2) -> Tensor:
    """A vector per image token, ``(rows * columns, width)``, zero but for its row and its column.

    Args:
        layout: Sizes.
        width: Length of a vector.
        row: Which entry holds the row.
        column: Which entry holds the column.
    """
    positions = torch.zeros(layout.rows, layout.columns, width, device=layout.device)
    positions[..., row] = torch.arange(layout.rows, device=layout.device).unsqueeze(1)
    positions[..., column] = torch.arange(layout.columns, device=layout.device)
    return positions.flatten(0, 1)


def text_positions(layout: Layout, width: int = 3, index: int | None = None) -> Tensor:
    """A vector per text token, ``(text_length, width)``, zero but for its index.

    Args:
        layout: Sizes.
        width: Length of a vector.
        index: Which entry holds the index of the token; None for zeros only.
    """
    positions = torch.zeros(layout.text_length, width, device=layout.device)
    if index is not None:
        positions[:, index] = torch.arange(layout.text_length, device=layout.device)
    return positions


def image_shapes(layout: Layout) -> list[list[tuple[int, int, int]]]:
    """Frames, rows and columns of every sample's tokens."""
    return [[(1, layout.rows, layout.columns)]] * layout.batch_size


POSITION_KINDS: dict[str, Callable[..., Any]] = {
    'image': image_positions,
    'text': text_positions,
    'image_shapes': image_shapes,
}


def make_positions(positions: Mapping[str, Mapping[str, Any]], layout: Layout) -> dict[str, Any]:
    """The position arguments of one forward pass.

    Args:
        positions: Argument -> ``dict(kind=..., ...)``.
        layout: Sizes.
    """
    arguments = {}
    for name, options in positions.items():
        options = dict(options)
        arguments[name] = POSITION_KINDS[options.pop('kind')](layout, **options)
    return arguments


def check_positions(positions: Mapping[str, Mapping[str, Any]]) -> None:
    """Try positions out.

    Raises:
        ValueError: A kind is unknown or its arguments do not fit.
    """
    example = Layout(1, 2, 2, 3, torch.device('cpu'))
    for name, options in positions.items():
        if options.get('kind') not in POSITION_KINDS:
            raise ValueError(
                f'positions.{name}.kind={options.get("kind")!r}: expected one of {", ".join(POSITION_KINDS)}'
            )
        try:
            make_positions({name: options}, example)
        except (TypeError, IndexError) as error:
            raise ValueError(f'positions.{name}={dict(options)}: {error}') from error
