"""All evaluations of a config, and the file that holds their results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lakonlab.evaluation.entries import run_name
from lakonlab.evaluation.hook import GenerativeEvalHook
from lakonlab.evaluation.plain import finite
from lakonlab.ranks import ALONE, Ranks
from lakonlab.registry import HOOKS
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.evaluation')
RESULTS_FILE = 'results.json'


def run_evaluations(
    model: nn.Module,
    cfg: Mapping[str, Any],
    *,
    tag: str = 'default',
    splits: Sequence[str] | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
    is_divided: bool = False,
    origin: Mapping[str, Any] | None = None,
    reuse: bool = False,
) -> list[dict[str, Any]]:
    """Run every entry of the section ``evaluation`` once; several processes do so together.

    Args:
        model: Has ``val_step``.
        cfg: The config; ``evaluation``, ``data`` and ``work_dir``, or else ``name``, are read.
        tag: Name of the weights, e.g. of the checkpoint; part of the folder names of images.
        splits: Only entries of these data splits; None for all.
        seed: Seed of what the samplers draw beyond the data set's noise.
        ranks: The processes.
        is_divided: Whether the networks of the model are divided among them.
        origin: What the weights are, as plain data; kept with the images.
        reuse: Measure images that an evaluation of the same origin has written, instead of making them again.

    Returns:
        The results of each entry, in their order, in every process.

    Raises:
        ValueError: No entry is left to run, or two have the same name or folder of images.
    """
    entries = [dict(entry) for entry in cfg.get('evaluation') or () if splits is None or entry.get('data') in splits]
    if not entries:
        raise ValueError(f'evaluation has no entry to run{"" if splits is None else f" for data {list(splits)}"}')
    hooks: list[GenerativeEvalHook] = []
    for entry in entries:
        entry.pop('priority', None)
        hooks.append(HOOKS.build(entry))
    for hook in hooks:
        hook.share(hooks)

    def bind() -> None:  # of all, so that what is missing for the last one is found before the first one samples
        for hook in hooks:
            hook.bind()

    ranks.on_main(bind)
    for hook in hooks:
        hook.check(cfg['data'], 'test_dataloader', ranks)
    results = []
    for number, hook in enumerate(hooks, start=1):
        if ranks.is_main:
            logger.info('evaluation %d/%d: %s', number, len(hooks), hook.name)
        name = run_name(cfg['work_dir']) if cfg.get('work_dir') else cfg.get('name', 'run')
        result, _ = hook.run(
            model, cfg['data'], name, tag, 'test_dataloader', seed, ranks, is_divided, origin=origin, reuse=reuse,
            keep_references=hook.compares_like_one_of(hooks[number:]),
        )  # fmt: skip
        results.append(result)
    return results


def write_results(path: str | Path, evaluations: Sequence[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """Write results as JSON, all or nothing, and as a table beside it.

    Args:
        path: The file, of any scheme that can be written; the table has the same name with the suffix ``.md``.
        evaluations: Results of :func:`run_evaluations`.
        **facts: What else a reader must know of all of them: name of the run, checkpoint, iteration, seed, config.

    Returns:
        What was written; numbers that are not finite, which JSON does not have, are texts in it.
    """
    content = finite(dict(**facts, evaluations=list(evaluations)))
    files.write_text(path, json.dumps(content, indent=1, allow_nan=False, default=str) + '\n')
    files.write_text(files.sibling(path, f'{Path(files.name_of(path)).stem}.md'), results_table(content))
    return content


def results_table(content: Mapping[str, Any]) -> str:
    """Results as a table in Markdown: a row for each evaluation, a column for each number.

    Numbers of other samples than all of the row, or of fewer than were asked for, refer to a note below the table.

    Args:
        content: What :func:`write_results` writes.
    """
    evaluations = content['evaluations']
    numbers = list(dict.fromkeys(number for result in evaluations for number in result['metrics']))
    rows = [['evaluation', 'NFE', 'samples', 'quantize', *numbers]]
    notes: list[str] = []
    for result in evaluations:
        values = [_text(result['metrics'].get(number)) for number in numbers]
        for number, note in _restrictions(result).items():
            notes += [note] if note not in notes else []
            values[numbers.index(number)] += f' ({notes.index(note) + 1})'
        facts = [_text(fact) for fact in (result.get('nfe'), result['num_samples'], result.get('quantize'))]
        rows.append([result['name'], *facts, *values])
    rows = [[cell.replace('|', '\\|') for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ['| ' + ' | '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + ' |' for row in rows]
    rule = '|' + '|'.join([':' + '-' * (widths[0] + 1), *('-' * (width + 1) + ':' for width in widths[1:])]) + '|'
    facts = [f'{key}: {content[key]}' for key in ('checkpoint', 'iteration', 'seed') if content.get(key) is not None]
    notes = [f'\n({number}) {note}' for number, note in enumerate(notes, start=1)]
    return '\n'.join([f'# {content.get("name", "results")}', '', *facts, '', lines[0], rule, *lines[1:], *notes]) + '\n'


def _text(cell: Any) -> str:
    return '' if cell is None else f'{cell:.6g}' if isinstance(cell, float) else str(cell)


def _restrictions(result: Mapping[str, Any]) -> dict[str, str]:
    """Numbers that are not of all samples of an evaluation, or of fewer than wanted -> what they are of."""
    found = {}
    for facts in (result.get('protocol') or {}).values():
        counted, wanted = facts.get('num_images'), facts.get('wanted_images')
        if counted is None:
            continue
        if wanted is not None and counted < wanted:
            note = f'of {counted} samples only, where num_images={wanted}: not comparable with numbers of {wanted}'
        elif counted != result['num_samples']:
            note = f'of {counted} samples'
        else:
            continue
        found.update(dict.fromkeys(facts.get('numbers') or (), note))
    return found
