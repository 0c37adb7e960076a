"""A resolved config is read back without running anything."""

import math
from pathlib import Path

import pytest
from mmengine.config import Config

from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config, resolved_text
from lakonlab.config.resolved import parse_resolved

CONFIGS = sorted((Path(__file__).parents[2] / 'configs').glob('[!_]*/[!_]*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_read_back(path):
    cfg = load_config(path)
    assert parse_resolved(resolved_text(cfg), 'here') == cfg.to_dict()


def test_all_kinds_of_values():
    values = dict(a=[1, (2.5,), ()], b={'x y': -math.inf, 3: None}, c=dict(d=True, e='f\n"'), g=-1, h=1e-7)
    assert parse_resolved(resolved_text(Config(values)), 'here') == values
    assert math.isnan(parse_resolved("x = float('nan')", 'here')['x'])


@pytest.mark.parametrize(
    'text',
    [
        "x = __import__('os').getcwd()",
        "x = open('file')",
        'import os',
        'x = dict([(1, 2)])',
        'x = dict(**{})',
        'x = {**{}}',
        'x = [i for i in (1, 2)]',
        'x.y = 3',
        'x = 1 +',
        'x = name',
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match='checkpoint iter_1: its config is damaged'):
        parse_resolved(text, 'checkpoint iter_1')
