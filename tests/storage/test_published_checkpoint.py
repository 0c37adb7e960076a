"""Published training checkpoints: what is read, and that nothing in them is ever run."""

import argparse
import os
import zipfile

import numpy as np
import pytest
import torch

from lakonlab.storage.checkpoint import CheckpointError
from lakonlab.storage.published_checkpoint import read_published_checkpoint

MODEL = {'diffusion.denoising.a': torch.randn(2, 3), 'diffusion_ema.denoising.a': torch.randn(2, 3).half()}
SLOTS = {'step': torch.tensor(3.0), 'exp_avg': torch.randn(2, 3), 'exp_avg_sq': torch.rand(2, 3).bfloat16()}
META = {'iter': 3, 'epoch': 1, 'seed': 7, 'exp_name': 'run.py', 'config': 'x = 1', 'hook_msgs': {'last_ckpt': 'a'}}


def content(**changes):
    optimizer = {'diffusion': {'state': {'denoising.a': SLOTS}, 'param_groups': [{'params': ['denoising.a']}]}}
    return {'meta': META, 'state_dict': MODEL, 'optimizer': optimizer, **changes}


def save(path, value, **options):
    torch.save(value, path, **options)
    return path


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f'touch {self.flag}',)


def test_content(tmp_path):
    read = read_published_checkpoint(save(tmp_path / 'iter_3.pth', content()))
    assert (read.iteration, read.seed, read.experiment, read.config_text) == (3, 7, 'run.py', 'x = 1')
    assert not read.has_loss_scaler
    assert read.model.keys() == MODEL.keys()
    for name, tensor in MODEL.items():
        assert read.model[name].dtype == tensor.dtype
        assert torch.equal(read.model[name], tensor)
    (slots,) = (read.optimizers['diffusion'][name] for name in ['diffusion.denoising.a'])
    assert slots.keys() == SLOTS.keys()
    assert all(torch.equal(slots[slot], value) for slot, value in SLOTS.items())


@pytest.mark.parametrize('name', ['denoising.a', 'diffusion.denoising.a'])
def test_names_relative_to_what_is_trained_or_to_the_model(tmp_path, name):
    optimizer = {'diffusion': {'state': {name: {'step': 5}}, 'param_groups': []}}
    read = read_published_checkpoint(save(tmp_path / 'a.pth', content(optimizer=optimizer)))
    assert read.optimizers == {'diffusion': {'diffusion.denoising.a': {'step': 5}}}


def test_slots_one_level_deeper(tmp_path):
    nested = {'step': 5, '__bnb_optimizer_quant_state__': {'state1': torch.zeros(4, dtype=torch.uint8)}}
    optimizer = {'diffusion': {'state': {'denoising.a': nested}, 'param_groups': []}}
    read = read_published_checkpoint(save(tmp_path / 'a.pth', content(optimizer=optimizer)))
    assert read.optimizers['diffusion']['diffusion.denoising.a'].keys() == {'step', 'state1'}


