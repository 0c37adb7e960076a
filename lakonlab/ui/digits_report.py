"""The report of the digits demo: every number in it is read from the ``results.json`` files of the runs.

:func:`collect` reads, :func:`check_targets` compares with what is expected, :func:`write_report` writes ``report.html``
(one file, nothing loaded from anywhere), ``report.md`` and ``digits.png``.
"""

from __future__ import annotations

import base64
import html
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lakonlab.ui.charts import line_chart

TEACHER = 'dit_digits_teacher'
ONE_STEP = 'gmdit_k8_digits_piid_1step'
TWO_STEP = 'gmdit_k8_digits_piid_2step'
DX_ONE_STEP = 'dxdit_n10_digits_piid_1step'
DATA_FREE = 'gmdit_k8_digits_datafree_piid_2step'
STUDENTS = {
    ONE_STEP: 'one-step student (GMFlow policy)',
    TWO_STEP: 'two-step student (GMFlow policy)',
    DX_ONE_STEP: 'one-step student (DX policy)',
    DATA_FREE: 'two-step student (GMFlow policy, trained without data)',
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        label: What was measured.
        config: Name of the config whose run measured it.
        evaluation: Name of the evaluation.
    """

    label: str
    config: str
    evaluation: str


ROWS = (
    Row('real digits (training images)', TEACHER, 'train_real'),
    *(Row(f'teacher, {n} Euler step{"s" if n > 1 else ""}', TEACHER, f'val_euler{n}') for n in (32, 8, 4, 2, 1)),
    *(Row(label, config, 'val_student') for config, label in STUDENTS.items()),
)
COLUMNS = {  # name in results.json -> heading, format
    'nfe': ('steps', '{:.0f}'),
    'frechet_distance': ('Fréchet distance', '{:.3f}'),
    'class_accuracy': ('class accuracy', '{:.2%}'),
    'feature_diversity': ('diversity', '{:.3f}'),
    'reference_rmse': ('RMSE to solved teacher', '{:.4f}'),
    'samples_per_second': ('samples/s', '{:.0f}'),
}
SHOWN = (  # in the picture
    ('teacher, 1 step', TEACHER, 'val_euler1'),
    ('teacher, 4 steps', TEACHER, 'val_euler4'),
    ('teacher, 32 steps', TEACHER, 'val_euler32'),
    ('one-step student', ONE_STEP, 'val_student'),
    ('two-step student', TWO_STEP, 'val_student'),
)


@dataclass
class SeedResults:
    """What one seed's runs left behind.

    Args:
        seed: The seed.
        results: Config name -> content of ``results.json``.
        curves: Config name -> (iteration, loss) of the training log.
        seconds: Phase -> wall time.
        commands: Phase -> command line.
    """

    seed: int
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)

    def evaluation(self, config: str, name: str) -> dict[str, Any] | None:
        """An evaluation of a run, or None if that was not made."""
        evaluations = self.results.get(config, {}).get('evaluations', ())
        return next((entry for entry in evaluations if entry['name'] == name), None)

    def number(self, row: Row, column: str) -> float | None:
        """One number of the table, or None if it was not measured."""
        entry = self.evaluation(row.config, row.evaluation)
        if entry is None:
            return None
        return entry.get('nfe') if column == 'nfe' else entry['metrics'].get(column)


def collect(
    seed: int, run_names: Mapping[str, str], seconds: Mapping[str, float], commands: Mapping[str, str]
) -> SeedResults:
    """Read the results and training logs of one seed.

    Args:
        seed: The seed.
        run_names: Config name -> name of its run, whose folder is ``work_dirs/<run>``.
        seconds: Phase -> wall time.
        commands: Phase -> command line.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: A run has no ``results.json``.
    """
    found = SeedResults(seed, seconds=dict(seconds), commands=dict(commands))
    for config, run in run_names.items():
        folder = Path('work_dirs') / run
        found.results[config] = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
        found.curves[config] = read_curve(folder / 'scalars.json')
    return found


def read_curve(path: Path, name: str = 'loss_diffusion') -> list[tuple[float, float]]:
    """Read one scalar from a log of JSON lines.

    Args:
        path: The log; an iteration that was repeated after an interruption counts once.
        name: The scalar.

    Returns:
        Points (iteration, value) in order; none if there is no log.
    """
    if not path.is_file():
        return []
    points = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        if line.endswith('}'):  # the last line may have been cut by a crash
            entry = json.loads(line)
            if name in entry:
                points[entry['step']] = entry[name]
    return sorted(points.items())


@dataclass(frozen=True)
class Target:
    """Something the demo is expected to reach.

    Args:
        text: What.
        values: Measured values, one per seed.
        limits: What they are compared with, one per seed.
        at_least: Whether larger is better.
    """

    text: str
    values: tuple[float, ...]
    limits: tuple[float, ...]
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether every seed reaches it."""
        pairs = zip(self.values, self.limits, strict=True)
        return all(value >= limit if self.at_least else value <= limit for value, limit in pairs)

    def __str__(self) -> str:
        pairs = zip(self.values, self.limits, strict=True)
        sign = '>=' if self.at_least else '<='
        numbers = ', '.join(f'{value:.4g} {sign} {limit:.4g}' for value, limit in pairs)
        return f'{"met    " if self.met else "NOT MET"}  {self.text}: {numbers}'


def check_targets(seeds: Sequence[SeedResults]) -> list[Target]:
    """Compare results with what the demo should reach.

    Args:
        seeds: Results of each seed.

    Returns:
        The targets that concern what was measured.
    """
    rows = {(row.config, row.evaluation): row for row in ROWS}

    def numbers(config: str, column: str, evaluation: str = 'val_student') -> tuple[float, ...]:
        values = (seed.number(rows[config, evaluation], column) for seed in seeds)
        return tuple(value for value in values if value is not None)

    targets = []

    def add(text: str, values: tuple[float, ...], limits: tuple[float, ...] | float, at_least: bool = False) -> None:
        if values:
            limits = limits if isinstance(limits, tuple) else (limits,) * len(values)
            targets.append(Target(text, values, limits, at_least))

    distance = numbers(ONE_STEP, 'frechet_distance')
    solved, one_euler = (numbers(TEACHER, 'frechet_distance', f'val_euler{steps}') for steps in (32, 1))
    add('one-step distance, 1.3 x the teacher at 32 steps', distance, tuple(1.3 * value for value in solved))
    add('one-step distance, 1/10 of the teacher at 1 step', distance, tuple(value / 10 for value in one_euler))
    for config, limit in ((ONE_STEP, 0.125), (TWO_STEP, 0.08), (DX_ONE_STEP, 0.15)):
        add(f'{STUDENTS[config]}, RMSE to the solved teacher', numbers(config, 'reference_rmse'), limit)
    for config, label in STUDENTS.items():
        add(f'{label}, class accuracy', numbers(config, 'class_accuracy'), 0.985, at_least=True)
    return targets


def table(seeds: Sequence[SeedResults]) -> list[list[str]]:
    """The results as text.

    Args:
        seeds: Results of each seed.

    Returns:
        Rows of cells, the headings first; with several seeds, mean ± standard deviation.
    """
    rows = [['', *(heading for heading, _ in COLUMNS.values())]]
    for row in ROWS:
        cells = [_cell([seed.number(row, column) for seed in seeds], form) for column, (_, form) in COLUMNS.items()]
        if any(cells):
            rows.append([row.label, *cells])
    return rows


def _cell(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ''
    text = form.format(statistics.fmean(known))
    if len(known) > 1 and min(known) != max(known):
        text += f' ± {form.format(statistics.stdev(known))}'
    return text


def write_report(seeds: Sequence[SeedResults], out_dir: Path) -> Path:
    """Write the report.

    Args:
        seeds: Results of each seed, at least one; pictures are of the first.
        out_dir: Folder to write to.

    Returns:
        Path of ``report.html``.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    picture = make_picture(seeds[0], out_dir / 'digits.png')
    (out_dir / 'report.md').write_text(_markdown(seeds, picture), encoding='utf-8')
    path = out_dir / 'report.html'
    path.write_text(_html(seeds, picture), encoding='utf-8')
    return path


def make_picture(seed: SeedResults, path: Path, columns: int = 20, factor: int = 4) -> Path | None:
    """Draw samples of several samplers from the same noise, one sampler per row.

    Args:
        seed: Results, with folders of images.
        path: The PNG to write.
        columns: Samples per row.
        factor: Enlargement of a pixel.

    Returns:
        The path; None if there are no images.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    rows = []
    for label, config, name in SHOWN:
        entry = seed.evaluation(config, name)
        files = [Path(entry['images']) / f'{number:09d}.png' for number in range(columns)] if entry else []
        if files and all(file.is_file() for file in files):
            rows.append((label, [np.asarray(Image.open(file).convert('RGB')) for file in files]))
    if not rows:
        return None
    size, gap, margin = rows[0][1][0].shape[0] * factor, 3, 150
    canvas = Image.new('RGB', (margin + columns * (size + gap) + gap, len(rows) * (size + gap) + gap), 'white')
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    for number, (label, images) in enumerate(rows):
        top = gap + number * (size + gap)
        draw.text((margin - 8, top + size // 2), label, fill='black', font=font, anchor='rm')
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (margin + gap + column * (size + gap), top))
    canvas.save(path)
    return path


def _grids(seed: SeedResults) -> list[tuple[str, Path]]:
    """Label and file of every grid of samples."""
    chosen = [(row.label, seed.evaluation(row.config, row.evaluation)) for row in ROWS]
    files = [(label, Path(entry['images']) / 'grid.png') for label, entry in chosen if entry and entry.get('images')]
    return [(label, file) for label, file in files if file.is_file()]


def _protocol(seed: SeedResults) -> list[str]:
    """How the numbers were measured, one fact a line."""
    entry = seed.evaluation(TEACHER, 'val_euler32')
    if entry is None:
        return []
    made = entry.get('made') or {}
    lines = [f'PyTorch {made.get("torch")}, Python {made.get("python")}, {made.get("num_threads")} thread(s)']
    protocol = entry['protocol'].get('FrechetDistance')
    if protocol:
        extractor, reference = protocol['extractor'], protocol['reference']
        lines += [
            f'{protocol["num_images"]} samples, from the same noise for every sampler, 10 classes in turn',
            f'Fréchet distance to {reference["num_images"]} held-out real digits, in features of {extractor["name"]} '
            f'(weights {extractor["weights_sha256"][:16]}); accuracy and diversity from the same network',
            "RMSE over pixels in [-1, 1] to the teacher's 32-step sample from the same noise",
        ]
    return lines


def _introduction(seeds: Sequence[SeedResults]) -> str:
    numbers = ', '.join(str(seed.seed) for seed in seeds)
    spread = ' Numbers are mean ± standard deviation over the seeds.' if len(seeds) > 1 else ''
    return (
        'A small flow-matching teacher is trained on 1,442 real handwritten digits of 8x8 pixels and distilled with '
        f'pi-Flow into students that evaluate their network once or twice per sample. Seeds: {numbers}.{spread}'
    )


def _markdown(seeds: Sequence[SeedResults], picture: Path | None) -> str:
    rows = table(seeds)
    lines = ['# pi-Flow on handwritten digits', '', _introduction(seeds), '']
    if picture is not None:
        lines += [f'![samples from the same noise]({picture.name})', '']
    lines += [f'| {" | ".join(rows[0])} |', f'|---|{"---:|" * len(COLUMNS)}']
    lines += [f'| {" | ".join(row)} |' for row in rows[1:]]
    lines += ['', '## Targets', '', *(f'- {target}' for target in check_targets(seeds))]
    lines += ['', '## Protocol', '', *(f'- {line}' for line in _protocol(seeds[0]))]
    lines += ['', '## Wall time', '', '| phase | seconds |', '|---|---:|']
    lines += [f'| {phase} | {value:.0f} |' for seed in seeds for phase, value in seed.seconds.items()]
    lines += ['', '## Commands', '', '```']
    lines += [command for seed in seeds for command in seed.commands.values()]
    return '\n'.join([*lines, '```', ''])


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
h2 { margin-top: 2em; }
table { border-collapse: collapse; }
td, th { padding: .25em .9em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
.flex { display: flex; flex-wrap: wrap; gap: 1.2em; }
figure { margin: 0; } figcaption { font-size: 13px; }
img { image-rendering: pixelated; max-width: 100%; }
figure img { width: 320px; }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto; font-size: 12px; }
.met { color: #2a7a2a; } .missed { color: #b00020; font-weight: bold; }
svg { background: #fafafa; font: 11px system-ui, sans-serif; } svg .title { font-weight: bold; font-size: 13px; }
svg .grid { stroke: #ddd; }
"""


def _html(seeds: Sequence[SeedResults], picture: Path | None) -> str:
    first = seeds[0]
    head, *body = table(seeds)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>pi-Flow on handwritten digits</title>',
        f'<style>{STYLE}</style></head><body>',
        f'<h1>pi-Flow on handwritten digits</h1>\n<p>{html.escape(_introduction(seeds))}</p>',
    ]
    if picture is not None:
        parts.append(f'<p><img alt="samples from the same noise" src="{_data_uri(picture)}"></p>')
    parts.append('<h2>Results</h2>\n<table><tr>' + ''.join(f'<th>{html.escape(cell)}</th>' for cell in head) + '</tr>')
    parts += ['<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>' for row in body]
    parts.append('</table>\n<ul>' + ''.join(f'<li>{html.escape(line)}</li>' for line in _protocol(first)) + '</ul>')
    parts.append('<h2>Targets</h2>\n<ul>')
    for target in check_targets(seeds):
        parts.append(f'<li class="{"met" if target.met else "missed"}">{html.escape(str(target))}</li>')
    parts.append('</ul>\n<h2>Samples from the same noise</h2>\n<div class="flex">')
    for label, file in _grids(first):
        parts.append(
            f'<figure><img alt="{html.escape(label)}" src="{_data_uri(file)}">'
            f'<figcaption>{html.escape(label)}</figcaption></figure>'
        )
    parts.append('</div>\n<h2>Training loss</h2>\n<div class="flex">')
    students = {STUDENTS[config]: curve for config, curve in first.curves.items() if config in STUDENTS}
    parts.append(line_chart('teacher: flow matching', {'teacher': first.curves.get(TEACHER, [])}))
    parts.append(line_chart('students: imitation of the teacher', students))
    parts.append('</div>\n<h2>Wall time</h2>\n<table><tr><th>phase</th><th>seconds</th></tr>')
    for seed in seeds:
        parts += [f'<tr><td>{html.escape(phase)}</td><td>{v:.0f}</td></tr>' for phase, v in seed.seconds.items()]
    commands = '\n'.join(command for seed in seeds for command in seed.commands.values())
    parts.append(f'</table>\n<h2>Commands</h2>\n<pre>{html.escape(commands)}</pre>\n</body></html>\n')
    return '\n'.join(parts)


def _data_uri(path: Path) -> str:
    return 'data:image/png;base64,' + base64.b64encode(path.read_bytes()).decode('ascii')
