"""Where the S3 servers of the tests keep their files."""

import errno
import os

from tests.s3_server import PLACES, place_with_attributes


def test_the_first_place_that_will_do(tmp_path, monkeypatch):
    places = [tmp_path / 'absent' / 'below', tmp_path / 'plain', tmp_path / 'new', tmp_path / 'other']
    places[1].mkdir()

    def setxattr(path, *_):
        if path.startswith(str(places[1])):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), path)

    monkeypatch.setattr(os, 'setxattr', setxattr)
    assert place_with_attributes(places) == places[2]
    assert place_with_attributes(places[:2]) is None
    assert not any(path for place in places[1:3] for path in place.iterdir())


def test_several_places_are_tried():
    assert len(set(PLACES)) >= 3
