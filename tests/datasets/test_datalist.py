import gzip
import json

import pytest

from lakonlab.datasets.datalist import list_images, read_datalist


def test_lines(tmp_path):
    lines = '{"filename": "a", "size_idx": 3}\n\n{"image_hash": "b", "bucket_id": 4, "other": 1}\n'
    (tmp_path / 'x.jsonl').write_text(lines)
    (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    found = read_datalist(tmp_path / 'x.jsonl', 'setting')
    assert found == read_datalist(tmp_path / 'x.jsonl.gz', 'setting')
    assert (found.names, found.bucket_ids, found.image_sizes) == (['a', 'b'], [3, 4], None)


def test_a_list_of_paths(tmp_path):
    (tmp_path / 'x.json').write_text(json.dumps(['a.png', 'folder/b.c.jpg', 'd']))
    assert read_datalist(str(tmp_path / 'x.json'), 'setting').names == ['a', 'b.c', 'd']


def test_files_of_a_folder(tmp_path):
    for name in ('b.png', 'a.png', 'c.jpg', 'notes.txt'):
        (tmp_path / name).touch()
    assert list_images(tmp_path, '.png', 'setting').names == ['a', 'b']


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('x.txt', 'a', r'setting=.*x\.txt.*: expected a file that ends in one of \.jsonl, \.jsonl\.gz, \.json'),
        ('x.jsonl', '', 'the list is empty'),
        ('x.jsonl', '{"filename": "a"}\nb', 'line 2: is no JSON'),
        ('x.jsonl', '["a"]', 'line 1: expected an object with filename or image_hash'),
        ('x.jsonl', '{"name": "a"}', r"line 1: expected filename or image_hash, found \['name'\]"),
        ('x.jsonl', '{"filename": "a", "bucket_id": 1}\n{"filename": "b"}', 'line 2: lacks a bucket'),
        ('x.jsonl', '{"filename": "a"}\n{"filename": "b", "bucket_id": 1}', 'line 2: has a bucket, which lines before'),
        ('x.jsonl', '{"filename": "a", "bucket_id": "big"}', "line 1: the bucket is 'big', expected a whole number"),
        ('x.jsonl', '{"filename": "a", "image_size": [0, 4]}', r'line 1: image_size is \[0, 4\]'),
        ('x.jsonl', '{"filename": "a", "image_size": 4}', 'line 1: image_size is 4, expected'),
        ('x.json', '{"a": 1}', 'expected a list of paths'),
        ('x.json', '[]', 'the list is empty'),
        ('x.jsonl.gz', 'no gzip', 'is no whole gzip file'),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_datalist(tmp_path / name, 'setting')


def test_a_truncated_archive(tmp_path):
    content = gzip.compress(b'{"filename": "a"}\n' * 50)
    (tmp_path / 'x.jsonl.gz').write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r'x\.jsonl\.gz: is no whole gzip file'):
        read_datalist(tmp_path / 'x.jsonl.gz', 'setting')


def test_damage_inside_an_archive(tmp_path):
    content = bytearray(gzip.compress(b'{"filename": "a"}\n' * 50))
    content[12] ^= 0xFF  # in the compressed blocks, where zlib fails
    (tmp_path / 'x.jsonl.gz').write_bytes(content)
    with pytest.raises(ValueError, match=r'x\.jsonl\.gz: is no whole gzip file'):
        read_datalist(tmp_path / 'x.jsonl.gz', 'setting')


@pytest.mark.parametrize('name', ['x.jsonl', 'x.json'])
def test_what_is_no_text(name, tmp_path):
    (tmp_path / name).write_bytes(b'{"filename": "\xff"}\n')
    with pytest.raises(ValueError, match=rf'{name}: is no text in UTF-8: byte 14 is 0xff'):
        read_datalist(tmp_path / name, 'setting')


def test_only_line_feeds_end_a_line(tmp_path):
    names = ['a\u2028b', 'c\u0085d', 'e\x1ef', 'g\u2029']
    lines = '\r\n'.join(json.dumps({'filename': name}, ensure_ascii=False) for name in names)
    (tmp_path / 'x.jsonl').write_bytes(lines.replace('\x1e', '\\u001e').encode())
    assert read_datalist(tmp_path / 'x.jsonl', 'setting').names == names


def test_a_missing_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'my_setting=.*none\.json.*: there is no such file'):
        read_datalist(tmp_path / 'none.json', 'my_setting')
