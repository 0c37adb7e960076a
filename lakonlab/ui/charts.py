"""Line charts as inline SVG, which needs neither scripts nor files."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

COLOURS = ('#3465a4', '#cc4b00', '#3d8b37', '#75507b', '#8f5902', '#555753')
WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 28, 34


def line_chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str = 'iteration') -> str:
    """Draw curves with a logarithmic vertical axis.

    Args:
        title: Heading.
        curves: Name -> points (x, y); points whose y is not a positive number are left out.
        x_label: Name of the horizontal axis.

    Returns:
        An ``<svg>`` element; a note if there is nothing to draw.
    """
    kept = {name: [(x, y) for x, y in points if y > 0 and math.isfinite(y)] for name, points in curves.items()}
    points = [point for curve in kept.values() for point in curve]
    if not points:
        return f'<p>{html.escape(title)}: no data</p>'
    x_max = max(x for x, _ in points) or 1
    low, high = math.log10(min(y for _, y in points)), math.log10(max(y for _, y in points))
    margin = max(0.05 * (high - low), 0.02)
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> str:
        across = LEFT + x / x_max * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - math.log10(y)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f'{across:.1f},{down:.1f}'

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        f'<text x="{LEFT}" y="16" class="title">{html.escape(title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(x_label)}</text>',
    ]
    for tick in range(5):
        y = 10 ** (low + (high - low) * tick / 4)
        across, down = place(0, y).split(',')
        parts.append(f'<line x1="{across}" y1="{down}" x2="{WIDTH - RIGHT}" y2="{down}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{float(down) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        x = x_max * tick / 4
        across = place(x, 10**low).split(',')[0]
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:.0f}</text>')
    for number, (name, curve) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = ' '.join(place(x, y) for x, y in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        down = TOP + 10 + 14 * number
        parts.append(
            f'<text x="{WIDTH - RIGHT - 4}" y="{down}" text-anchor="end" fill="{colour}">{html.escape(name)}</text>'
        )
    return '\n'.join([*parts, '</svg>'])
