"""Whether a directory can be written."""

import pytest

from lakonlab.storage import files
from lakonlab.storage.writable import require_writable


def test_nothing_stays_behind(bucket, tmp_path):
    require_writable(f'{bucket}/new/run', 'work_dir')
    assert files.list_files(bucket) == []
    require_writable(tmp_path / 'new' / 'run', 'work_dir')
    assert list((tmp_path / 'new' / 'run').iterdir()) == []


def test_reasons_are_said(bucket, monkeypatch):
    with pytest.raises(OSError, match=r'cannot write to s3://absent-bucket/x .*no bucket .* choose .* with some_key'):
        require_writable('s3://absent-bucket/x', 'some_key')
    with pytest.raises(OSError, match=r'some_key: .*https:// cannot be written'):
        require_writable('https://example.org/x', 'some_key')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'wrong')
    with pytest.raises(OSError, match=f'cannot write to {bucket}/x .*does not accept the credentials'):
        require_writable(f'{bucket}/x', 'some_key')
