"""Publishing directories: a kill at any moment loses nothing."""

import os

import pytest

from lakonlab.storage import local
from lakonlab.storage.paths import is_remote


class Killed(BaseException):
    """Stands for the end of the process."""


def new_version(final, text):
    temporary = local.temporary_directory(final)
    local.write_text(temporary / 'content', text)
    return temporary


def test_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    final = tmp_path / 'iter_4'
    local.publish_directory(new_version(final, 'old'), final)
    rename = os.rename

    def rename_once(source, target):
        rename(source, target)
        raise Killed

    temporary = new_version(final, 'new')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'rename', rename_once)
        with pytest.raises(Killed):
            local.publish_directory(temporary, final)
    assert not final.exists()
    assert list(local.stale_replaced(tmp_path)) == ['iter_4']
    assert local.remove_stale_temporaries(tmp_path) == [temporary.name]
    assert (final / 'content').read_text() == 'old'
    assert [path.name for path in tmp_path.iterdir()] == ['iter_4']


def test_what_was_replaced_is_removed_once_the_new_one_is_published(tmp_path):
    final = tmp_path / 'iter_4'
    local.publish_directory(new_version(final, 'new'), final)
    aside = tmp_path / '.iter_4.tmp-replaced-0123abcd'
    aside.mkdir()
    assert local.stale_replaced(tmp_path) == {}
    assert local.remove_stale_temporaries(tmp_path) == [aside.name]
    assert (final / 'content').read_text() == 'new'


@pytest.mark.parametrize('path', ['s3://bucket/run', 'gs:/bucket', 'https://host/run'])
def test_remote_paths(path):
    assert is_remote(path)


@pytest.mark.parametrize('path', ['run', '/a/b', '../a', 'C:/run', 'work_dirs/a:b', '~/run'])
def test_local_paths(path):
    assert not is_remote(path)
