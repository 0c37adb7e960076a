"""Pickles of tensors are read as Python reads them; everything else is refused, and nothing is run."""

import collections
import contextlib
import io
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.datasets.prompt_cache.restricted_pickle import UnsafePickleError, read_pickle

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
OTHERS = [torch.int64, torch.int32, torch.uint8, torch.bool]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def values(dtype, *shape):
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(torch.float32).to(dtype)


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert raw_bytes(found) == raw_bytes(expected)


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('dtype', FLOATS + OTHERS + FLOAT8, ids=str)
def test_tensors(protocol, dtype):
    whole = values(dtype, 6, 5)
    tensors = {'whole': whole, 'row': whole[2], 'columns': whole[:, 1:3], 'turned': whole.t(), 'one': whole[0, 0]}
    found = read_pickle(pickle.dumps(tensors, protocol=protocol))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same(found[name], tensor)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_other_values(protocol):
    value = {
        'text': 'a cat, ein Kätzchen, 猫',
        'long': 'x' * 300,
        'numbers': [0, -1, 255, 70000, -(2**40), 2**70, 1.5, float('inf')],
        'constants': (None, True, False, ()),
        'tuples': ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        'bytes': b'\x00\xff',
        'nested': {'a': {'b': []}},
        'size': torch.Size([16, 128, 128]),
        'ordered': collections.OrderedDict(a=1),
        'parameter': torch.nn.Parameter(torch.ones(2)),
        'empty': torch.zeros(0, 4),
        'same': ['shared'] * 2,
    }
    found = read_pickle(pickle.dumps(value, protocol=protocol))
    same(found.pop('empty'), value.pop('empty'))
    same(found.pop('parameter'), value.pop('parameter').detach())
    assert found == {**value, 'size': (16, 128, 128)}


def test_memory_is_writable_and_apart():
    row = torch.arange(4.0)
    first, second = read_pickle(pickle.dumps([row, row[1:]]))
    first.zero_()
    assert second.tolist() == [1, 2, 3]


def test_repeated_elements_of_small_tensors():
    same(read_pickle(pickle.dumps(torch.ones(1).expand(77))), torch.ones(77))


