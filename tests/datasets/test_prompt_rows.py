"""Prompts by the Hugging Face library, from files."""

import json
import pickle
import sys

import pytest

from lakonlab.datasets.prompt_rows import PromptRows, as_local
from tests.datasets.prompt_files import json_source, row_source, text_source


def test_lines_of_a_text_are_prompts(tmp_path):
    rows = PromptRows(text_source(tmp_path, ['one', 'two words', 'drei äöü']), 'prompt')
    assert [rows[i].prompt for i in range(len(rows))] == ['one', 'two words', 'drei äöü']
    assert [record.prompt for record in rows.records([2, 0])] == ['drei äöü', 'one']
    assert rows.bucket_ids is None
    assert pickle.loads(pickle.dumps(rows))[1].prompt == 'two words'


def test_of_several_splits_training_or_the_first(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / f'{name}.txt').write_text(name)
    kwargs = row_source(tmp_path, 'text', 'a.txt')
    files = {'validation': str(tmp_path / 'b.txt'), 'train': [str(tmp_path / 'a.txt')]}
    assert PromptRows({**kwargs, 'data_files': files}, 'prompt')[0].prompt == 'a'
    files = {'validation': str(tmp_path / 'b.txt'), 'test': str(tmp_path / 'a.txt')}
    assert PromptRows({**kwargs, 'data_files': files}, 'prompt')[0].prompt == 'b'
    assert len(PromptRows({**kwargs, 'split': 'train'}, 'prompt')) == 1


def test_other_columns_are_left_aside(tmp_path):
    rows = PromptRows(json_source(tmp_path, [dict(caption='a', blob='x' * 1000, height=8, width=16)]), 'caption')
    assert sorted(rows.rows.column_names) == ['caption', 'height', 'width']
    assert rows[0].sample_size == (8, 16)


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"prompt_key='prompt': 'json' has no such column.*only 'caption'"):
        PromptRows(json_source(tmp_path, [dict(caption='a')]), 'prompt')


def test_a_stream_has_no_length(tmp_path):
    with pytest.raises(ValueError, match='streamed'):
        PromptRows({**text_source(tmp_path), 'streaming': True}, 'prompt')


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='none'):
        PromptRows(row_source(tmp_path, 'text', 'none.txt'), 'prompt')


def test_files_may_be_urls(tmp_path, monkeypatch):
    monkeypatch.setattr('lakonlab.datasets.prompt_rows.fetch', lambda path: f'local/{path}')
    assert as_local({'train': ['s3://a/b', 'c'], 'val': 'd'}) == {
        'train': ['local/s3://a/b', 'local/c'],
        'val': 'local/d',
    }
    with pytest.raises(ValueError, match='data_files=3'):
        as_local(3)


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ImportError, match=r'pip install "lakonlab\[datasets\]"'):
        PromptRows(text_source(tmp_path), 'prompt')


def test_arguments_of_the_text_encoder(tmp_path):
    rows = PromptRows(
        json_source(tmp_path, [dict(prompt='name', prompt_kwargs=dict(prompt='a', prompt_2='b'))]), 'prompt'
    )
    record = rows[0]
    assert record.prompt == 'name'
    assert record.conditions == {'prompt_kwargs': {'prompt': 'a', 'prompt_2': 'b'}}
    assert json.dumps(record.conditions)
