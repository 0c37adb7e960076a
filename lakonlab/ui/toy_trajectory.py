"""The picture of a toy experiment on trajectories: what a teacher and a policy do to the same noise, and its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

CELL, LABEL_WIDTH, CURVE_WIDTH, CURVE_HEIGHT = 1.0, 1.5, 4.2, 4.0  # inches
COLOURS = ('#555753', '#cc4b00', '#3465a4')
SMOOTHED_PARTS = 200


def trajectory_picture(
    rows: Mapping[str, Tensor],
    sigmas: Sequence[float],
    errors: Mapping[str, Sequence[float]],
    error_sigmas: Sequence[float],
    path: str | Path,
) -> None:
    """Draw images along time, a row per thing, and beside them how far trajectories are from the teacher's.

    Args:
        rows: Label -> images (T, C, H, W) in [0, 1] with one or three channels.
        sigmas: Noise levels of the T columns.
        errors: Label -> distance to the teacher's trajectory at each of ``error_sigmas``.
        error_sigmas: Noise levels.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    height, width = next(iter(rows.values())).shape[-2:]
    cell_width, columns = CELL * width / height, len(sigmas)
    left = LABEL_WIDTH + columns * cell_width
    total_width, total_height = left + CURVE_WIDTH, max(len(rows) * CELL + 0.4, 2.6)
    figure = Figure(figsize=(total_width, total_height), dpi=100)

    def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        """Inches from the top left corner to what matplotlib takes."""
        return x / total_width, 1 - (y + h) / total_height, w / total_width, h / total_height

    for row, (label, images) in enumerate(rows.items()):
        top = 0.35 + row * CELL
        for column, image in enumerate(images):
            axes = figure.add_axes(
                box(LABEL_WIDTH + column * cell_width, top, cell_width - 0.05, CELL - 0.05), xticks=[], yticks=[]
            )
            axes.imshow(_pixels(image), interpolation='nearest', vmin=0, vmax=1)
            if row == 0:
                axes.set_title(rf'$\sigma$ = {sigmas[column]:.2g}', fontsize=8)
            if column == 0:
                axes.set_ylabel(label, rotation=0, ha='right', va='center', multialignment='right', fontsize=8)

    axes = figure.add_axes(box(left + 0.7, 0.35, CURVE_WIDTH - 0.85, min(total_height, CURVE_HEIGHT) - 0.85))
    for (label, values), colour in zip(errors.items(), COLOURS):
        axes.plot(error_sigmas, values, label=label, color=colour)
    axes.set(xlabel=r'noise level $\sigma$', xlim=(1, 0), ylim=(0, None))
    axes.set_title("RMSE to the teacher's trajectory", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path)


def loss_picture(losses: Sequence[float], path: str | Path) -> None:
    """Draw the loss of every iteration, and its mean over stretches of iterations.

    Args:
        losses: A positive loss per iteration.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=100, layout='constrained')
    axes = figure.add_subplot()
    iterations = np.arange(1, len(losses) + 1)
    axes.plot(iterations, losses, color=COLOURS[0], alpha=0.35, linewidth=0.6, label='each iteration')
    parts = min(SMOOTHED_PARTS, len(losses))
    means = [(part_i.mean(), part.mean()) for part_i, part in _parts(iterations, np.asarray(losses), parts)]
    axes.plot(*zip(*means), color=COLOURS[1], label=f'mean of about {len(losses) / parts:.0f}')
    axes.set(xlabel='iteration', ylabel='imitation loss', yscale='log')
    axes.legend(fontsize=8)
    figure.savefig(path)


def _parts(iterations: np.ndarray, losses: np.ndarray, count: int):
    return zip(np.array_split(iterations, count), np.array_split(losses, count))


def _pixels(image: Tensor) -> np.ndarray:
    return image.detach().float().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