# -- attacks. Each is a pickle that does harm under Python's own unpickler; the first test makes sure of it.


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class State:
    """Pickles as a call with a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def legacy_storage(first: bytes) -> bytes:
    """A storage whose first pickle is replaced."""
    stream = io.BytesIO()
    torch.save(torch.zeros(1).untyped_storage(), stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    magic = io.BytesIO(content)
    pickle.load(magic)
    return first + content[magic.tell() :]


def zip_storage(payload: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        archive.writestr('archive/data.pkl', payload)
        archive.writestr('archive/version', '3')
    return stream.getvalue()


def short(text: str) -> bytes:
    return b'\x8c' + bytes([len(text.encode())]) + text.encode()


def attacks(target: str) -> dict[str, bytes]:
    """Pickles that make a directory ``target``, by the way they take."""
    make = pickle.dumps(Call(os.mkdir, target), protocol=4)
    code = f'__import__("os").mkdir({target!r})'
    unsafe_load = {'weights_only': False}
    result = {f'call in protocol {protocol}': pickle.dumps(Call(os.mkdir, target), protocol) for protocol in range(6)}
    result.update(
        {
            'eval': b'cbuiltins\neval\n(V' + code.encode() + b'\ntR.',
            'exec': pickle.dumps(Call(exec, code)),
            'inside of a record': pickle.dumps(
                {'prompt': 'a cat', 'prompt_embed_kwargs': {'a': Call(os.mkdir, target)}}
            ),
            'as a key': b'\x80\x04}' + make[2:-1] + b'K\x01s.',
            'instance': b'(V' + target.encode() + b'\niposix\nmkdir\n.',
            'object': b'(cposix\nmkdir\nV' + target.encode() + b'\no.',
            'new object': b'\x80\x02cos\n_wrap_close\n)\x81' + b'0' + make[2:],
            'dotted name': b'\x80\x04' + short('os') + short('path.os.mkdir') + b'\x93' + short(target) + b'\x85R.',
            'name from the memo': b'\x80\x04'
            + short('posix')
            + b'\x94'
            + short('mkdir')
            + b'\x94\x93'
            + short(target)
            + b'\x85R.',
            'storage that is a pickle': pickle.dumps(Call(torch.storage._load_from_bytes, legacy_storage(make))),
            'load without limits': pickle.dumps(Call(_partial_load, zip_storage(make), unsafe_load)),
            'state of a call': pickle.dumps(State(dict, (), None, iter([]), iter([(1, Call(os.mkdir, target))]))),
            'list of a call': pickle.dumps(State(list, (), None, iter([Call(os.mkdir, target)]))),
        }
    )
    return result


def _partial_load(content, options):
    return torch.load(io.BytesIO(content), **options)


NAMES = sorted(attacks('nowhere'))


@pytest.mark.parametrize('name', NAMES)
def test_attacks_would_work(name, tmp_path):
    target = tmp_path / 'made'
    with contextlib.suppress(Exception):  # some fail when the harm is done
        pickle.loads(attacks(str(target))[name])
    assert target.is_dir()


@pytest.mark.parametrize('name', NAMES)
def test_attacks_are_refused(name, tmp_path):
    target = tmp_path / 'made'
    with pytest.raises(UnsafePickleError):
        read_pickle(attacks(str(target))[name])
    assert not target.exists()


@pytest.mark.parametrize(
    'call',
    [
        Call(getattr, 'text', 'upper'),
        Call(torch.load, 'x.pth'),
        Call(torch.from_numpy, None),
        Call(__import__, 'this'),
        Call(bytearray, 10),
        Call(torch.zeros, 3),
        Call(collections.OrderedDict, [('a', 1)]),
        Call(torch.Size, 3),
    ],
    ids=lambda call: f'{call.call[0].__module__}.{call.call[0].__name__}',
)
def test_harmless_calls_are_refused_too(call):
    with pytest.raises(UnsafePickleError):
        read_pickle(pickle.dumps(call))


def test_message_names_what_was_called():
    with pytest.raises(UnsafePickleError, match=r'posix\.mkdir.*nothing was run'):
        read_pickle(pickle.dumps(Call(os.mkdir, 'x')))


def test_functions_of_torch_are_not_changed_by_a_state():
    """BUILD sets attributes of whatever is on the stack, so it could change a function of this process."""
    attack = (
        b'\x80\x04' + short('torch._utils') + short('_rebuild_tensor_v2') + b'\x93N}' + short('x') + b'K\x01s\x86b.'
    )
    pickle.loads(attack)
    assert torch._utils._rebuild_tensor_v2.x == 1
    del torch._utils._rebuild_tensor_v2.x
    with pytest.raises(UnsafePickleError, match='BUILD'):
        read_pickle(attack)
    assert not hasattr(torch._utils._rebuild_tensor_v2, 'x')


@pytest.mark.parametrize(
    ('size', 'stride', 'offset'),
    [
        ((1 << 20, 1 << 20), (0, 0), 0),
        ((8,), (1,), 1),
        ((3,), (-1,), 2),
        ((9,), (1,), 0),
        ((2,), (1, 1), 0),
        ((2,), (1,), -1),
    ],
)
def test_shapes_that_reach_beyond_the_storage(size, stride, offset):
    storage = torch.zeros(8)._typed_storage()
    call = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())
    with pytest.raises(UnsafePickleError):
        read_pickle(pickle.dumps(call))


def test_names_as_values_are_not_resolved():
    """A name alone is no harm, and stands for nothing."""
    found = read_pickle(b'\x80\x04' + short('posix') + short('mkdir') + b'\x93.')
    assert not callable(found)


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'.',
        b'\x80\x04.',
        b'\x80\x04N',
        b'\x80\x04NN.',
        b'\x80\x04R.',
        b'\x80\x04(R.',
        b'\x80\x04NNR.',
        b'\x80\x04t.',
        b'\x80\x04N\x85a.',
        b'\x80\x04K\x01K\x02s.',
        b'\x80\x04}K\x01K\x02s.',
        b'\x80\x04h\x05.',
        b'\x80\x04\x94N.',
        b'\x80\x04\x82\x01.',
        b'\x80\x04K\x01Q.',
        b'\x80\x04B\xff\xff\xff\x7fx.',
        b'\x80\x04N.N',
        b'\x80\x04c\n\n.',
        b'\x80\x05\x97.',
    ],
    ids=repr,
)
def test_malformed(content):
    """Damage is reported as such, never as an error of some other kind."""
    try:
        read_pickle(content)
    except UnsafePickleError:
        return
    assert content == b'\x80\x04c\n\n.'


def test_large_memo_takes_no_memory():
    content = b'\x80\x04N' + b'r' + struct.pack('<I', 2**32 - 1) + b'.'
    assert read_pickle(content) is None


# -- what a small file could ask for


def test_a_view_does_not_keep_its_storage():
    whole = torch.zeros(1 << 20)
    whole[7] = 3
    found = read_pickle(pickle.dumps([whole[7:9], whole[::1024][:4]]))
    assert found[0].tolist() == [3, 0]
    assert [tensor.untyped_storage().nbytes() for tensor in found] == [8, 16]


def storage_pickle(size: int) -> bytes:
    """A pickle of one storage, without its frame, that leaves the storage on the stack and in the memo as number 9."""
    stream = io.BytesIO()
    torch.save(torch.zeros(size, dtype=torch.uint8).untyped_storage(), stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    load = short('torch.storage') + short('_load_from_bytes') + b'\x93'
    return load + b'B' + struct.pack('<I', len(content)) + content + b'\x85R'


def test_one_storage_is_not_copied_without_end():
    """Thousands of tensors of one storage; and one storage loaded thousands of times."""
    size = 1 << 16
    rebuild = short('torch._utils') + short('_rebuild_tensor_v2') + b'\x93'
    shape = b'K\x00M\x00\x80\x85K\x01\x85\x89' + short('collections') + short('OrderedDict') + b'\x93)R'
    tensor = b'h\x01(h\x00' + shape + b'tR'
    storage = storage_pickle(size) + b'q\x00'
    tensors = b'\x80\x04](' + storage + rebuild + b'q\x01'
    few, many = tensors + 2 * tensor + b'e.', tensors + 1000 * tensor + b'e.'
    assert [len(value) for value in read_pickle(few)[2:]] == [1 << 15] * 2
    with pytest.raises(UnsafePickleError, match='much more memory'):
        read_pickle(many)
    content = storage[storage.index(b'B') : storage.rindex(b'\x85R')]
    load = short('torch.storage') + short('_load_from_bytes') + b'\x93'
    again = b'\x80\x04](' + load + b'q\x00' + content + b'q\x01' + 1000 * b'h\x00h\x01\x85R' + b'e.'
    with pytest.raises(UnsafePickleError, match='much more memory'):
        read_pickle(again)


def test_containers_without_end():
    with pytest.raises(UnsafePickleError, match='opcodes'):
        read_pickle(b'\x80\x04](' + b'}' * (1 << 21) + b'e.')


NESTED = b'\x80\x04]q\x00' + b''.join(b'](h\x00h\x00e' + b'q\x00' for _ in range(60))


@pytest.mark.parametrize(
    'content',
    [
        NESTED + short('mkdir') + b'\x93.',  # a name whose module is no text
        NESTED + b')R.',
        b'\x80\x04X' + struct.pack('<I', 10**6) + b'x' * 10**6 + short('y') + b'\x93)R.',
        b'\x80\x04' + short('torch\nerror: fine') + short('y') + b'\x93)R.',
        b'\x80\x04}' + short('key') + NESTED[2:] + b'b.',
    ],
    ids=range(5),
)
def test_messages_do_not_hold_what_is_in_the_file(content):
    with pytest.raises(UnsafePickleError) as caught:
        read_pickle(content)
    assert len(str(caught.value)) < 200
    assert 'fine' not in str(caught.value)


def test_shapes_that_torch_refuses_are_named_as_damage():
    storage = torch.zeros(1)._typed_storage()
    call = Call(torch._utils._rebuild_tensor_v2, storage, 0, (0, 2**62, 2**62), (1, 1, 1), False, {})
    with pytest.raises(UnsafePickleError, match='damaged'):
        read_pickle(pickle.dumps(call))


RECORD = pickle.dumps({'prompt': 'a cat', 'prompt_embed_kwargs': {'a': values(torch.float8_e4m3fn, 3, 4)}})


@settings(max_examples=300)
@given(st.integers(0, len(RECORD) - 1), st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(position, byte):
    content = bytearray(RECORD)
    content[position] = byte
    with contextlib.suppress(UnsafePickleError):
        read_pickle(bytes(content))


@settings(max_examples=100)
@given(st.integers(0, len(RECORD) - 1))
def test_any_truncation_is_refused(length):
    with pytest.raises(UnsafePickleError):
        read_pickle(RECORD[:length])
