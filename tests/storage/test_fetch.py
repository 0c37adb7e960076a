"""Remote files as local files, from real servers on loopback."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lakonlab.storage import download, retry
from lakonlab.storage.fetch import FetchError, fetch, require_known_scheme
from tests.faulty_proxy import StillClock
from tests.web_server import CONTENT


def cached(tmp_path):
    """What could be taken for a download."""
    return [
        path
        for path in (tmp_path / 'cache' / 'downloads').glob('[bf]*/**/*')
        if not path.name.startswith('.') and path.is_file()
    ]


def test_download_once(server, tmp_path):
    path = fetch(f'{server.url}/weights/a.safetensors')
    assert path.name == 'a.safetensors'
    assert path.read_bytes() == CONTENT
    assert fetch(f'{server.url}/weights/a.safetensors') == path
    assert server.requests == ['/weights/a.safetensors']
    assert set(cached(tmp_path)) == {path, path.resolve()}
    assert path.resolve().name == hashlib.sha256(CONTENT).hexdigest()


def test_files_of_the_same_name_are_kept_apart(server):
    paths = {fetch(f'{server.url}/weights/{folder}/a.bin') for folder in ('x', 'y')}
    assert len(paths) == 2
    assert len({path.resolve() for path in paths}) == 1  # but the same content is stored once


@pytest.mark.parametrize(
    ('kind', 'message'),
    [('cut', f'ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes'), ('chunks', 'IncompleteRead')],
)
def test_cut_connection_leaves_nothing(kind, message, server, tmp_path):
    with pytest.raises(FetchError, match=rf'/{kind}/a\.safetensors.*{message}'):
        fetch(f'{server.url}/{kind}/a.safetensors')
    assert cached(tmp_path) == []


def test_missing_file(server, tmp_path):
    with pytest.raises(FetchError, match=r'/absent/a.safetensors.*does not exist'):
        fetch(f'{server.url}/absent/a.safetensors')
    assert cached(tmp_path) == []


def test_unreachable_server(monkeypatch, tmp_path):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0')
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
    (path,) = paths
    assert {str(found) for found in cached(tmp_path)} == {path, str(Path(path).resolve())}
    assert fetch(url).read_bytes() == CONTENT
    assert server.requests == ['/weights/b.bin']


def test_whoever_waits_too_long_is_told_for_what(server, monkeypatch, tmp_path):
    """The holder is another process that does nothing."""
    url = f'{server.url}/ranged/b.bin'
    folder = fetch(url).parent
    (folder / 'b.bin').unlink()
    code = (
        'import sys, pathlib, lakonlab.storage.local as l\n'
        'with l.directory_lock(pathlib.Path(sys.argv[1])):\n  print(flush=True); sys.stdin.read()'
    )
    holder = subprocess.Popen([sys.executable, '-c', code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    monkeypatch.setattr(download, 'STALLED_SECONDS', 0.2)
    with pytest.raises(FetchError, match=r'ranged/b\.bin.*another process has been downloading it'):
        fetch(url)
    holder.communicate()
    assert fetch(url).read_bytes() == CONTENT


def test_lost_connections_are_taken_up_again(server, monkeypatch, caplog):
    """Every answer breaks off after a third of the file; two are errors of a busy server."""
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '30')
    server.bytes_per_answer, server.failures = len(CONTENT) // 3, [503, 0, 500]
    path = fetch(f'{server.url}/flaky/a.bin')
    assert path.read_bytes() == CONTENT
    starts = [entry[0] for entry in server.ranges if entry is not None]
    assert starts == sorted(starts)
    assert max(starts) >= 2 * (len(CONTENT) // 3)
    assert 'flaky/a.bin: attempt 1 failed' in caplog.text
    assert 'status 503' in caplog.text


def test_permanent_errors_are_not_tried_again(server, monkeypatch):
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '30')
    server.failures = [401, 401]
    with pytest.raises(FetchError, match=r'flaky/a\.bin.*status 401'):
        fetch(f'{server.url}/flaky/a.bin')
    assert len(server.ranges) == 2  # the file, and whether only the way of asking was refused


def test_retries_end(server, monkeypatch):
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0.3')
    monkeypatch.setattr(retry, 'time', StillClock())
    server.failures = [503] * 1000
    with pytest.raises(FetchError, match=r'status 503.*gave up looking at .*flaky/a\.bin after \d+ attempts'):
        fetch(f'{server.url}/flaky/a.bin')
    assert 5 <= len(server.ranges) <= 7


def test_an_interrupted_download_is_continued(server, monkeypatch, tmp_path):
    server.bytes_per_answer = 200_000
    with pytest.raises(FetchError, match=r'ended after 200000 of'):
        fetch(f'{server.url}/flaky/a.bin')
    assert cached(tmp_path) == []
    server.bytes_per_answer = 10**9
    server.ranges = []
    assert fetch(f'{server.url}/flaky/a.bin').read_bytes() == CONTENT
    assert server.ranges == [None, (200_000, len(CONTENT))]


def test_what_is_left_of_another_version_is_not_continued(server):
    server.bytes_per_answer = 200_000
    with pytest.raises(FetchError):
        fetch(f'{server.url}/flaky/a.bin')
    server.bytes_per_answer, server.content = 10**9, CONTENT[::-1]
    assert fetch(f'{server.url}/flaky/a.bin').read_bytes() == CONTENT[::-1]


def test_a_damaged_part_is_found_and_downloaded_again(server, tmp_path):
    server.bytes_per_answer = 200_000
    url = f'{server.url}/flaky/a.bin#sha256={hashlib.sha256(CONTENT).hexdigest()}'
    with pytest.raises(FetchError):
        fetch(url)
    server.bytes_per_answer = 10**9
    (part,) = (tmp_path / 'cache').rglob('.part')
    part.write_bytes(b'x' * 200_000)
    assert fetch(url).read_bytes() == CONTENT


def test_a_new_version_is_downloaded(server):
    url = f'{server.url}/ranged/a.bin'
    old = fetch(url)
    server.content = CONTENT[::-1]
    assert fetch(url).read_bytes() == CONTENT[::-1]
    assert old.read_bytes() == CONTENT  # whoever reads it is not disturbed


def test_a_copy_of_which_the_server_tells_only_the_size(server, caplog):
    url = f'{server.url}/plain/a.bin'
    path = fetch(url)
    assert 'as many as the copy of' not in caplog.text
    server.content = CONTENT[:-1]
    assert fetch(url).read_bytes() == CONTENT[:-1]
    server.content = CONTENT[::-1]
    assert fetch(url) == path  # nothing tells the difference
    assert 'plain/a.bin: the server tells neither a checksum nor when it was changed' in caplog.text
    assert f'Delete {path.parent} to download it again' in caplog.text
    shutil.rmtree(path.parent)
    assert fetch(url).read_bytes() == CONTENT[::-1]


def test_a_copy_of_which_the_server_tells_nothing_is_not_used_again(server):
    url = f'{server.url}/bare/a.bin'
    assert fetch(url).read_bytes() == CONTENT
    server.content = CONTENT[::-1]
    assert fetch(url).read_bytes() == CONTENT[::-1]


def test_a_file_whose_checksum_is_another_is_refused(server, tmp_path):
    url = f'{server.url}/ranged/a.bin#sha256={"0" * 64}'
    with pytest.raises(FetchError, match=rf'SHA-256 is {hashlib.sha256(CONTENT).hexdigest()}, expected 0000'):
        fetch(url)
    assert cached(tmp_path) == []


def test_a_known_content_needs_no_server(server):
    digest = hashlib.sha256(CONTENT).hexdigest()
    fetch(f'{server.url}/ranged/a.bin')
    path = fetch(f'http://127.0.0.1:9/elsewhere/b.safetensors#sha256={digest}')
    assert path.name == 'b.safetensors'
    assert path.read_bytes() == CONTENT


def test_without_a_network(server, monkeypatch):
    url = f'{server.url}/ranged/a.bin'
    monkeypatch.setenv('LAKONLAB_OFFLINE', '1')
    with pytest.raises(FetchError, match='LAKONLAB_OFFLINE is set: unset it'):
        fetch(url)
    monkeypatch.delenv('LAKONLAB_OFFLINE')
    path = fetch(url)
    server.ranges = []
    monkeypatch.setenv('LAKONLAB_OFFLINE', '1')
    assert fetch(url) == path
    assert server.ranges == []


def test_a_full_disk_is_seen_before(server, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(FetchError, match=r'ranged/a\.bin needs 1,280,000 bytes.*1,000 are free.*LAKONLAB_CACHE_DIR'):
        fetch(f'{server.url}/ranged/a.bin')


def test_server_that_does_not_answer_to_head(server):
    assert fetch(f'{server.url}/headless/a.bin').read_bytes() == CONTENT


def test_abandoned_parts_are_removed(server, tmp_path):
    server.bytes_per_answer = 200_000
    with pytest.raises(FetchError):
        fetch(f'{server.url}/flaky/a.bin')
    (part,) = (tmp_path / 'cache').rglob('.part')
    fetch(f'{server.url}/ranged/b.bin')
    assert part.exists()
    os.utime(part, (0, 0))
    fetch(f'{server.url}/ranged/c.bin')
    assert not part.exists()


def test_local_checksums(tmp_path):
    (tmp_path / 'a').write_bytes(CONTENT)
    assert fetch(f'{tmp_path}/a#sha256={hashlib.sha256(CONTENT).hexdigest()}') == tmp_path / 'a'
    with pytest.raises(FetchError, match='expected 0000'):
        fetch(tmp_path / 'a', sha256='0' * 64)


def test_url_that_is_none(server):
    with pytest.raises(FetchError, match='check the URL'):
        fetch(f'{server.url}/weights/a file.bin')


def test_local_paths_pass(tmp_path):
    assert fetch(tmp_path / 'a') == tmp_path / 'a'
    assert fetch(f'tmp:{tmp_path}/a') == tmp_path / 'a'
    require_known_scheme(str(tmp_path))


def test_unknown_scheme():
    for refuse in (fetch, require_known_scheme):
        with pytest.raises(
            FetchError, match=r'gopher:// cannot be read; expected one of local paths, s3://, huggingface://'
        ):
            refuse('gopher://host/a')
