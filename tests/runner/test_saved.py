"""What runs of two processes leave behind: the best checkpoint, exports, and frozen weights if they are asked for."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from lakonlab.evaluation.metrics import Metric
from lakonlab.models.architecture.roles import named_state
from lakonlab.registry import DATASETS, METRICS
from lakonlab.storage.checkpoint import read_manifest, read_state, read_tensors
from tests import tiny_text_image
from tests.processes import ProcessPool, workers  # noqa: F401
from tests.runner import small_run
from tests.storage.test_interrupted_save import is_complete

STRATEGIES = ('ddp', 'fsdp', 'fsdp2')


@pytest.fixture(scope='module')
def alone():
    """One process."""
    with ProcessPool(1) as pool:
        yield pool


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not different


@METRICS.register_module()
class Scripted(Metric):
    """Gives values one after the other, whatever the samples, as two numbers with contrary rules."""

    better = {'value': 'lower', 'highest': 'higher'}

    def __init__(self, values):
        super().__init__()
        self.values = list(values)

    def reset(self):
        """Nothing is kept."""

    def feed(self, batch):
        """Samples are not looked at."""

    def compute(self):
        """The next value."""
        value = self.values.pop(0)
        return {'value': value, 'highest': value}

    def protocol(self):
        """Nothing has to be equal."""
        return {}


def evaluation(prefix, interval, values, best_metric=None):
    """An entry that keeps the best checkpoint."""
    return dict(
        type='GenerativeEvalHook',
        data='val',
        prefix=prefix,
        interval=interval,
        metrics=[dict(type='Scripted', values=values)],
        viz_num=0,
        save_best_ckpt=True,
        best_metric=best_metric,
    )


def train_and_evaluate(ranks, folder, **changes):
    """A run with the metric of this module."""
    small_run.train(
        ranks,
        folder,
        data__val=dict(type='SmallImages', size=3, key='noise'),
        evaluation=[evaluation('often', 3, [2.0, 1.0]), evaluation('rarely', 5, [1.0])],
        **changes,
    )


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_best_checkpoints_and_exports(workers, alone, tmp_path, strategy):  # noqa: F811
    """The best of one number is saved at an iteration that is saved anyway, that of another one at no such iteration.

    The first one is the third and then, better, the sixth. The run writes in the background; it is compared with one
    that saves every iteration, and neither evaluates nor exports.
    """
    folder, plain = tmp_path / 'run', tmp_path / 'plain'
    folder.mkdir()
    plain.mkdir()
    exported = dict(checkpoint_config__asynchronous=True, checkpoint_config__export='ema')
    workers.run(train_and_evaluate, folder, strategy=strategy, **exported)
    every = dict(checkpoint_config__interval=1, checkpoint_config__max_keep_ckpts=-1)
    workers.run(small_run.train, plain, strategy=strategy, **every)
    found = small_run.checkpoints(folder)
    steps = {'best_val_often_value': 6, 'best_val_rarely_value': 5, 'iter_6': 6, 'iter_8': 8}
    assert {path.name for path in found.iterdir()} == {*steps, '.lock'}
    for name, step in steps.items():
        path, expected = found / name, small_run.checkpoints(plain) / f'iter_{step}'
        assert is_complete(path)
        assert read_state(path)['iteration'] == step
        for part in ('model', 'optimizer'):
            same_bits(read_tensors(path, part), read_tensors(expected, part))
        model, start = read_tensors(path, 'model'), 'diffusion_ema.denoising.'
        average = {name.removeprefix(start): tensor for name, tensor in model.items() if name.startswith(start)}
        same_bits(load_file(path / 'export' / 'diffusion_pytorch_model.safetensors'), average)
        assert any(not torch.equal(tensor, model[f'diffusion.denoising.{name}']) for name, tensor in average.items())
        assert 'export/diffusion_pytorch_model.safetensors' in read_manifest(path)['files']
    best = found / 'best_val_rarely_value'
    (tmp_path / 'alone').mkdir()
    assert alone.run(small_run.train, tmp_path / 'alone', resume_from=str(best)) == [steps[best.name]]


def train_and_keep(ranks, folder, values, **changes):
    """A run that keeps two best checkpoints and one other."""
    return small_run.train(
        ranks,
        folder,
        data__val=dict(type='SmallImages', size=3, key='noise'),
        evaluation=[evaluation('', 2, values, ['value', 'highest'])],
        checkpoint_config__max_keep_ckpts=1,
        **changes,
    )


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_best_checkpoints_of_several_numbers_outlive_resuming(workers, tmp_path, strategy):  # noqa: F811
    """Neither a later save, nor another best, nor the run that goes on removes one; only a better one replaces it."""

    def found():
        run_dir = small_run.checkpoints(tmp_path)
        paths = [path for path in run_dir.iterdir() if path.name != '.lock']
        assert all(is_complete(path) for path in paths)
        return {path.name: read_state(path)['iteration'] for path in paths}

    workers.run(train_and_keep, tmp_path, [2.0, 1.0], strategy=strategy, total_iters=4)
    assert found() == {'best_val_value': 4, 'best_val_highest': 2, 'iter_4': 4}
    assert workers.run(train_and_keep, tmp_path, [3.0, 1.5], strategy=strategy) == [4, 4]
    assert found() == {'best_val_value': 4, 'best_val_highest': 6, 'iter_8': 8}


@DATASETS.register_module()
class SmallPrompts(Dataset):
    """Latents with embedded prompts; item ``i`` is a function of ``i``."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        batch = tiny_text_image.batch('Flux', 1, seed=index)
        embedded = {name: tensor[0] for name, tensor in batch['prompt_embed_kwargs'].items()}
        return {'ids': index, 'name': str(index), 'latents': batch['latents'][0], 'prompt_embed_kwargs': embedded}


