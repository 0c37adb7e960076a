"""Local copies of files and directories on S3."""

import hashlib
import shutil
import subprocess
import sys

import pytest

from lakonlab.storage import download, files, s3
from lakonlab.storage.errors import StorageError
from lakonlab.storage.fetch import FetchError, fetch


@pytest.fixture
def folder(bucket, monkeypatch, tmp_path):
    """A directory with four files, of which two are the same."""
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0')
    for name in ('a.bin', 'b.bin', 'inner/c.bin', 'inner/same.bin'):
        files.write_text(f'{bucket}/model/{name}', 'content of ' + name.replace('same', 'c'))
    return f'{bucket}/model'


def test_file(folder):
    path = fetch(f'{folder}/a.bin')
    assert path.name == 'a.bin'
    assert path.read_text() == 'content of a.bin'
    assert fetch(f'{folder}/a.bin') == path
    files.write_text(f'{folder}/a.bin', 'new')
    assert fetch(f'{folder}/a.bin').read_text() == 'new'
    assert path.read_text() == 'content of a.bin'


def test_directory(folder, tmp_path):
    path = fetch(folder)
    assert path.name == 'model'
    found = {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob('*') if file.is_file()}
    assert found == {
        'a.bin': 'content of a.bin',
        'b.bin': 'content of b.bin',
        'inner/c.bin': 'content of inner/c.bin',
        'inner/same.bin': 'content of inner/c.bin',
    }
    assert len(list((tmp_path / 'cache' / 'downloads' / 'blobs').iterdir())) == 3
    assert fetch(f'{folder}/') == path
    files.write_text(f'{folder}/new.bin', 'new')
    assert (fetch(folder) / 'new.bin').read_text() == 'new'
    assert not (path / 'new.bin').exists()


def test_absent(folder):
    for name in ('absent.bin', 'absent'):
        with pytest.raises(FetchError, match=rf'{name}.*does not exist'):
            fetch(f'{folder}/{name}')


def test_checksum(folder):
    digest = hashlib.sha256(b'content of a.bin').hexdigest()
    assert fetch(f'{folder}/a.bin#sha256={digest}').read_text() == 'content of a.bin'
    other = hashlib.sha256(b'something else').hexdigest()
    with pytest.raises(FetchError, match=rf'b\.bin.*SHA-256 is .*expected {other}'):
        fetch(f'{folder}/b.bin', sha256=other)


def test_without_a_network(folder, monkeypatch):
    path, file = fetch(folder), fetch(f'{folder}/a.bin')
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
    with pytest.raises(FetchError, match=f'LAKONLAB_OFFLINE=1 uses {file}'):
        fetch(f'{folder}/a.bin')
    monkeypatch.setenv('LAKONLAB_OFFLINE', '1')
    assert fetch(folder) == path
    assert fetch(f'{folder}/a.bin') == file


def test_processes_share_one_download(folder, tmp_path):
    code = 'import sys; from lakonlab.storage.fetch import fetch; print(fetch(sys.argv[1]))'
    processes = [
        subprocess.Popen([sys.executable, '-c', code, folder], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    (path,) = {process.communicate()[0].strip() for process in processes}
    assert path == str(fetch(folder))
    assert not list((tmp_path / 'cache').rglob('*.tmp-*'))


def test_whoever_waits_for_a_directory_is_patient_while_its_files_arrive(folder, monkeypatch, tmp_path):
    """Another process holds the directory, and only the parts of files show that it works."""
    path = fetch(folder)
    shutil.rmtree(path)
    code = (
        'import sys, pathlib, lakonlab.storage.local as l\n'
        'with l.directory_lock(pathlib.Path(sys.argv[1])):\n  print(flush=True); sys.stdin.read()'
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder = subprocess.Popen([sys.executable, '-c', code, str(path.parent)], **pipes)
    holder.stdout.readline()
    monkeypatch.setattr(download, 'STALLED_SECONDS', 0.5)
    looks = []
    all_progress = download._all_progress

    def progress():
        part = tmp_path / 'cache' / 'downloads' / 'files' / 'of_another' / '.part'
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(bytes(len(looks)))
        looks.append(all_progress())
        if len(looks) == 5:
            holder.communicate()
        return looks[-1]

    monkeypatch.setattr(download, '_all_progress', progress)
    assert fetch(folder) == path
    assert len(looks) >= 5


def test_a_store_whose_etags_are_no_md5(folder, monkeypatch, caplog):
    monkeypatch.setattr(s3, 'md5_in', lambda facts: '0' * 32)
    s3.warn_of_etags.cache_clear()
    for _ in range(2):
        assert files.read_text(f'{folder}/a.bin') == 'content of a.bin'
        assert fetch(f'{folder}/a.bin').read_text() == 'content of a.bin'
    assert caplog.text.count('the ETags look like MD5 and are not those of the files') == 1
    assert caplog.text.count('a.bin: its MD5 is') == 1

    contents = iter(b'abcdef')
    monkeypatch.setattr(s3, 'chunks_of', lambda *args: [bytes([next(contents)])])  # never the same
    with pytest.raises(StorageError, match='arrived damaged: its MD5 is not 0000'):
        files.read_text(f'{folder}/b.bin')
