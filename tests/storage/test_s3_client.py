"""Which credentials are used, when clients are made anew, and who may be anonymous."""

import json
import logging
import os
import re
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from botocore import exceptions

from lakonlab.storage import files, retry, s3_client
from lakonlab.storage.errors import StorageError, TransientError
from lakonlab.storage.s3_upload import clean_uploads
from tests.faulty_proxy import Fault, run_proxy
from tests.s3_server import use

PROFILE = '[{name}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n'


@pytest.fixture
def place(s3_server, monkeypatch, tmp_path):
    """A file on a server, and a file of credentials that boto3 finds, empty at first."""
    bucket = use(s3_server, monkeypatch)
    files.write_text(f'{bucket}/a', 'content')
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'credentials'))
    (tmp_path / 'credentials').touch()
    s3_client._connection.cache_clear()
    return f'{bucket}/a'


@pytest.fixture
def without_keys(monkeypatch):
    """No keys in the environment; requested after ``place``."""
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')


def write_credentials(tmp_path, key, secret, name='default'):
    (tmp_path / 'credentials').write_text(PROFILE.format(name=name, key=key, secret=secret))


def test_no_credentials_is_an_error_and_not_anonymous(place, without_keys, monkeypatch):
    with pytest.raises(StorageError, match=r'AWS_PROFILE.*LAKONLAB_S3_ANONYMOUS=1'):
        files.read_text(place)


def test_anonymous_on_request(place, without_keys, s3_server, monkeypatch):
    name = place.split('/')[2]
    for value, is_unsigned in (('1', True), (f'other,{name}', True), ('other', False), ('0', False), ('', False)):
        monkeypatch.setenv('LAKONLAB_S3_ANONYMOUS', value)
        assert s3_client.is_anonymous(name) == is_unsigned
    seen = []
    with run_proxy(s3_server.port) as proxy:
        monkeypatch.setenv('AWS_ENDPOINT_URL', proxy.url)
        monkeypatch.setenv('LAKONLAB_S3_ANONYMOUS', '1')
        fault = Fault('status', status=403, code='AccessDenied', times=-1)
        fault.takes = lambda line, header: seen.append(header) or True
        proxy.faults = [fault]
        with pytest.raises(StorageError, match='access denied'):
            files.read_text(place)
    assert 'Authorization' not in seen[0]


def test_credentials_of_a_file_and_of_a_profile(place, without_keys, s3_server, monkeypatch, tmp_path):
    write_credentials(tmp_path, s3_server.key, s3_server.secret)
    assert files.read_text(place) == 'content'
    write_credentials(tmp_path, s3_server.key, s3_server.secret, name='work')
    monkeypatch.setenv('AWS_PROFILE', 'work')
    assert files.read_text(place) == 'content'
    monkeypatch.setenv('AWS_PROFILE', 'absent')
    with pytest.raises(StorageError, match='absent'):
        files.read_text(place)


def test_rotated_credentials_are_used_at_once(place, without_keys, s3_server, tmp_path):
    write_credentials(tmp_path, s3_server.key, 'old')
    with pytest.raises(StorageError, match=r'does not accept the credentials from .*credentials, profile default'):
        files.read_text(place)
    write_credentials(tmp_path, s3_server.key, s3_server.secret)
    assert files.read_text(place) == 'content'


def test_expired_credentials_are_read_again_once(place, without_keys, s3_server, monkeypatch, tmp_path):
    """The file is replaced by one that looks the same from outside, while a request is on its way."""
    path = tmp_path / 'credentials'
    write_credentials(tmp_path, 'test:expired', s3_server.secret)
    entry = path.stat()
    with run_proxy(s3_server.port) as proxy:
        monkeypatch.setenv('AWS_ENDPOINT_URL', proxy.url)
        proxy.faults = [Fault('status', status=400, code='ExpiredToken', header='test:expired', times=-1)]
        with pytest.raises(StorageError, match='have expired'):
            files.read_text(place)
        assert proxy.count('GET') == 1
        content = PROFILE.format(name='default', key=s3_server.key, secret=s3_server.secret)
        path.write_text(content + '\n' * (entry.st_size - len(content)))
        os.utime(path, ns=(entry.st_mtime_ns, entry.st_mtime_ns))
        assert s3_client.Settings.now('b').files[0] == (str(path), entry.st_ino, entry.st_size, entry.st_mtime_ns)
        assert files.read_text(place) == 'content'
        assert proxy.count('GET') == 3


def test_keys_win_over_files_and_a_profile_over_keys(place, s3_server, monkeypatch, tmp_path, caplog):
    write_credentials(tmp_path, s3_server.key, 'wrong')
    assert files.read_text(place) == 'content'
    assert 'AWS_ACCESS_KEY_ID wins over AWS_SHARED_CREDENTIALS_FILE' in caplog.text
    monkeypatch.setenv('AWS_PROFILE', 'default')
    with pytest.raises(StorageError, match='does not accept'):
        files.read_text(place)


