"""Lets a process fail at a chosen one of its requests to an S3 server; the code under test knows nothing of it.

Only requests that change something are counted: to die before one that reads is the same as to die after the change
before it. What is sent, is sent by botocore, so the server sees what it would see of a process that dies there.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CHANGES = ('PUT', 'POST', 'DELETE')
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>injected</Message></Error>'


class DiedError(BaseException):
    """In place of the death of a process; nothing that it sends afterwards reaches the server."""


@dataclass
class RequestFault:
    """What goes wrong, and when.

    Args:
        number: The request that fails, from 0; a negative number lets all of them pass.
        how: ``'die'`` ends the process just before the request; ``'cut'`` in the middle of its body, if it has one;
            ``'deny'`` has the request, and all that change something after it, refused as by a server;
            ``'lost'`` lets the server do what is asked, but not its answer arrive; ``'severed'`` does so too, and from
            then on there is no network.
        refused: Pattern of requests, ``METHOD path``, that are refused, whatever else happens.
        status: Status of refusals.
        kill: Whether to end the process really; otherwise it goes on without a network, raising :class:`DiedError`.
        seen: Requests so far, ``METHOD path``.
    """

    number: int
    how: str
    kill: bool = False
    refused: str = ''
    status: int = 403
    seen: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.is_over = False

    def send(self, send, session, request):
        """In place of botocore's own function."""
        line = f'{request.method} {urlsplit(request.url).path}'
        if self.refused and re.match(self.refused, line):
            return self._refusal(request)
        if self.is_over and self.how == 'severed':
            raise _lost(request)
        if self.is_over and self.how in ('die', 'cut'):
            raise DiedError
        if request.method not in CHANGES:
            return send(session, request)
        number = len(self.seen)
        self.seen.append(line)
        if number != self.number and not (self.is_over and self.how == 'deny'):
            return send(session, request)
        self.is_over = True
        if self.how in ('lost', 'severed'):
            send(session, request)
            raise _lost(request)
        if self.how == 'deny':
            return self._refusal(request)
        if self.how == 'cut' and request.body:
            _send_half(request)
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise DiedError

    def _refusal(self, request):
        from botocore.awsrequest import AWSResponse

        return AWSResponse(request.url, self.status, {}, _Raw(DENIED))


def _lost(request) -> Exception:
    from botocore.exceptions import ConnectionClosedError

    return ConnectionClosedError(endpoint_url=request.url)


class _Raw:
    """The body of an answer, as urllib3 gives it."""

    def __init__(self, content: bytes):
        self._content = content

    def stream(self, *_args, **_kwargs):
        yield self._content


def _send_half(request) -> None:
    body = request.body if isinstance(request.body, bytes) else request.body.read()
    parts = urlsplit(request.url)
    headers = ''.join(f'{name}: {_text(value)}\r\n' for name, value in request.headers.items())
    target = parts.path + (f'?{parts.query}' if parts.query else '')
    head = f'{request.method} {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n{headers}'
    if 'content-length' not in headers.lower():
        head += f'Content-Length: {len(body)}\r\n'
    with socket.create_connection((parts.hostname, parts.port), 10) as connection:
        connection.sendall(f'{head}\r\n'.encode() + body[: len(body) // 2])


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def failing(fault: RequestFault | None) -> Iterator[RequestFault | None]:
    """Let the fault happen in this process while open; None for no fault."""
    if fault is None:
        yield None
        return
    from botocore.httpsession import URLLib3Session

    send = URLLib3Session.send
    URLLib3Session.send = lambda session, request: fault.send(send, session, request)
    try:
        yield fault
    finally:
        URLLib3Session.send = send
