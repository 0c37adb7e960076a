"""The tools that look after checkpoints."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lakonlab.runner.checkpoint_tools import clean_checkpoints, count_parameters, save_inference_weights
from lakonlab.storage.checkpoint import CheckpointError, write_checkpoint

LORA = 'layer.lora_A.default.weight'


def tensors(scale=1.0):
    names = {'weight': (3, 4), LORA: (2, 4)}
    roles = ('diffusion', 'diffusion_ema')
    return {f'{role}.denoising.{name}': torch.full(shape, scale) for role in roles for name, shape in names.items()}


def save(run, step, name=None, **options):
    return write_checkpoint(run, step, {'model': tensors(**options)}, {}, name=name)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def inference(path, **options):
    return Namespace(**{'path': str(path), 'out_path': None, 'dtype': 'float16', 'ema_only': False, **options})


def test_weights_for_inference(tmp_path, capsys):
    save(tmp_path, 3)
    assert save_inference_weights(inference(tmp_path / 'latest')) == 0
    state = load_file(tmp_path / 'iter_3_inference.safetensors')
    assert state.keys() == tensors().keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    out = tmp_path / 'elsewhere' / 'average.safetensors'
    save_inference_weights(inference(tmp_path / 'iter_3', out_path=str(out), ema_only=True, dtype='float32'))
    assert all(name.startswith('diffusion_ema.') for name in load_file(out))
    save(tmp_path, 4, scale=1e6)
    with pytest.raises(CheckpointError, match='choose another --dtype'):
        save_inference_weights(inference(tmp_path))
    assert 'tensors' in capsys.readouterr().out


def test_published_checkpoint(tmp_path):
    torch.save({'meta': {'iter': 5}, 'state_dict': tensors()}, tmp_path / 'iter_5.pth')
    save_inference_weights(inference(tmp_path / 'iter_5.pth'))
    assert load_file(tmp_path / 'iter_5_inference.safetensors').keys() == tensors().keys()


def test_counts(tmp_path, capsys):
    path = save(tmp_path, 3)
    count_parameters(Namespace(path=str(path), ema_only=False))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f'{role}: 20 parameters, 0.00 M (12 of layers, 8 of LoRA)' for role in ('diffusion', 'diffusion_ema')
    ]
    save_file({'a': torch.zeros(1500, 1000)}, tmp_path / 'x.safetensors')
    count_parameters(Namespace(path=str(tmp_path / 'x.safetensors'), ema_only=False))
    assert capsys.readouterr().out == 'weights: 1,500,000 parameters, 1.50 M\n'


def clean(path, answer='no', **options):
    asked = []

    def ask(question):
        asked.append(question)
        return answer

    options = {'dry_run': False, 'yes': False, 'save_inf': False, 'dtype': 'float32', **options}
    clean_checkpoints(Namespace(path=str(path), **options), ask)
    return asked


def test_cleaning(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 2, name='best_frechet_distance')
    everything = names(tmp_path)
    assert clean(tmp_path, dry_run=True) == []
    assert len(clean(tmp_path, 'no')) == len(clean(tmp_path, '')) == 1
    assert names(tmp_path) == everything
    assert 'iter_2, iter_1 will be removed' in capsys.readouterr().out
    clean(tmp_path, 'y', save_inf=True)
    kept = ['best_frechet_distance', 'iter_1_inference.safetensors', 'iter_2_inference.safetensors', 'iter_3']
    assert [name for name in names(tmp_path) if not name.startswith('.')] == kept
    assert clean(tmp_path, 'y') == []


def test_a_damaged_newest_is_no_reason_to_remove_what_the_run_goes_on_from(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    next((tmp_path / 'iter_3' / 'model').iterdir()).write_bytes(b'')
    clean(tmp_path, yes=True)
    assert [name for name in names(tmp_path) if not name.startswith('.')] == ['iter_2', 'iter_3']


def test_a_directory_that_is_none_of_a_run_is_an_error(tmp_path):
    run = tmp_path / 'checkpoints' / 'my_run'
    save(run, 1)
    with pytest.raises(CheckpointError, match='holds no checkpoints: name one of the runs in it, my_run'):
        clean(tmp_path / 'checkpoints', yes=True)
    with pytest.raises(CheckpointError, match=f'is a single checkpoint: name the directory of the run, {run}'):
        clean(run / 'iter_1', yes=True)
    (tmp_path / 'other' / 'folder').mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r'holds no checkpoints, neither iter_<n> nor iter_<n>\.pth'):
        clean(tmp_path / 'other', yes=True)
    assert clean(run) == []


def test_cleaning_of_published_checkpoints(tmp_path):
    for name in ('iter_100', 'iter_200', 'iter_300', 'best_fid_iter_100'):
        (tmp_path / f'{name}.pth').write_bytes(b'x')
    (tmp_path / 'latest.pth').symlink_to('iter_200.pth')
    clean(tmp_path, yes=True)
    assert names(tmp_path) == ['best_fid_iter_100.pth', 'iter_200.pth', 'iter_300.pth', 'latest.pth']


def test_nobody_answers(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step)
    before = names(tmp_path)

    def ask(question):
        raise EOFError

    assert clean_checkpoints(Namespace(path=str(tmp_path), dry_run=False, yes=False, save_inf=False), ask) == 0
    assert names(tmp_path) == before
    assert 'nothing was removed' in capsys.readouterr().out


def test_weights_of_a_remote_run_need_a_place():
    with pytest.raises(CheckpointError, match='say where to write the weights with --out-path'):
        save_inference_weights(inference('s3://bucket/run/latest'))