def test_keys_do_not_appear_in_logs_and_messages(place, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, 'lakonlab')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'a-very-secret-key')
    with pytest.raises(StorageError) as caught:
        files.read_text(place)
    assert 'a-very-secret-key' not in caplog.text + str(caught.value)


def test_bucket_is_no_host_of_another_server(place, s3_server, monkeypatch):
    monkeypatch.setenv('AWS_ENDPOINT_URL', f'http://localhost:{s3_server.port}')
    assert files.read_text(place) == 'content'
    url = s3_client.connection('b').client.generate_presigned_url('get_object', Params={'Bucket': 'bucket', 'Key': 'k'})
    assert url.startswith(f'http://localhost:{s3_server.port}/bucket/k?')
    monkeypatch.delenv('AWS_ENDPOINT_URL')
    url = s3_client.connection('b').client.generate_presigned_url('get_object', Params={'Bucket': 'bucket', 'Key': 'k'})
    assert url.startswith('https://bucket.s3.')


def test_malformed_endpoint(place, monkeypatch):
    urls = {
        'AWS_ENDPOINT_URL': ('storage.example', 'http://[bad'),
        'AWS_ENDPOINT_URL_S3': ('http://host:port', 'htp://host'),
    }
    for name, url in ((name, url) for name, found in urls.items() for url in found):
        with monkeypatch.context() as patch:
            patch.setenv(name, url)
            expected = rf'{name}={re.escape(repr(url))}.*expected AWS_ENDPOINT_URL=https://host'
            with pytest.raises(StorageError, match=expected):
                files.read_text(place)


def test_malformed_region(place, monkeypatch):
    monkeypatch.setenv('AWS_REGION', 'eu west')
    with pytest.raises(StorageError, match=r"AWS_REGION='eu west'.*a region such as"):
        files.read_text(place)


@pytest.mark.parametrize(
    ('error', 'is_transient'),
    [
        (exceptions.MetadataRetrievalError(error_msg='Received non 200 response 503 from container metadata'), True),
        (exceptions.MetadataRetrievalError(error_msg='Received error: timed out'), True),
        (exceptions.MetadataRetrievalError(error_msg='Received non 200 response 403 from container metadata'), False),
        (exceptions.CredentialRetrievalError(provider='container-role', error_msg='timed out'), True),
        (exceptions.CredentialRetrievalError(provider='iam-role', error_msg='Credential refresh failed'), True),
        (exceptions.CredentialRetrievalError(provider='custom-process', error_msg='no such program'), False),
    ],
)
def test_services_of_credentials(error, is_transient):
    """What botocore raises when it cannot have them is tried again if that may help."""
    found = s3_client.of_connection(error, 's3://bucket/a')
    assert isinstance(found, TransientError) == is_transient
    assert str(error) in str(found)


def test_credentials_of_a_container_that_come_late(place, without_keys, s3_server, monkeypatch):
    """Its service is busy at first, for longer than botocore itself asks again."""
    later = (datetime.now(timezone.utc) + timedelta(hours=6)).strftime('%Y-%m-%dT%H:%M:%SZ')
    keys = {'AccessKeyId': s3_server.key, 'SecretAccessKey': s3_server.secret}
    credentials = {**keys, 'Token': None, 'Expiration': later}
    statuses = [503] * 4

    class Service(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(statuses.pop() if statuses else 200)
            self.end_headers()
            self.wfile.write(json.dumps(credentials).encode())

        def log_message(self, *args):
            """Nothing is to be printed."""

    monkeypatch.setattr('botocore.utils.ContainerMetadataFetcher.SLEEP_TIME', 0.01)
    monkeypatch.setattr(retry, 'FIRST_DELAY', 0.01)
    with HTTPServer(('127.0.0.1', 0), Service) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv('AWS_CONTAINER_CREDENTIALS_FULL_URI', f'http://127.0.0.1:{service.server_port}/')
        try:
            assert files.read_text(place) == 'content'
        finally:
            service.shutdown()
            thread.join()
    assert not statuses


def test_endpoint_for_s3_alone(place, s3_server, monkeypatch):
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
    monkeypatch.setenv('AWS_ENDPOINT_URL_S3', s3_server.url)
    assert files.read_text(place) == 'content'


def test_one_client_serves_all_threads(place):
    found = []
    threads = [threading.Thread(target=lambda: found.append(files.read_text(place))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ['content'] * 16


def test_clients_are_made_once(place):
    bucket = place.split('/')[2]
    assert s3_client.connection(bucket) is s3_client.connection(bucket)
    assert s3_client.connection(bucket).client.meta.config.retries['total_max_attempts'] == 1


def test_path_that_is_not_on_s3(tmp_path):
    with pytest.raises(StorageError, match='expected s3://'):
        clean_uploads(str(tmp_path), 0)
