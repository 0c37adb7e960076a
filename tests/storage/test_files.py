"""Files of any scheme through one door; on real servers where they are remote."""

import multiprocessing
import os
import pickle
import random

import pytest

from lakonlab.storage import files, s3_upload
from lakonlab.storage.errors import MissingFileError, StorageError
from tests.s3_server import SERVERS, SMALLEST_PART, use

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture(params=['local', *SERVERS])
def root(request, tmp_path, monkeypatch):
    """An empty directory."""
    if request.param == 'local':
        return str(tmp_path / 'root')
    return use(request.getfixturevalue(request.param), monkeypatch) + '/root'


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(s3_upload, 'SMALLEST_PART', SMALLEST_PART)


def test_write_and_read(root):
    path = files.join(root, 'a', 'b.bin')
    assert not files.exists(path)
    files.write_bytes(path, CONTENT)
    assert files.read_bytes(path) == CONTENT
    assert files.read_bytes(path, 1000, 50) == CONTENT[1000:1050]
    assert files.read_bytes(path, 299_990, 50) == CONTENT[299_990:]
    assert files.read_bytes(path, 299_990) == CONTENT[299_990:]
    assert files.read_bytes(path, 400_000, 5) == b''
    assert files.size_of(path) == len(CONTENT)
    assert files.is_file(path)
    assert not files.is_directory(path)
    assert files.is_directory(files.parent_of(path))
    assert not files.is_file(files.parent_of(path))
    assert files.exists(root)


def test_text_and_json(root):
    files.write_text(files.join(root, 'a.txt'), 'ä\n')
    assert files.read_text(files.join(root, 'a.txt')) == 'ä\n'
    files.write_json(files.join(root, 'a.json'), {'x': [1, None]})
    assert files.read_text(files.join(root, 'a.json')) == '{\n "x": [\n  1,\n  null\n ]\n}'


def test_empty_file(root):
    path = files.join(root, 'empty')
    files.write_bytes(path, b'')
    assert files.is_file(path)
    assert files.size_of(path) == 0
    assert files.read_bytes(path) == b''
    with files.open_read(path) as stream:
        assert stream.read() == b''


def test_names_that_need_care(root):
    for name in ('with space', 'plus+and%20percent', 'ä', 'question?mark', 'hash#', "quote'", '.hidden'):
        files.write_text(files.join(root, 'odd', name), name)
    names = files.list_names(files.join(root, 'odd'))
    assert names == sorted(names)
    assert len(names) == 7
    assert all(files.read_text(files.join(root, 'odd', name)) == name for name in names)


def test_replacing(root):
    path = files.join(root, 'a')
    files.write_text(path, 'old')
    files.write_text(path, 'the new')
    assert files.read_text(path) == 'the new'


def test_stream_that_seeks(root):
    path = files.join(root, 'a')
    files.write_bytes(path, CONTENT)
    with files.open_read(path) as stream:
        assert stream.read(10) == CONTENT[:10]
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == CONTENT[-5:]
        stream.seek(1000)
        assert stream.read(7) == CONTENT[1000:1007]
        assert stream.tell() == 1007
        stream.seek(3, os.SEEK_CUR)
        assert stream.read() == CONTENT[1010:]


def test_stream_is_visible_at_the_end_only(root):
    path = files.join(root, 'a')
    with files.open_write(path) as stream:
        stream.write(CONTENT)
        assert not files.exists(path)
        assert files.list_names(root) == []
    assert files.read_bytes(path) == CONTENT


def test_nothing_of_a_failed_write_stays(root):
    path = files.join(root, 'a')
    files.write_text(path, 'old')

    def fail():
        with files.open_write(path) as stream:
            stream.write(CONTENT)
            raise RuntimeError('stopped')

    with pytest.raises(RuntimeError, match='stopped'):
        fail()
    assert files.read_text(path) == 'old'
    assert files.list_names(root) == ['a']
    if not files.is_remote(root):
        assert os.listdir(root) == ['a']


