"""A proxy on loopback between a client and an HTTP server that lets chosen requests fail, each in one of many ways.

It forwards what a request says unchanged, so that its signature stays valid.
"""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>'


@dataclass
class Fault:
    """Requests that fail, and how.

    Args:
        how: ``reset`` drops the connection before the server sees the request; ``lost`` lets the server do what is
            asked and then drops it; ``status`` answers in the server's place; ``truncate`` ends the body of the answer
            early; ``reset_body`` resets the connection at that point; ``stall`` says nothing any more; ``garble``
            changes a byte of the body of the request.
        method: Method of the requests.
        path: Pattern that is searched in path and query.
        times: How many of them; -1 for all.
        skip: How many pass before.
        status: Of the answer.
        code: S3's name of the error.
        bytes_sent: Of the body, before it ends.
        header: Pattern that is searched in the header of the request too.
    """

    how: str
    method: str = '[A-Z]+'
    path: str = ''
    times: int = 1
    skip: int = 0
    status: int = 500
    code: str = 'InternalError'
    bytes_sent: int = 100
    header: str = ''

    def takes(self, line: str, header: str) -> bool:
        """Whether a request is one that fails; counts it."""
        method, target, _ = line.split(' ')
        if not (re.fullmatch(self.method, method) and re.search(self.path, target) and re.search(self.header, header)):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times == 0:
            return False
        self.times -= 1
        return True


@dataclass
class Proxy:
    """A running proxy.

    Args:
        url: Where clients find it.
        faults: The first that takes a request lets it fail.
        requests: Method and path of all requests so far.
        skew: Seconds that a server's ``Date`` is changed by.
    """

    url: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        """Requests so far that match, such as ``PUT .*name``."""
        return sum(re.match(pattern, line) is not None for line in self.requests)


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        """Forward one request after the other."""
        proxy, port = self.server.proxy, self.server.upstream
        stream = self.request.makefile('rb')
        with contextlib.suppress(OSError):
            while True:
                head = _head(stream)
                if not head:
                    return
                line = head.partition(b'\r\n')[0].decode('latin-1')
                text = head.decode('latin-1')
                fault = None
                with self.server.lock:
                    proxy.requests.append(line.rpartition(' ')[0])
                    fault = next((fault for fault in proxy.faults if fault.takes(line, text)), None)
                if re.search(r'(?im)^expect: 100-continue', text):
                    self.request.sendall(b'HTTP/1.1 100 Continue\r\n\r\n')
                    head = re.sub(rb'(?im)^expect: 100-continue\r\n', b'', head)
                body = stream.read(_length(text))
                if not self._answer(fault, head, body, port, is_head=line.startswith('HEAD ')):
                    return

    def _answer(self, fault: Fault | None, head: bytes, body: bytes, port: int, is_head: bool) -> bool:
        """Whether the connection goes on."""
        how = None if fault is None else fault.how
        if how == 'reset':
            return self._reset()
        if how == 'status':
            content = XML.format(code=fault.code).encode()
            head = (
                f'HTTP/1.1 {fault.status} Error\r\nContent-Type: application/xml\r\nContent-Length: {len(content)}\r\n'
            )
            self.request.sendall(f'{head}\r\n'.encode() + (b'' if is_head else content))
            return True
        if how == 'stall':
            self.server.ended.wait(30)
            return False
        if how == 'garble' and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        with socket.create_connection(('127.0.0.1', port)) as server:
            head = re.sub(rb'(?im)^connection: .*\r\n', b'', head)
            server.sendall(head.replace(b'\r\n', b'\r\nConnection: close\r\n', 1) + body)
            answer = server.makefile('rb')
            answer_head = _head(answer)
            content = answer.read()
        if how == 'lost':
            return self._reset()
        if how in ('truncate', 'reset_body'):
            self.request.sendall(answer_head + content[: fault.bytes_sent])
            return self._reset() if how == 'reset_body' else False
        self.request.sendall(re.sub(rb'(?im)^connection: .*\r\n', b'', answer_head) + content)
        # without a length, the end of the connection is the end of the body
        return is_head or b'content-length:' in answer_head.lower() or b'chunked' in answer_head.lower()

    def _reset(self) -> bool:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.request.close()
        return False


def _head(stream) -> bytes:
    lines = []
    while line := stream.readline():
        lines.append(line)
        if line == b'\r\n':
            return b''.join(lines)
    return b''


def _length(head: str) -> int:
    match = re.search(r'(?im)^content-length: *(\d+)', head)
    return int(match[1]) if match else 0


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is no error here."""


@contextlib.contextmanager
def run_proxy(port: int) -> Iterator[Proxy]:
    """A proxy before the server at a port of loopback, until the block ends."""
    with _Server(('127.0.0.1', 0), _Handler) as server:
        server.lock, server.ended, server.upstream = threading.Lock(), threading.Event(), port
        server.proxy = Proxy(f'http://127.0.0.1:{server.server_address[1]}')
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield server.proxy
        server.ended.set()
        server.shutdown()
        thread.join()


def wait_until(condition, seconds: float = 20.0) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'it did not happen'
        time.sleep(0.02)


class StillClock:
    """In place of the module ``time`` of what waits: time passes only while it sleeps, whatever the machine does."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        """Seconds since it was made."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
