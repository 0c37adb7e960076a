"""Config files: bases, templates, options, and the dump that reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import dump_config, load_config, merge, resolved_text
from lakonlab.config.options import apply_options, parse_options

PUBLISHED_STYLE = Path(__file__).parents[1] / 'data' / 'published_style_digits.py'


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def test_child_is_merged_over_base(write):
    write('base.py', "data = dict(train=dict(type='A', size=3), workers_per_gpu=2)\nmetrics = [1, 2]\ntotal_iters = 5")
    cfg = load_config(write('child.py', "_base_ = './base.py'\ndata = dict(train=dict(size=4))\nmetrics = [3]"))
    assert isinstance(cfg, Config)
    assert cfg.data.train == {'type': 'A', 'size': 4}
    assert cfg.data.workers_per_gpu == 2
    assert cfg.metrics == [3]
    assert cfg.total_iters == 5
    assert cfg.name == 'child'


def test_delete_replaces_what_the_base_has(write):
    write('base.py', "model = dict(type='A', a=1, inner=dict(x=1))")
    cfg = load_config(write('child.py', "_base_ = ['base.py']\nmodel = dict(_delete_=True, type='B', inner=dict(y=2))"))
    assert cfg.model == {'type': 'B', 'inner': {'y': 2}}


def test_bases_that_share_a_dict_are_merged(write):
    write('ddp.py', "model = dict(diffusion=dict(denoising=dict(torch_dtype='bfloat16')))")
    write('text_encoder.py', "model = dict(text_encoder=dict(type='T'), diffusion=dict(num_timesteps=1))")
    cfg = load_config(write('child.py', "_base_ = ['ddp.py', 'text_encoder.py']\nmodel = dict(type='W')"))
    assert cfg.model == {
        'type': 'W',
        'diffusion': {'denoising': {'torch_dtype': 'bfloat16'}, 'num_timesteps': 1},
        'text_encoder': {'type': 'T'},
    }


def test_bases_that_contradict_each_other_are_refused(write):
    write('a.py', 'model = dict(diffusion=dict(num_timesteps=1))')
    write('b.py', 'model = dict(diffusion=dict(num_timesteps=1000))')
    with pytest.raises(ConfigError, match=r'model\.diffusion\.num_timesteps') as error:
        load_config(write('child.py', "_base_ = ['a.py', 'b.py']"))
    assert 'a.py' in str(error.value)
    assert 'b.py' in str(error.value)
    assert '1000' in str(error.value)


def test_bases_may_agree(write):
    write('root.py', 'seed = 3')
    write('a.py', "_base_ = 'root.py'\nx = 1")
    write('b.py', "_base_ = 'root.py'\ny = 2")
    cfg = load_config(write('child.py', "_base_ = ['a.py', 'b.py']"))
    assert (cfg.seed, cfg.x, cfg.y) == (3, 1, 2)


def test_values_of_bases_in_templates(write):
    write('base.py', "item = dict(a=[1, 2])\nnumber = 7\nword = 'blue'")
    cfg = load_config(
        write(
            'child.py',
            "_base_ = 'base.py'\n"
            'copied = {{ _base_.item.a }}\n'
            'plain = _base_.number + 1\n'
            "phrase = 'so {{_base_.word}}'\n"
            "name = '{{ fileBasenameNoExtension }}'\n"
            "work_dir = f'work_dirs/{name}'\n"
            'copied.append(3)\n',
        )
    )
    assert (cfg.copied, cfg.plain, cfg.phrase) == ([1, 2, 3], 8, 'so blue')
    assert cfg.work_dir == 'work_dirs/child'
    assert cfg.item.a == [1, 2]


def test_helpers_that_are_no_data_are_dropped(write):
    cfg = load_config(
        write(
            'helpers.py',
            'import math\n'
            'def double(x):\n    return 2 * x\n'
            'evaluation = []\n'
            'for step in (1, 2):\n    evaluation.append(dict(interval=double(step)))\n'
            'radius = math.pi\n',
        )
    )
    assert 'math' not in cfg
    assert 'double' not in cfg
    assert cfg.step == 2
    assert [entry.interval for entry in cfg.evaluation] == [2, 4]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ("_base_ = 'absent.py'", 'absent.py'),
        ("_base_ = 'bad.py'", 'circle'),
        ('model = dict(', 'line 1'),
        ('x = 1\ny = undefined', 'line 2: NameError'),
        ('import torch\nmodel = dict(dtype=torch.float32)', r'model\.dtype: found a dtype'),
        ('text = 3', "'text' cannot be used"),
        ('_base_ = []\nx = {{ _base_.y }}', "no 'y'"),
    ],
)
def test_files_that_cannot_be_used(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write('bad.py', text))


def test_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match='absent'):
        load_config(tmp_path / 'absent.py')


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('a=1', 1),
        ('a=1e-3', 1e-3),
        ('a=true', True),
        ('a=None', None),
        ('a=word', 'word'),
        ('a=x=y', 'x=y'),
        ('a=1,b,2.5', [1, 'b', 2.5]),
        ('a=[1,2]', [1, 2]),
        ('a=[x,(1,2)]', ['x', (1, 2)]),
        ('a=(0.9,0.95)', (0.9, 0.95)),
        ("a='1'", '1'),
        ("a={'b': 1}", {'b': 1}),
        ('a=checkpoints/x/latest', 'checkpoints/x/latest'),
        ('a=', ''),
    ],
)
def test_option_values(text, value):
    assert parse_options([text]) == {'a': value}


def test_options_reach_into_lists_and_make_dicts():
    values = {'evaluation': [{'viz_num': 1}, {'viz_num': 2}], 'model': {'type': 'A'}}
    changed = apply_options(values, {'evaluation.1.viz_num': 8, 'train_cfg.nfe': 2, 'evaluation.0.new.deep': 3})
    assert changed['evaluation'] == [{'viz_num': 1, 'new': {'deep': 3}}, {'viz_num': 8}]
    assert changed['train_cfg'] == {'nfe': 2}
    assert values['evaluation'][1]['viz_num'] == 2


@pytest.mark.parametrize('key', ['evaluation.2.viz_num', 'evaluation.x.viz_num', 'model.type.name'])
def test_options_that_lead_nowhere(key):
    with pytest.raises(ConfigError, match=key):
        apply_options({'evaluation': [{}, {}], 'model': {'type': 'A'}}, {key: 1})


def test_option_without_value():
    with pytest.raises(ConfigError, match='key=value'):
        parse_options(['train_cfg.nfe'])


@pytest.mark.parametrize(('key', 'message'), [('save_interval', 'helper variable'), ('trian_cfg.nfe', 'train_cfg')])
def test_options_that_would_have_no_effect(key, message):
    with pytest.raises(ConfigError, match=message):
        load_config(PUBLISHED_STYLE, {key: 1})


def test_dump_reads_back(tmp_path):
    cfg = load_config(PUBLISHED_STYLE, {'evaluation.0.viz_num': 8})
    again = load_config(dump_config(cfg, tmp_path / 'runs' / 'dumped.py'))
    assert again.to_dict() == cfg.to_dict()
    assert again.evaluation[0].viz_num == 8
    assert isinstance(cfg.pretty_text, str)


names = st.from_regex(r'[a-z][a-z0-9]{0,4}', fullmatch=True).map(lambda name: f'key_{name}')
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
trees = st.recursive(
    scalars,
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(names | st.sampled_from(['class', 'a b', 'x.y']), children, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(names, trees, max_size=4))
def test_any_plain_values_survive_the_dump(values):
    scope: dict = {}
    exec(resolved_text(Config(values)), scope)
    assert {key: scope[key] for key in values} == values


@given(st.dictionaries(names, trees, max_size=4), st.dictionaries(names, trees, max_size=4))
def test_merging_keeps_what_the_child_says(base, child):
    merged = merge(base, child)
    assert set(merged) == set(base) | set(child)
    assert merge(merged, child) == merged
    assert merge({}, base) == base == merge(base, {})


@pytest.mark.parametrize('section', ['data', 'data.train_dataloader', 'data.val_dataloader'])
def test_options_of_published_loaders(section, caplog):
    path = Path(__file__).parents[2] / 'configs' / 'digits' / 'dit_digits_teacher.py'
    with pytest.raises(ConfigError, match=rf"{section}\.sampler: found 'Mine'.*a function of the seed"):
        check_config(load_config(path, {f'{section}.sampler': 'Mine'}))
    with caplog.at_level('INFO', 'lakonlab'):
        check_config(load_config(path, {f'{section}.sampler': None, f'{section}.drop_last': True}))
    assert f'{section}.drop_last (training has no incomplete batch' in caplog.text