def test_older_file_format(tmp_path):
    path = save(tmp_path / 'a.pth', content(), _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert torch.equal(read_published_checkpoint(path).model['diffusion.denoising.a'], MODEL['diffusion.denoising.a'])


def test_without_optimizer_and_with_loss_scaler(tmp_path):
    value = {'meta': {'iter': 0}, 'state_dict': MODEL, 'loss_scaler': {'scale': 2.0}}
    read = read_published_checkpoint(save(tmp_path / 'a.pth', value))
    assert (read.iteration, read.seed, read.optimizers, read.has_loss_scaler) == (0, None, {}, True)


@pytest.mark.parametrize('number', [np.float64(1.25), np.float32(1.25), np.float16(1.25), np.int64(3), np.bool_(True)])
@pytest.mark.parametrize('module', ['numpy._core.multiarray', 'numpy.core.multiarray'])
def test_numbers_of_numpy_are_plain(tmp_path, number, module):
    """The best score of a run is one."""
    path = save(tmp_path / 'a.pth', content(meta={**META, 'iter': np.int64(3), 'best_score': number}))
    renamed = tmp_path / 'b.pth'
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(renamed, 'w') as after:
        for item in before.infolist():
            data = before.read(item)
            after.writestr(item, data.replace(b'numpy._core.multiarray', module.encode()))
    read = read_published_checkpoint(renamed)
    assert read.iteration == 3
    assert type(read.iteration) is int


@pytest.mark.parametrize('place', ['meta', 'optimizer', 'state_dict', 'all'])
@pytest.mark.parametrize('as_archive', [True, False])
def test_hidden_code_is_refused_and_not_run(tmp_path, place, as_archive):
    trap = Trap(tmp_path / 'flag')
    value = trap if place == 'all' else content()
    if place != 'all':
        value[place] = {**value[place], 'trap': trap}
    path = save(tmp_path / 'a.pth', value, _use_new_zipfile_serialization=as_archive)
    with pytest.raises(CheckpointError, match='could run code') as error:
        read_published_checkpoint(path)
    assert not as_archive or 'posix.system' in str(error.value) or 'nt.system' in str(error.value)
    assert not (tmp_path / 'flag').exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert (tmp_path / 'flag').exists()


def test_odd_object_in_meta_is_named(tmp_path):
    odd = {**META, 'best': np.float64(1), 'args': argparse.Namespace(a=1)}
    with pytest.raises(CheckpointError, match=r'numbers or texts \(argparse.Namespace\)'):
        read_published_checkpoint(save(tmp_path / 'a.pth', content(meta=odd)))


def test_array_of_numpy_is_no_number(tmp_path):
    with pytest.raises(CheckpointError, match='_reconstruct'):
        read_published_checkpoint(save(tmp_path / 'a.pth', content(meta={**META, 'best': np.zeros(2)})))


@pytest.mark.parametrize('length', [0, 10, 0.5, 0.99])
def test_damaged(tmp_path, length):
    path = save(tmp_path / 'a.pth', content())
    data = path.read_bytes()
    path.write_bytes(data[: length if isinstance(length, int) else int(length * len(data))])
    with pytest.raises(CheckpointError, match=r'a\.pth'):
        read_published_checkpoint(path)


@pytest.mark.parametrize(
    'value',
    [
        MODEL,
        {'state_dict': MODEL},
        {'meta': {'epoch': 3}, 'state_dict': MODEL},
        {'meta': {'iter': -1}, 'state_dict': MODEL},
        {'meta': {'iter': 1}, 'state_dict': [1]},
        [1, 2],
        None,
    ],
)
def test_weights_alone_are_no_training_checkpoint(tmp_path, value):
    with pytest.raises(CheckpointError, match=r'is no training checkpoint.*pretrained'):
        read_published_checkpoint(save(tmp_path / 'a.pth', value))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'state_dict': {'a': 1}}, 'state_dict holds values that are no tensors: a'),
        ({'optimizer': {'diffusion': 3}}, 'a dict for every path'),
        ({'optimizer': {'diffusion': {'param_groups': []}}}, r"optimizer\['diffusion'\] has no `state`"),
        ({'optimizer': {'diffusion': {'state': {0: SLOTS}}}}, 'numbers the parameters.*--no-optimizer'),
        ({'optimizer': {'diffusion': {'state': {'denoising.b': SLOTS}}}}, r'1 parameters .* denoising\.b'),
        (
            {'optimizer': {'diffusion': {'state': {'denoising.a': {'step': [1]}}}}},
            r'step of diffusion\.denoising\.a is a list',
        ),
    ],
)
def test_content_that_makes_no_sense(tmp_path, changes, message):
    path = save(tmp_path / 'a.pth', content(**changes))
    with pytest.raises(CheckpointError, match=message):
        read_published_checkpoint(path)
    if 'optimizer' in changes:
        assert read_published_checkpoint(path, with_optimizers=False).optimizers == {}


def test_missing_and_remote(tmp_path, server):
    with pytest.raises(CheckpointError, match='does not exist'):
        read_published_checkpoint(tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'absent/a\.pth.*does not exist'):
        read_published_checkpoint(f'{server.url}/absent/a.pth')
    server.content = save(tmp_path / 'b.pth', content()).read_bytes()
    assert read_published_checkpoint(f'{server.url}/ranged/b.pth').iteration == content()['meta']['iter']
