"""Reading parts of safetensors files on a server, compared with safetensors' own reader of a local file."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lakonlab.storage import files, ranged_safetensors
from lakonlab.storage.ranged_safetensors import DTYPES, RangedSafetensors, open_safetensors

TENSORS = {
    'cube': torch.randn(4, 3, 5),
    'flat': torch.randn(17).double(),
    'scalar': torch.tensor(3, dtype=torch.int16),
    'empty': torch.zeros(0, 4),
    'rows': torch.randn(6, 2).bfloat16(),
    'eight': torch.randn(9).to(torch.float8_e4m3fn),
}


@st.composite
def requests(draw):
    """Names and boxes."""
    wanted = []
    for key in draw(st.lists(st.sampled_from(sorted(TENSORS)), min_size=1, max_size=6)):
        box = []
        for size in TENSORS[key].shape:
            start = draw(st.integers(0, max(size - 1, 0)))
            box.append(slice(start, draw(st.integers(start, size))))
        wanted.append((key, tuple(box)))
    return wanted


@pytest.fixture
def memory(monkeypatch):
    """Reads of a file of the memory instead of requests, each with what it asked for."""
    content, asked = save(TENSORS, {'free': 'text'}), []

    def read_bytes(path, start=0, length=None):
        asked.append((start, length))
        return content[start:][:length]

    monkeypatch.setattr(files, 'read_bytes', read_bytes)
    return asked


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests(), st.integers(8, 300), st.integers(0, 64), st.integers(8, 1 << 16))
def test_any_boxes(memory, wanted, most, gap, head):
    with pytest.MonkeyPatch.context() as patched:
        for name, value in dict(REQUEST_BYTES=most, GAP_BYTES=gap, HEAD_BYTES=head).items():
            patched.setattr(ranged_safetensors, name, value)
        found = dict(RangedSafetensors('s3://bucket/x').read(wanted))
    assert sorted(found) == list(range(len(wanted)))
    for number, (key, box) in enumerate(wanted):
        expected = TENSORS[key][box] if box else TENSORS[key]
        assert found[number].dtype == expected.dtype
        assert torch.equal(found[number].float(), expected.float())


def test_what_lies_near_is_one_request(memory):
    file = RangedSafetensors('s3://bucket/x')
    assert len(memory) == 1
    everything = [(key, tuple(slice(0, size) for size in tensor.shape)) for key, tensor in TENSORS.items()]
    list(file.read(everything))
    assert len(memory) == 2


def test_like_a_local_file(bucket, tmp_path):
    (tmp_path / 'x.safetensors').write_bytes(save(TENSORS, {'free': 'text'}))
    files.upload(tmp_path / 'x.safetensors', f'{bucket}/x.safetensors')
    file = RangedSafetensors(f'{bucket}/x.safetensors')
    with open_safetensors(tmp_path / 'x.safetensors') as local:
        assert set(file.keys()) == set(local.keys())
        assert file.metadata() == local.metadata() == {'free': 'text'}
        for key in local.keys():  # noqa: SIM118 - it is no mapping
            assert list(file.get_slice(key).get_shape()) == list(local.get_slice(key).get_shape())
            assert DTYPES[file.get_slice(key).get_dtype()] == TENSORS[key].dtype


@pytest.mark.parametrize(
    'content', [b'', b'short', b'\xff' * 100, (5).to_bytes(8, 'little') + b'{"a":', (2).to_bytes(8, 'little') + b'[]']
)
def test_other_files_are_refused(monkeypatch, content):
    monkeypatch.setattr(files, 'read_bytes', lambda path, start=0, length=None: content[start:][:length])
    with pytest.raises(files.StorageError, match='is no safetensors file'):
        RangedSafetensors('s3://bucket/x')


def test_a_file_that_ends_early_is_named(monkeypatch):
    content = save(TENSORS)[:-5]
    monkeypatch.setattr(files, 'read_bytes', lambda path, start=0, length=None: content[start:][:length])
    file = RangedSafetensors('s3://bucket/x')
    last = max(file.entries, key=lambda key: file.entries[key].start)
    box = tuple(slice(0, size) for size in TENSORS[last].shape)
    with pytest.raises(files.StorageError, match="'s3://bucket/x' ends before byte"):
        list(file.read([(last, box)]))