def train_adapters(ranks, folder, strategy, weights, total_iters, trainable_only):
    """Train adapters and output layers of a FLUX; returns the first iteration."""
    cfg = small_run.config(ranks.world_size, strategy, total_iters=total_iters, log_config__interval=2)
    cfg.model = tiny_text_image.config('Flux', 'GM', weights)
    cfg.data.train = dict(type='SmallPrompts')
    sections = copy.deepcopy(tiny_text_image.SECTIONS)
    cfg.train_cfg, cfg.test_cfg = {**sections['train_cfg'], 'diffusion_grad_clip': 0.5}, sections['test_cfg']
    cfg.runner.ckpt_trainable_only = trainable_only
    with small_run.small_runner(ranks, folder, cfg) as runner:
        runner.train()
        return runner.first_iter


def teacher_with_another_base(path, folder):
    """Weights of a teacher that differ from others except for its output layers, which no run changes or saves."""
    tensors = load_file(path)
    other = load_file(tiny_text_image.teacher_file('Flux', folder, seed=1))
    file = str(folder / 'other.safetensors')
    save_file({name: tensors[name] if is_output(name) else tensor for name, tensor in other.items()}, file)
    return file


def is_output(name):
    return name.startswith(('norm_out.', 'proj_out.'))


@pytest.mark.parametrize(
    ('strategy', 'trainable_only'),
    [
        *((strategy, False) for strategy in STRATEGIES),
        ('fsdp2', True),
        *(pytest.param(strategy, True, marks=pytest.mark.slow) for strategy in ('ddp', 'fsdp')),
    ],
)
def test_frozen_weights_of_adapters(workers, tmp_path, strategy, trainable_only):  # noqa: F811
    """By default adapters, output layers and averages are saved; else the base too, which a resumed run then reads."""
    weights = tiny_text_image.teacher_file('Flux', tmp_path)
    run, whole = tmp_path / 'run', tmp_path / 'whole'
    run.mkdir()
    whole.mkdir()
    options = dict(strategy=strategy, trainable_only=trainable_only)
    assert workers.run(train_adapters, whole, weights=weights, total_iters=4, **options) == [0, 0]
    assert workers.run(train_adapters, run, weights=weights, total_iters=2, **options) == [0, 0]
    again = weights if trainable_only else teacher_with_another_base(weights, tmp_path)
    assert workers.run(train_adapters, run, weights=again, total_iters=4, **options) == [2, 2]
    small_run.assert_same_run(run, whole)

    model = tiny_text_image.build(tiny_text_image.config('Flux', 'GM', weights))
    trained = {name for name, tensor in named_state(model) if tensor.requires_grad}
    assert all('.lora_' in name or '.norm_out.' in name or '.proj_out_' in name for name in trained)
    averages = {name.replace('diffusion.', 'diffusion_ema.', 1) for name in trained}
    saved = read_tensors(small_run.checkpoints(run) / 'iter_4', 'model')
    assert saved.keys() >= trained | averages
    base = {name: tensor for name, tensor in saved.items() if name not in trained | averages}
    if trainable_only:
        assert not base
        return
    base = {name.removeprefix('diffusion.denoising.').replace('.base_layer.', '.'): base[name] for name in base}
    same_bits(base, {name: tensor for name, tensor in load_file(weights).items() if not is_output(name)})
