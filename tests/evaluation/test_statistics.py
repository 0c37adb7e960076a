import pickle

import numpy as np
import pytest
import torch

from lakonlab.evaluation.statistics import ReferenceStatistics, read_reference
from lakonlab.storage import array_pickle
from lakonlab.storage.errors import StorageError
from tests.evaluation.test_feature_distances import features


def arrays(count=40):
    values = features(count, 5)
    return values.double().mean(0).numpy(), np.cov(values.double().numpy(), rowvar=False), values.numpy()


def published(path, protocol=4, **changes):
    mean, covariance, values = arrays()
    content = dict(mean=mean, cov=covariance, real_feats_np=values, num_real_feeded=40)
    path.write_bytes(pickle.dumps({**content, **changes}, protocol=protocol))
    return path


def check(read):
    mean, covariance, values = arrays()
    np.testing.assert_array_equal(read.mean, mean)
    np.testing.assert_array_equal(read.covariance, covariance)
    np.testing.assert_array_equal(read.features, values)
    assert (read.mean.dtype, read.features.dtype) == (torch.float64, torch.float32)
    assert read.num_images == 40
    assert len(read.sha256) == 64


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('core', ['numpy._core', 'numpy.core'])
def test_published_layout(tmp_path, protocol, core):
    path = published(tmp_path / 'a.pkl', protocol, num_real_feeded=np.int64(40))
    content = path.read_bytes()
    if protocol < 4:  # names of older versions of NumPy have no length in front
        path.write_bytes(content.replace(b'numpy._core', core.encode()))
    check(read_reference(path))


def test_order_and_byte_order_of_arrays(tmp_path):
    mean, covariance, values = arrays()
    changes = dict(mean=mean.astype('>f8'), cov=np.asfortranarray(covariance), real_feats_np=values.astype(np.float32))
    check(read_reference(published(tmp_path / 'a.pkl', **changes)))


class Evil:
    def __reduce__(self):
        return print, ('this must not run',)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(more=Evil()), r'names builtins.print, .* nothing was run'),
        (dict(mean=np.array([Evil()], dtype=object)), 'elements of object'),
        (dict(mean=np.ma.masked_array([1.0])), r'names numpy\.ma'),
        (dict(mean='text'), 'no mean and covariance'),
        (dict(mean=np.zeros(4)), r'mean \(4,\) and covariance \(5, 5\) differ'),
        (dict(real_feats_np=np.zeros((3, 4))), r'features \(3, 4\) do not fit'),
        (dict(mean=np.full(5, np.nan)), 'not finite'),
        (dict(nested=[np.zeros(3)]), 'is a list'),
    ],
)
def test_pickles_that_are_refused(tmp_path, capsys, changes, message):
    with pytest.raises(ValueError, match=message):
        read_reference(published(tmp_path / 'a.pkl', **changes))
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('name', ['numpy ndarray', 'numpy dtype', '_codecs encode', 'numpy._core.multiarray scalar'])
@pytest.mark.parametrize('state', [b'}Vmark\nI1\ns', b'N}Vmark\nI1\ns\x86'])  # attributes, and those of slots
def test_pickles_that_change_what_they_name_are_refused(tmp_path, name, state):
    module, _, attribute = name.partition(' ')
    path = tmp_path / 'a.pkl'
    path.write_bytes(b'\x80\x02c' + f'{module}\n{attribute}\n'.encode() + state + b'b.')
    with pytest.raises(ValueError, match='it changes what it names; nothing was run'):
        read_reference(path)
    assert not hasattr(array_pickle.CALLS[f'{module}.{attribute}'], 'mark')


@pytest.mark.parametrize('cut', [10, 300, 1000])
def test_damaged_pickles(tmp_path, cut):
    path = published(tmp_path / 'a.pkl')
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match='damaged'):
        read_reference(path)


@pytest.mark.parametrize('names', [('mean', 'cov', 'features'), ('mu', 'sigma', 'pool_3')])
def test_npz(tmp_path, names):
    np.savez(tmp_path / 'a.npz', **dict(zip(names, arrays())))
    check(read_reference(tmp_path / 'a.npz'))
    mean, covariance, _ = arrays()
    np.savez(tmp_path / 'moments.npz', mu=mean, sigma=covariance)
    moments = read_reference(tmp_path / 'moments.npz')
    assert (moments.features, moments.num_images) == (None, None)


def test_other_files(tmp_path):
    np.savez(tmp_path / 'images.npz', arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match='holds images, not statistics'):
        read_reference(tmp_path / 'images.npz')
    np.savez(tmp_path / 'objects.npz', mu=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match='damaged'):
        read_reference(tmp_path / 'objects.npz')
    with pytest.raises(ValueError, match=r'ends in \.safetensors, \.pkl, \.npz'):
        read_reference(published(tmp_path / 'a.bin'))
    with pytest.raises(FileNotFoundError, match=r'^key: .*missing\.pkl'):
        read_reference(tmp_path / 'missing.pkl', 'key')
    with pytest.raises(ValueError, match=r'^key: .*images\.npz.*holds images'):
        read_reference(tmp_path / 'images.npz', 'key')
    with pytest.raises(StorageError, match=r'^key: '):
        read_reference('ftp://host/a.npz', 'key')


def test_ours(tmp_path):
    mean, covariance, values = map(torch.from_numpy, arrays())
    statistics = ReferenceStatistics(mean, covariance, 40, values, dict(source='here', extractor=dict(name='x')))
    statistics.save(tmp_path / 'a.safetensors')
    read = read_reference(tmp_path / 'a.safetensors')
    check(read)
    assert read.provenance == statistics.provenance
    assert read_reference(tmp_path / 'a.safetensors') is read
    ReferenceStatistics(mean + 1, covariance, 40).save(tmp_path / 'a.safetensors')
    assert read_reference(tmp_path / 'a.safetensors').features is None
