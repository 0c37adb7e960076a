"""Remote files as local files, from real servers on loopback."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lakonlab.storage.fetch import FetchError, fetch, require_known_scheme, sibling

CONTENT = bytes(range(256)) * 5000


class Handler(BaseHTTPRequestHandler):
    """Serves ``/weights/*``; ``/cut/*`` closes the connection half way."""

    requests: list[str]

    def do_GET(self):
        self.server.requests.append(self.path)
        if not self.path.startswith(('/weights/', '/cut/')):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path.startswith('/weights/') else CONTENT[: len(CONTENT) // 2])

    def log_message(self, *args):
        """Keep the log of the tests readable."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.requests = []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


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


def test_cut_connection_leaves_nothing(server, tmp_path):
    with pytest.raises(FetchError, match=r'bytes; run again|connection'):
        fetch(f'{server.url}/cut/a.safetensors')
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
    with pytest.raises(FetchError, match='not in its folder'):
        sibling('http://h/x/a.index.json', '../b.bin')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of the hub's library, as a download leaves it, and no network."""
    from huggingface_hub import constants

    folder = tmp_path / 'hub' / 'models--org--model'
    snapshot = folder / 'snapshots' / ('a' * 40)
    (snapshot / 'transformer').mkdir(parents=True)
    (snapshot / 'transformer' / 'w.safetensors').write_bytes(CONTENT)
    (folder / 'refs').mkdir()
    for name in ('main', 'v2'):
        (folder / 'refs' / name).write_text('a' * 40)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    return snapshot


@pytest.mark.parametrize('revision', ['', '@v2'])
def test_hub_file_and_folder(hub, revision):
    path = fetch(f'huggingface://org/model{revision}/transformer/w.safetensors')
    assert path.read_bytes() == CONTENT
    folder = fetch(f'huggingface://org/model{revision}/transformer')
    assert [entry.name for entry in folder.iterdir()] == ['w.safetensors']


@pytest.mark.parametrize('path', ['model/transformer', 'org/model/absent.safetensors', 'org/other/transformer'])
def test_hub_errors_name_the_url(hub, path):
    with pytest.raises(FetchError, match=f'huggingface://{path}'):
        fetch(f'huggingface://{path}')
