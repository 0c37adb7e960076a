"""Remote files as local files, from real servers on loopback."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lakonlab.storage.errors import StorageError
from lakonlab.storage.fetch import FetchError, fetch, require_known_scheme
from lakonlab.storage.local import DirectoryInUseError
from lakonlab.storage.paths import sibling

CONTENT = bytes(range(256)) * 5000


REVISION = 'a' * 40
#: What the hub holds in ``org/model``, at ``main`` and at the tag ``v0.1``.
REPOSITORY = ['student_v0.1/config.json', 'student_v0.1/w.safetensors', 'transformer/w.safetensors', 'w.safetensors']


class Handler(BaseHTTPRequestHandler):
    """Serves ``/weights/*``; ``/cut/*`` and ``/chunks/*`` close the connection half way; and a hub."""

    protocol_version = 'HTTP/1.0'

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.server.requests.append(self.path)
        self.answer(with_body=True)

    def answer(self, with_body):
        kind = self.path.split('/')[1]
        headers, body = {'Content-Length': str(len(CONTENT))}, CONTENT
        if kind == 'cut':
            body = CONTENT[: len(CONTENT) // 2]
        elif kind == 'chunks':
            headers, body = {'Transfer-Encoding': 'chunked'}, b'%x\r\n' % len(CONTENT) + CONTENT[:100]
        elif kind in ('org', 'api'):
            headers, body = self.of_hub(urllib.parse.unquote(urllib.parse.urlsplit(self.path).path))
        elif kind != 'weights':
            body = None
        if body is None:
            self.send_response(404)
            headers = {'Content-Length': '0', **headers} if kind in ('org', 'api') else {'Content-Length': '0'}
            body = b''
        else:
            self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def of_hub(self, path):
        known = re.fullmatch(rf'/(?:api/models/)?org/model/(resolve|revision|tree)/(main|v0\.1|{REVISION})/?(.*)', path)
        if known is None:
            return {'X-Error-Code': 'RepoNotFound'}, None
        what, _, file = known.groups()
        if what == 'resolve':
            headers = {'X-Repo-Commit': REVISION, 'ETag': f'"{hashlib.sha256(file.encode()).hexdigest()}"'}
            if file not in REPOSITORY:
                return {**headers, 'X-Error-Code': 'EntryNotFound'}, None
            return {**headers, 'Content-Length': str(len(CONTENT))}, CONTENT
        listing = [{'type': 'file', 'path': name, 'size': len(CONTENT), 'oid': 'b' * 40} for name in REPOSITORY]
        siblings = [{'rfilename': name} for name in REPOSITORY]
        info = {'id': 'org/model', 'sha': REVISION, 'siblings': siblings, 'private': False, 'tags': [], 'downloads': 0}
        body = json.dumps(listing if what == 'tree' else info).encode()
        return {'Content-Type': 'application/json', 'Content-Length': str(len(body))}, body

    def log_message(self, *args):
        """Keep the log of the tests readable."""


@pytest.fixture(scope='module')
def running():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running, tmp_path, monkeypatch):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
    running.requests = []
    return running


def cached(tmp_path):
    return [path for path in (tmp_path / 'cache').rglob('*') if path.is_file() and path.name != '.lock']


def test_download_once(server, tmp_path):
    path = fetch(f'{server.url}/weights/a.safetensors')
    assert path.name == 'a.safetensors'
    assert path.read_bytes() == CONTENT
    assert fetch(f'{server.url}/weights/a.safetensors') == path
    assert server.requests == ['/weights/a.safetensors']
    assert cached(tmp_path) == [path]


def test_files_of_the_same_name_are_kept_apart(server):
    paths = {fetch(f'{server.url}/weights/{folder}/a.bin') for folder in ('x', 'y')}
    assert len(paths) == 2


@pytest.mark.parametrize(
    ('kind', 'message'),
    [('cut', f'ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes'), ('chunks', 'IncompleteRead')],
)
def test_cut_connection_leaves_nothing(kind, message, server, tmp_path):
    with pytest.raises(FetchError, match=rf'/{kind}/a\.safetensors.*{message}'):
        fetch(f'{server.url}/{kind}/a.safetensors')
    assert cached(tmp_path) == []


def test_missing_file(server, tmp_path):
    with pytest.raises(FetchError, match=r'/absent/a.safetensors.*status 404'):
        fetch(f'{server.url}/absent/a.safetensors')
    assert cached(tmp_path) == []


def test_unreachable_server(monkeypatch, tmp_path):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path))
    with pytest.raises(FetchError, match='check the URL and the network'):
        fetch('http://127.0.0.1:9/a.safetensors')


def test_several_at_once(server):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(f'{server.url}/weights/b.bin').read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4


def test_a_partial_file_that_vanishes_is_no_error(server, tmp_path):
    """As that of another thread does, between being listed and being looked at."""
    first = fetch(f'{server.url}/weights/b.bin')
    first.unlink()
    (first.parent / '.b.bin.part-gone').symlink_to(tmp_path / 'nowhere')
    assert fetch(f'{server.url}/weights/b.bin').read_bytes() == CONTENT


def test_processes_share_one_download(server, tmp_path):
    """They start together, as the processes of a job do."""
    url = f'{server.url}/weights/b.bin'
    code = (
        'import sys, lakonlab.storage.fetch as f; print(flush=True); sys.stdin.readline(); print(f.fetch(sys.argv[1]))'
    )
    command = [sys.executable, '-c', code, url]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write('\n')
        process.stdin.flush()
    paths = {process.communicate()[0].strip() for process in processes}
    assert [str(path) for path in cached(tmp_path)] == list(paths)
    assert fetch(url).read_bytes() == CONTENT
    assert server.requests == ['/weights/b.bin']


def test_whoever_waits_too_long_is_told_for_what(server, monkeypatch):
    def lock(path, wait_seconds):
        raise DirectoryInUseError('held')

    monkeypatch.setattr('lakonlab.storage.fetch.directory_lock', lock)
    with pytest.raises(FetchError, match=r'weights/b\.bin.*another process has been downloading it'):
        fetch(f'{server.url}/weights/b.bin')


def test_remains_of_a_killed_download_are_removed(server, tmp_path):
    path = fetch(f'{server.url}/weights/a.bin')
    path.unlink()
    old, young = (path.with_name(f'.a.bin.part-{name}') for name in ('old', 'young'))
    for part in (old, young):
        part.write_bytes(b'half')
    os.utime(old, (0, 0))
    assert fetch(f'{server.url}/weights/a.bin') == path
    assert not old.exists()
    assert young.exists()  # another thread may be writing to it


def test_url_that_is_none(server):
    with pytest.raises(FetchError, match='check the URL'):
        fetch(f'{server.url}/weights/a file.bin')


def test_local_paths_pass(tmp_path):
    assert fetch(tmp_path / 'a') == tmp_path / 'a'
    assert fetch(f'tmp:{tmp_path}/a') == tmp_path / 'a'
    require_known_scheme(str(tmp_path))


def test_unknown_scheme():
    for refuse in (fetch, require_known_scheme):
        with pytest.raises(FetchError, match=r'gopher:// cannot be read; known are local paths and huggingface://'):
            refuse('gopher://host/a')


def test_siblings(tmp_path):
    assert sibling(tmp_path / 'a.index.json', 'b.bin') == str(tmp_path / 'b.bin')
    assert sibling('http://h/x/a.index.json?k=1', 'b.bin') == 'http://h/x/b.bin?k=1'
    assert sibling('huggingface://o/r/x/a.index.json', 'b.bin') == 'huggingface://o/r/x/b.bin'
    with pytest.raises(StorageError, match='not in its folder'):
        sibling('http://h/x/a.index.json', '../b.bin')


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """A hub, and its library's cache, which is empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    return server


@pytest.mark.parametrize('revision', ['', '@v0.1'])
def test_hub_file(revision, hub, monkeypatch):
    url = f'huggingface://org/model{revision}/transformer/w.safetensors'
    assert fetch(url).read_bytes() == CONTENT
    downloads = [request for request in hub.requests if '/resolve/' in request]
    assert downloads == [f'/org/model/resolve/{revision[1:] or "main"}/transformer/w.safetensors']
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert fetch(url).read_bytes() == CONTENT


@pytest.mark.parametrize('name', ['transformer', 'transformer/', 'student_v0.1'])
def test_hub_folder(name, hub):
    folder = fetch(f'huggingface://org/model/{name}')
    expected = {file.rpartition('/')[2] for file in REPOSITORY if file.startswith(name.rstrip('/') + '/')}
    assert {path.name for path in folder.iterdir()} == expected
    downloads = [request for request in hub.requests if '/resolve/' in request]
    assert len(downloads) == len(expected)  # nothing beside the folder


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('model/transformer', 'expected huggingface://organisation/repository/path'),
        ('org/model/absent.safetensors', 'EntryNotFound.*Check the name'),
        ('org/model/absent', "org/model has no folder 'absent'"),
        ('org/other/transformer', 'RepositoryNotFound.*accept its licence'),
        ('org/other/w.safetensors', 'RepositoryNotFound.*accept its licence'),
    ],
)
def test_hub_errors_name_the_url(path, message, hub):
    with pytest.raises(FetchError, match=f'huggingface://{path}.*{message}'):
        fetch(f'huggingface://{path}')


@pytest.mark.parametrize('name', ['w.safetensors', 'transformer'])
def test_hub_without_a_network(name, hub, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(FetchError, match=rf'huggingface://org/model/{name}.*without a network, download it elsewhere'):
        fetch(f'huggingface://org/model/{name}')
