import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[2] / 'demo' / 'train_gmflow_toymodel.py'
TINY = ['-k', '4', '--batch-size', '64', '--num-iters', '3', '--num-samples', '200', '--nfe', '2', '--device', 'cpu']


@pytest.fixture(scope='module')
def demo():
    spec = importlib.util.spec_from_file_location('train_gmflow_toymodel', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_defaults_are_the_published_ones(demo):
    options = demo.parse_arguments([])
    assert (options.num_gaussians, options.batch_size, options.num_iters, options.lr) == (32, 4096, 50000, 2e-4)
    assert (options.nfe, options.out, options.num_samples) == (8, Path('gmflow_toymodel.png'), 1_000_000)
    assert options.lr_schedule == 'constant'


def test_quick_is_smaller_and_flags_override_it(demo):
    usual, quick = demo.parse_arguments([]), demo.parse_arguments(['--quick'])
    for name in ('batch_size', 'num_iters', 'num_samples'):
        assert getattr(quick, name) < getattr(usual, name)
    overridden = demo.parse_arguments(['--num-iters', '7', '--quick', '--batch-size', '4096', '--lr', '2e-4'])
    assert (overridden.num_iters, overridden.batch_size, overridden.lr) == (7, 4096, 2e-4)
    assert overridden.num_samples == quick.num_samples


def test_saves_a_picture_and_says_how_it_went(demo, capsys):
    assert demo.main([*TINY, '--out', 'new/picture.png']) == 0
    output = capsys.readouterr().out
    assert 'iteration 3: loss ' in output
    assert 'of 200 points lie on white squares' in output
    assert 'saved new/picture.png' in output
    pixels = np.asarray(Image.open('new/picture.png'))
    assert pixels.shape == (200, 200, 3)


def test_a_seed_gives_the_same_picture(demo):
    pictures = {}
    for name, seed in {'a': '1', 'b': '1', 'c': '2'}.items():
        torch.rand(1)  # what was drawn before does not matter
        assert demo.main([*TINY, '--seed', seed, '--out', f'{name}.png']) == 0
        pictures[name] = Path(f'{name}.png').read_bytes()
    assert pictures['a'] == pictures['b'] != pictures['c']


def test_training_lowers_the_loss(demo, capsys, monkeypatch):
    monkeypatch.setattr(demo, 'LOG_INTERVAL', 10)
    assert demo.main([*TINY, '--num-iters', '40', '--lr', '2e-3']) == 0
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith('iteration')]
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_no_number_ends_the_run(demo, capsys):
    assert demo.main([*TINY, '--num-iters', '40', '--lr', '1e38']) == 1
    assert 'smaller --lr' in capsys.readouterr().err
    assert not Path('gmflow_toymodel.png').exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--batch-size', '0'], '0: expected a positive number'),
        (['--num-iters', '-5'], 'expected a positive number'),
        (['--lr', 'nan'], 'expected a positive number'),
        (['--cells', '7'], '7: expected a divisor of 200'),
        (['--device', 'abacus'], 'abacus: cannot be used'),
        (['--lr-schedule', 'linear'], 'invalid choice'),
        (['--steps', '8'], 'unrecognized arguments: --steps'),
        (['--out', 'file/picture.png'], '--out: file/picture.png: cannot be written'),
        (['--out', '.'], 'argument --out'),
    ],
)
def test_bad_flags_are_refused_before_training(demo, capsys, flags, message):
    Path('file').touch()
    with pytest.raises(SystemExit) as error:
        demo.main([*TINY, *flags])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
