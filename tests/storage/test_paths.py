"""Paths as text."""

from pathlib import Path

import pytest

from lakonlab.storage.errors import StorageError
from lakonlab.storage.paths import (
    is_remote,
    join,
    name_of,
    normal,
    parent_of,
    scheme_of,
    sibling,
    split_digest,
    without_scheme,
)

DIGEST = 'a' * 64


@pytest.mark.parametrize(
    ('path', 'scheme'),
    [
        ('run', 'file'),
        ('/a/b', 'file'),
        ('C:/run', 'file'),
        ('work_dirs/a:b', 'file'),
        ('tmp:/a', 'file'),
        ('file:///a', 'file'),
        ('tmp:s3://bucket/a', 's3'),
        ('S3://bucket/a', 's3'),
        (Path('s3://bucket/a'), 's3'),
        ('https://host/a', 'https'),
    ],
)
def test_scheme(path, scheme):
    assert scheme_of(path) == scheme
    assert is_remote(path) == (scheme != 'file')


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        (Path('s3://bucket/a'), 's3://bucket/a'),
        ('s3://bucket/a/', 's3://bucket/a'),
        ('tmp:/a/b', '/a/b'),
        ('tmp:s3://bucket/a', 's3://bucket/a'),
        ('file:///a/b', '/a/b'),
        ('http://h/a?b=c/', 'http://h/a?b=c/'),
        (f's3://b/a#sha256={DIGEST}', 's3://b/a'),
        ('s3://b/a#b', 's3://b/a#b'),
        ('~', str(Path.home())),
    ],
)
def test_normal_spelling(path, expected):
    assert normal(path) == expected


def test_parts():
    assert join('s3://b/x/', 'y/z') == 's3://b/x/y/z'
    assert join('a', 'b', 'c') == str(Path('a/b/c'))
    assert join('http://h/x?k=1', 'y') == 'http://h/x/y?k=1'
    assert parent_of('s3://b/x/y') == 's3://b/x'
    assert parent_of('s3://b/x') == 's3://b'
    assert parent_of('s3://b') == 's3://b'
    assert parent_of('http://h/x/y?k=1') == 'http://h/x?k=1'
    assert parent_of('/a/b') == str(Path('/a'))
    assert name_of('huggingface://o/r/x/y.bin') == 'y.bin'
    assert name_of('http://h/x/y.bin?k=a/b') == 'y.bin'
    assert name_of('a/b') == 'b'


def test_without_scheme():
    assert without_scheme('s3://b/x/') == 'b/x'
    assert without_scheme(Path('huggingface://o/r@v1')) == 'o/r@v1'  # which loses a slash
    assert without_scheme('HuggingFace://o/r') == 'o/r'


def test_siblings(tmp_path):
    assert sibling(tmp_path / 'a.index.json', 'b.bin') == str(tmp_path / 'b.bin')
    assert sibling('http://h/x/a.index.json?k=1', 'b.bin') == 'http://h/x/b.bin?k=1'
    assert sibling('huggingface://o/r/x/a.index.json', 'b.bin') == 'huggingface://o/r/x/b.bin'


@pytest.mark.parametrize('name', ['../b', '/b', 'a/../../b'])
@pytest.mark.parametrize('folder', ['s3://b/x', 'http://h/x', '/x'])
def test_names_that_lead_out(name, folder):
    with pytest.raises(StorageError, match='is not in its folder'):
        join(folder, name)


def test_digests():
    assert split_digest(f'http://h/a#sha256={"A" * 64}') == ('http://h/a', DIGEST)
    assert split_digest('http://h/a#sha256=12') == ('http://h/a#sha256=12', None)
