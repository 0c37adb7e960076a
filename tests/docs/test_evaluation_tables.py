"""The tables of metrics and of keys of an evaluation are complete."""

import inspect
import re
from pathlib import Path

import pytest

from lakonlab.evaluation.hook import GenerativeEvalHook
from lakonlab.registry import METRICS

DOCS = Path(__file__).parents[2] / 'docs'


def table(file, heading):
    """First cells of the first table below a heading -> the rest of the row."""
    section = (DOCS / file).read_text().partition(f'\n## {heading}')[2].partition('\n## ')[0]
    rows = re.findall(r'^\| *(`.*?) *\|(.*)\|$', section, re.MULTILINE)
    return {name: rest for cell, rest in rows for name in re.findall('`([A-Za-z_0-9]+)`', cell)}


def test_every_metric_has_a_row():
    ours = {name for name in METRICS.names() if METRICS.get(name).__module__.startswith('lakonlab.')}
    assert ours >= {'InceptionMetrics', 'ADMExport'}
    assert ours - set(table('evaluation.md', 'Metrics')) == set()


@pytest.mark.parametrize('name', list(inspect.signature(GenerativeEvalHook).parameters))
def test_every_key_of_an_evaluation_has_a_row_with_its_default(name):
    rows = table('running.md', 'Evaluation')
    default = inspect.signature(GenerativeEvalHook).parameters[name].default
    assert f'`{default!r}`' in rows[name].rpartition('|')[2]
