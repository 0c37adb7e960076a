"""A web server on loopback that can be made to fail, and with it a hub."""

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lakonlab.storage import retry

CONTENT = bytes(range(256)) * 5000


REVISION = 'a' * 40
#: What the hub holds in ``org/model``, at ``main`` and at the tag ``v0.1``.
REPOSITORY = ['student_v0.1/config.json', 'student_v0.1/w.safetensors', 'transformer/w.safetensors', 'w.safetensors']
FOLDERS = ['student_v0.1', 'transformer']


def content_on_hub(name):
    """What a file on the hub holds."""
    return name.encode() + CONTENT


class Handler(BaseHTTPRequestHandler):
    """Serves ``/weights/*``; ``/cut/*`` and ``/chunks/*`` close the connection half way; and a hub.

    ``/plain/*`` is what the server holds, of which it says nothing but the size, and of ``/bare/*`` not even that.
    """

    protocol_version = 'HTTP/1.0'

    def do_HEAD(self):
        if self.path.startswith('/headless/'):
            self.send_error(403)
        else:
            self.answer(with_body=False)

    def do_POST(self):
        self.answer(with_body=True)

    def do_GET(self):
        self.server.requests.append(self.path)
        self.answer(with_body=True)

    def answer(self, with_body):
        kind = self.path.split('/')[1]
        if kind in ('ranged', 'headless', 'flaky'):
            self.send_range(kind, with_body)
            return
        headers, body = {'Content-Length': str(len(CONTENT))}, CONTENT
        if kind == 'cut':
            body = CONTENT[: len(CONTENT) // 2]
        elif kind == 'chunks':
            headers, body = {'Transfer-Encoding': 'chunked'}, b'%x\r\n' % len(CONTENT) + CONTENT[:100]
        elif kind in ('plain', 'bare'):
            body = self.server.content
            headers = {'Content-Length': str(len(body))} if kind == 'plain' else {}
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

    def send_range(self, kind, with_body):
        """Part of the content, with an ETag; of a flaky file only some bytes, and at first an error."""
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        size = len(self.server.content)
        start, stop = int(asked[1]) if asked else 0, int(asked[2] or size - 1) + 1 if asked else size
        self.server.ranges.append((start, stop) if asked else None)
        if kind == 'flaky' and self.server.failures:
            status = self.server.failures.pop(0)
            if status:
                self.send_error(status)
                return
        body = self.server.content[start:stop]
        self.send_response(206 if asked else 200)
        self.send_header('ETag', f'"{hashlib.sha256(self.server.content).hexdigest()}"')
        self.send_header('Content-Length', str(len(body)))
        if asked:
            self.send_header('Content-Range', f'bytes {start}-{stop - 1}/{len(self.server.content)}')
        self.end_headers()
        if with_body:
            self.wfile.write(body[: self.server.bytes_per_answer] if kind == 'flaky' else body)

    def of_hub(self, path):
        known = re.fullmatch(
            rf'/(?:api/models/)?org/model/(resolve|revision|tree|paths-info)/(main|v0\.1|{REVISION})/?(.*)', path
        )
        if known is None:
            return {'X-Error-Code': 'RepoNotFound'}, None
        what, _, file = known.groups()
        if what == 'resolve':
            content = content_on_hub(file)
            headers = {'X-Repo-Commit': REVISION, 'ETag': f'"{hashlib.sha256(content).hexdigest()}"'}
            if file not in REPOSITORY:
                return {**headers, 'X-Error-Code': 'EntryNotFound'}, None
            if self.server.is_damaged:
                content = content[::-1]
            return {**headers, 'Content-Length': str(len(content))}, content
        listing = [
            {'type': 'file', 'path': name, 'size': len(content_on_hub(name)), 'oid': 'b' * 40} for name in REPOSITORY
        ]
        if what in ('tree', 'paths-info'):
            listing += [{'type': 'directory', 'path': name, 'oid': 'c' * 40} for name in FOLDERS]
        if what == 'tree':
            recursive = 'recursive=true' in self.path.lower()
            inside = [entry for entry in listing if entry['path'].startswith(f'{file}/' if file else '')]
            depth = file.count('/') + 1 if file else 0
            listing = [entry for entry in inside if recursive or entry['path'].count('/') == depth]
            if not inside:
                return {'X-Error-Code': 'EntryNotFound'}, None
        elif what == 'paths-info':
            asked = self.rfile.read(int(self.headers['Content-Length'])).decode()
            listing = [entry for entry in listing if entry['path'] in urllib.parse.parse_qs(asked).get('paths', [])]
        siblings = [{'rfilename': name} for name in REPOSITORY]
        info = {'id': 'org/model', 'sha': REVISION, 'siblings': siblings, 'private': False, 'tags': [], 'downloads': 0}
        body = json.dumps(info if what == 'revision' else listing).encode()
        return {'Content-Type': 'application/json', 'Content-Length': str(len(body))}, body

    def log_message(self, *args):
        """Keep the log of the tests readable."""


@pytest.fixture(scope='session')
def running_web_server():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running_web_server, tmp_path, monkeypatch):
    """The server, an empty cache of downloads, and no patience."""
    running = running_web_server
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0')
    monkeypatch.setattr(retry, 'FIRST_DELAY', 0.01)
    running.requests, running.ranges, running.failures = [], [], []
    running.content, running.bytes_per_answer, running.is_damaged = CONTENT, 10**9, False
    return running


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
