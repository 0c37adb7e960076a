"""All evaluations of a config, and the file that holds their results."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lakonlab.evaluation.hook import GenerativeEvalHook
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
) -> list[dict[str, Any]]:
    """Run every entry of the section ``evaluation`` once; several processes do so together.

    Args:
        model: Has ``val_step``.
        cfg: The config; ``evaluation``, ``data`` and ``name`` are read.
        tag: Name of the weights, e.g. of the checkpoint; part of the folder names of images.
        splits: Only entries of these data splits; None for all.
        seed: Seed of what the samplers draw beyond the data set's noise.
        ranks: The processes.
        is_divided: Whether the networks of the model are divided among them.

    Returns:
        The results of each entry, in their order, in every process.

    Raises:
        ValueError: No entry is left to run.
    """
    entries = [dict(entry) for entry in cfg.get('evaluation') or () if splits is None or entry.get('data') in splits]
    if not entries:
        raise ValueError(f'evaluation has no entry to run{"" if splits is None else f" for data {list(splits)}"}')
    hooks: list[GenerativeEvalHook] = []
    for entry in entries:
        entry.pop('priority', None)
        hooks.append(HOOKS.build(entry))
    results = []
    for number, hook in enumerate(hooks, start=1):
        if ranks.is_main:
            logger.info('evaluation %d/%d: %s', number, len(hooks), hook.name)
        hook.share(hooks)
        name = cfg.get('name', 'run')
        result, _ = hook.run(model, cfg['data'], name, tag, 'test_dataloader', seed, ranks, is_divided)
        results.append(result)
    return results


def write_results(path: str | Path, evaluations: Sequence[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """Write results as JSON, all or nothing.

    Args:
        path: The file, of any scheme that can be written.
        evaluations: Results of :func:`run_evaluations`.
        **facts: What else a reader must know: name of the run, checkpoint, iteration, seed, config.

    Returns:
        What was written.
    """
    content = dict(
        **facts,
        finished=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        torch=torch.__version__,
        python=platform.python_version(),
        num_threads=torch.get_num_threads(),
        evaluations=list(evaluations),
    )
    files.write_text(path, json.dumps(content, indent=1, default=str) + '\n')
    return content