def test_listing(root):
    for name in ('b', 'a/1', 'a/2/x', 'a-b', 'a.txt'):
        files.write_text(files.join(root, name), name)
    assert files.list_names(root) == ['a', 'a-b', 'a.txt', 'b']
    found = files.list_files(root)
    assert {(info.name, info.size) for info in found} == {
        (name, len(name)) for name in ('b', 'a/1', 'a/2/x', 'a-b', 'a.txt')
    }
    assert [info.name for info in files.list_files(files.join(root, 'a'))] == ['1', '2/x']
    assert files.list_names(files.join(root, 'absent')) == []
    assert files.list_files(files.join(root, 'absent')) == []
    assert pickle.loads(pickle.dumps(found)) == found


def test_removing(root):
    for name in ('a/1', 'a/2/x', 'a/manifest.json', 'ab'):
        files.write_text(files.join(root, name), name)
    files.remove_file(files.join(root, 'a/1'))
    files.remove_file(files.join(root, 'a/1'))
    assert [info.name for info in files.list_files(files.join(root, 'a'))] == ['2/x', 'manifest.json']
    files.remove_directory(files.join(root, 'a'), seal='manifest.json')
    files.remove_directory(files.join(root, 'a'), seal='manifest.json')
    assert files.list_names(root) == ['ab']


def test_upload(root, tmp_path):
    source = tmp_path / 'source'
    for name in ('a', 'x/b', 'manifest.json'):
        files.write_text(source / name, name)
    (source / '.lock').touch()
    files.upload(source, files.join(root, 'copy'), seal='manifest.json')
    assert {info.name for info in files.list_files(files.join(root, 'copy'))} == {'a', 'x/b', 'manifest.json'}
    files.upload(source / 'a', files.join(root, 'one'))
    assert files.read_text(files.join(root, 'one')) == 'a'
    with pytest.raises(MissingFileError, match='nothing to copy'):
        files.upload(source / 'absent', files.join(root, 'two'))


def test_the_seal_is_uploaded_last(root, tmp_path, monkeypatch):
    order = []
    for name in ('manifest.json', 'z', 'a'):
        files.write_text(tmp_path / 'source' / name, name)
    upload = files._upload_file
    monkeypatch.setattr(files, '_upload_file', lambda local, path: (order.append(local.name), upload(local, path)))
    files.upload(tmp_path / 'source', files.join(root, 'copy'), seal='manifest.json')
    assert order[-1] == 'manifest.json'


def test_what_is_missing(root):
    for read in (files.read_bytes, files.size_of, files.open_read, files.read_text):
        with pytest.raises(MissingFileError, match='absent'):
            read(files.join(root, 'absent'))
        with pytest.raises(FileNotFoundError):
            read(files.join(root, 'absent'))


def test_staged(root, monkeypatch, tmp_path):
    monkeypatch.setenv('LAKONLAB_TMPDIR', str(tmp_path / 'scratch'))
    path = files.join(root, 'a.bin')
    with files.staged(path, len(CONTENT)) as local:
        assert local.name == 'a.bin'
        local.write_bytes(CONTENT)
        assert not files.exists(path)
    assert files.read_bytes(path) == CONTENT
    assert list((tmp_path / 'scratch').iterdir()) == []


def test_large_file_in_parts(bucket, small_parts, s3_server):
    content = random.Random(1).randbytes(2 * SMALLEST_PART + 12_345)
    path = f'{bucket}/large.bin'
    with files.open_write(path) as stream:
        for start in range(0, len(content), 1_000_003):
            assert stream.write(content[start : start + 1_000_003]) == len(content[start : start + 1_000_003])
        assert stream.tell() == len(content)
    assert files.read_bytes(path) == content
    with files.open_read(path) as stream:
        assert stream.read() == content
    facts = s3_server.client().head_object(Bucket=bucket.removeprefix('s3://'), Key='large.bin')
    if s3_server.kind == 'swift':
        assert facts['ETag'].endswith('-3"')  # it really was uploaded in three parts


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('page.html', 'text/html; charset=utf-8'),
        ('000000001.png', 'image/png'),
        ('state.json', 'application/json'),
        ('noise: 0?', None),
        ('weights.safetensors', None),
        ('logs.txt.gz', None),  # what it is and how it is packed are two things
    ],
)
def test_browsers_are_told_what_a_file_is(swift_bucket, swift, small_parts, name, expected):
    folder = f'{swift_bucket}/a.html b'
    files.write_bytes(f'{folder}/{name}', b'content')
    assert files.create(f'{folder}/new/{name}', b'content')
    if name.endswith('html'):
        files.write_bytes(f'{folder}/large/{name}', bytes(SMALLEST_PART + 1))
    for key in files.list_files(folder):
        bucket = swift_bucket.removeprefix('s3://')
        found = swift.client().head_object(Bucket=bucket, Key=f'a.html b/{key.name}')['ContentType']
        assert found == (expected or 'binary/octet-stream')


def test_failed_upload_in_parts_is_forgotten(bucket, small_parts, s3_server):
    def fail():
        with files.open_write(f'{bucket}/large.bin') as stream:
            stream.write(bytes(2 * SMALLEST_PART))
            raise RuntimeError('stopped')

    with pytest.raises(RuntimeError, match='stopped'):
        fail()
    assert files.list_names(bucket) == []
    answer = s3_server.client().list_multipart_uploads(Bucket=bucket.removeprefix('s3://'))
    assert not answer.get('Uploads')


@pytest.mark.parametrize(
    ('size', 'expected'),
    [(1, 64 << 20), (625 << 30, 64 << 20), (700 << 30, 72 << 20), (2500 << 30, 256 << 20), (None, 64 << 20)],
)
def test_size_of_parts(size, expected):
    """From 64 to 256 MiB; 10,000 of them must be enough."""
    assert s3_upload.part_size(1, size) == expected
    if size is not None:
        assert expected * s3_upload.MOST_PARTS >= size


def test_files_that_are_too_large():
    with pytest.raises(StorageError, match='too large'):
        s3_upload.part_size(1, 2600 << 30)
    with pytest.raises(StorageError, match='too large'):
        s3_upload.part_size(10_001)
    assert s3_upload.part_size(10_000) == 256 << 20


def _read_elsewhere(path):
    return files.read_bytes(path)


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_other_processes(method, bucket):
    """They do not use the connections of this one, also while this one uses them."""
    path = f'{bucket}/a.bin'
    files.write_bytes(path, CONTENT)
    with files.open_read(path) as stream:
        stream.read(10)
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.map(_read_elsewhere, [path] * 4)
        assert found == [CONTENT] * 4
        assert stream.read() == CONTENT[10:]


@pytest.mark.parametrize('path', ['s3://', 's3:///a', 's3://bucket/a//b', 's3://bucket/a/../b'])
def test_malformed_paths(path):
    with pytest.raises(StorageError, match=r'expected s3://bucket/key'):
        files.read_bytes(path)


def test_web(server):
    path = f'{server.url}/ranged/a.bin'
    assert files.read_bytes(path, 10, 20) == server.content[10:30]
    assert files.size_of(path) == len(server.content)
    assert files.is_file(path)
    assert not files.is_directory(path)
    assert not files.exists(f'{server.url}/absent/a.bin')
    with files.open_read(path) as stream:
        stream.seek(500)
        assert stream.read(5) == server.content[500:505]
    with pytest.raises(
        StorageError, match=r'http:// cannot be listed; expected one of local paths, s3://, huggingface'
    ):
        files.list_names(path)
    with pytest.raises(StorageError, match=r'http:// cannot be written; expected one of local paths, s3://'):
        files.write_text(path, '')


def test_web_server_without_ranges(server):
    """It sends the whole file, of which the beginning is skipped."""
    assert files.read_bytes(f'{server.url}/weights/a.bin', 10, 20) == server.content[10:30]


def test_require():
    files.require('s3://bucket/a', 'read', 'write', 'list', 'publish', setting='viz_dir')
    with pytest.raises(StorageError, match=r"viz_dir: 'huggingface://o/r/a': huggingface:// cannot be written or pub"):
        files.require('huggingface://o/r/a', 'read', 'write', 'publish', setting='viz_dir')
    with pytest.raises(StorageError, match=r'gs:// cannot be read; expected one of local paths, s3://'):
        files.require('gs://bucket/a', 'read', setting='data_root')


def test_a_file_is_created_once(swift_bucket, tmp_path):  # rclone does not know the condition
    for place in (swift_bucket, str(tmp_path)):
        path = files.join(place, 'new', 'file')
        assert files.create(path, b'first')
        assert not files.create(path, b'second')
        assert files.read_bytes(path) == b'first'
