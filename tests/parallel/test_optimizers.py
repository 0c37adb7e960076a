"""Optimisers of every strategy: the numbers of one process, exact checkpoints, and what is refused."""

import contextlib
import inspect
import logging
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lakonlab.parallel import block_moments
from lakonlab.parallel.optimizer_classes import BY_SHAPE, NEVER, NOT_BY_ROWS
from lakonlab.parallel.single import SingleProcess
from lakonlab.registry import STRATEGIES
from lakonlab.runner.optimizer import build_optimizers
from lakonlab.storage.checkpoint import CheckpointError, read_state, write_checkpoint

SHAPES = {
    'even': (64, 128),  # two parts of 16 blocks
    'late': (545, 16),  # the second of two parts is whole blocks, the first and both together are not
    'odd': (33, 129),
    'row': (1, 16),  # one process holds none of it
    'bias': (3,),
}
ELEMENTWISE = [
    ('ASGD', {'t0': 1.0}),
    ('Adadelta', {}),
    ('Adagrad', {}),
    ('Adam', {'amsgrad': True}),
    ('AdamW', {}),
    ('AdamW', {'foreach': True}),
    ('AdamW', {'capturable': True, 'fused': True}),
    ('Adamax', {}),
    ('NAdam', {}),
    ('RAdam', {}),
    ('RMSprop', {'momentum': 0.9, 'centered': True}),
    ('Rprop', {}),
    ('SGD', {}),
    ('SGD', {'momentum': 0.9, 'nesterov': True}),
]
SHARDED = ('fsdp', 'fsdp2')
NUM_STEPS = 2
LR = 1e-2


class Network(nn.Module):
    """Has a gradient of its own at every number."""

    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((parameter * (x + i)).sin().sum() for i, parameter in enumerate(self.parameters()))


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Module()
    model.diffusion = nn.Module()
    model.diffusion.denoising = Network().to(dtype)
    return model


class Training:
    """A small run; every process sees the same batch, so the mean of gradients is that of one process."""

    def __init__(self, ranks, strategy, dtype=torch.float32, **options):
        self.ranks = ranks
        self.strategy = STRATEGIES.build({'type': strategy, 'ranks': ranks, 'device': 'cpu'})
        self.model = self.strategy.wrap(make_model(dtype))
        section = {'diffusion': {'lr': LR, **options}}
        self.optimizers = build_optimizers(self.model, section, self.strategy.optimizer_class)
        self.number = 0

    def step(self, times=NUM_STEPS):
        for _ in range(times):
            self.number += 1
            self.optimizers['diffusion'].zero_grad()
            with self.strategy.accumulating(True):
                self.model.diffusion.denoising(torch.tensor(0.1 * self.number)).backward()
            self.optimizers['diffusion'].step()

    def save(self, folder):
        tensors, plain = self.strategy.optimizer_state(self.model, self.optimizers)
        parts = {'model': self.strategy.model_state(self.model), 'optimizer': tensors}
        return write_checkpoint(folder, self.number, parts, {'optimizers': plain}, ranks=self.ranks)

    def load(self, checkpoint):
        self.number = int(checkpoint.name.removeprefix('iter_'))
        self.strategy.load_model_state(self.model, checkpoint)
        plain = read_state(checkpoint)['optimizers']
        self.strategy.load_optimizer_state(self.model, self.optimizers, checkpoint, plain)
        self.strategy.report_restored(checkpoint)

    def state(self):
        """What this process holds, by name."""
        tensors, plain = self.strategy.optimizer_state(self.model, self.optimizers)
        held = {**self.strategy.model_state(self.model), **tensors}
        copies = {name: (p.shape, p.boxes, [tensor.clone() for tensor in p.tensors]) for name, p in held.items()}
        return copies, plain


def interrupted(ranks, strategy, folder, **options):
    """States of a run without a break and of one that is resumed twice, after the same steps; and its checkpoint."""
    straight = Training(ranks, strategy, **options)
    straight.step(NUM_STEPS)
    checkpoint = straight.save(folder)
    straight.step(2 * NUM_STEPS)
    for _ in range(2):
        resumed = Training(ranks, strategy, **options)
        resumed.load(checkpoint)
        resumed.step(NUM_STEPS)
        checkpoint = resumed.save(folder)
    return straight.state(), resumed.state(), checkpoint


def plainly(ranks, name, num_steps=3 * NUM_STEPS, **options):
    """Weights after some steps of an optimiser of torch, without anything of ours."""
    model = make_model()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=LR, **options)
    for number in range(1, num_steps + 1):
        optimizer.zero_grad()
        model.diffusion.denoising(torch.tensor(0.1 * number)).backward()
        optimizer.step()
    return model.state_dict()


def go_on(ranks, strategy, checkpoint, num_steps=0, **options):
    """State after going on from a checkpoint, and what was logged."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger('lakonlab')
    logger.addHandler(handler)
    try:
        training = Training(ranks, strategy, **options)
        training.load(checkpoint)
        training.step(num_steps)
    finally:
        logger.removeHandler(handler)
    return *training.state(), records


def refused(ranks, strategy, checkpoint, **options):
    """The error of going on from a checkpoint."""
    with pytest.raises(CheckpointError) as error:
        Training(ranks, strategy, **options).load(checkpoint)
    return str(error.value)


def equal(state, other):
    (tensors, plain), (others, other_plain) = state, other
    assert plain == other_plain
    assert tensors.keys() == others.keys()
    for name, (shape, boxes, values) in tensors.items():
        assert (shape, boxes) == others[name][:2], name
        for value, expected in zip(values, others[name][2]):
            assert value.dtype == expected.dtype, name
            assert torch.equal(value, expected), name


def weights(states):
    """Whole weights from what processes hold."""
    whole = {}
    for tensors, *_ in states:
        for name, (shape, boxes, values) in tensors.items():
            if '/' not in name:
                target = whole.setdefault(name, torch.full(shape, torch.nan))
                for (offsets, sizes), value in zip(boxes, values):
                    target[tuple(slice(start, start + size) for start, size in zip(offsets, sizes))] = value
    return whole


def farthest(found, expected):
    assert found.keys() == expected.keys()
    return max((tensor - expected[name]).abs().max().item() for name, tensor in found.items())


def eight_bits(package):
    pytest.importorskip(package, reason=f'needs {package}: pip install {package}')


# -- torch's own


def test_all_optimizers_of_torch_are_sorted():
    """One that a new torch brings has to be tried before a strategy takes it."""
    classes = {
        name
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    assert classes == {name for name, _ in ELEMENTWISE} | {*BY_SHAPE, *NEVER}


@pytest.mark.parametrize(
    ('name', 'options', 'strategy'),
    [
        pytest.param(name, options, strategy, id=f'{name} {", ".join(options)} {strategy}')
        for name, options in ELEMENTWISE
        for strategy in ('ddp', *SHARDED)
        if strategy != 'fsdp2' or name not in NOT_BY_ROWS
    ],
)
def test_what_treats_every_number_by_itself(runs, tmp_path, strategy, name, options):
    results = runs.call(2, interrupted, strategy, tmp_path, type=name, **options)
    for straight, resumed, _ in results:
        equal(resumed, straight)
    (expected,) = runs.call(1, plainly, name, **options)
    assert farthest(weights([straight for straight, *_ in results]), expected) < 1e-6


@pytest.mark.parametrize('name', [*BY_SHAPE, *NEVER, *NOT_BY_ROWS, 'AdamX'])
@pytest.mark.parametrize('strategy', ['single', 'ddp', *SHARDED])
def test_what_cannot_run_is_refused(strategy, name):
    kind = STRATEGIES.get(strategy)
    is_fine = strategy not in SHARDED if name in BY_SHAPE else name in NOT_BY_ROWS and strategy != 'fsdp2'
    if is_fine:
        assert kind.optimizer_class(name) is getattr(torch.optim, name)
        return
    with pytest.raises(ValueError, match=f'{name}.*AdamW'):
        kind.optimizer_class(name)
    engine = kind(device='cpu')
    with pytest.raises(ValueError, match=rf"^optimizer\['diffusion'\]\.type: .*{name}"):
        engine.check_optimizer('diffusion', {'type': name})


def build_fused(ranks, name):
    with pytest.raises(ValueError, match=r"optimizer\['diffusion'\]\.fused=True"):
        Training(ranks, 'fsdp2', type=name, fused=True)
    return Training(ranks, 'fsdp2', type=name).optimizers['diffusion'].param_groups[0]['fused']


def test_one_kernel_for_parameters_divided_by_rows(runs):
    assert runs.call(1, build_fused, 'SGD') == [None]
    assert runs.call(1, build_fused, 'Adagrad') == [None]


def test_what_is_no_moment_keeps_its_precision(tmp_path):
    """torch itself casts all that it loads to the dtype of the parameter."""
    strategy, model = SingleProcess(device='cpu'), make_model(torch.bfloat16)
    optimizers = build_optimizers(model, {'diffusion': dict(type='NAdam', lr=LR)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers['diffusion'].step()
    tensors, plain = strategy.optimizer_state(model, optimizers)
    path = write_checkpoint(tmp_path, 1, {'optimizer': tensors}, {})
    others = build_optimizers(model, {'diffusion': dict(type='NAdam', lr=LR)})
    strategy.load_optimizer_state(model, others, path, plain)
    for parameter in model.parameters():
        product = optimizers['diffusion'].state[parameter]['mu_product']
        loaded = others['diffusion'].state[parameter]['mu_product']
        assert product.bfloat16() != product
        assert loaded.dtype == torch.float32
        assert loaded == product


# -- 8 bits where parameters are whole: bitsandbytes


@pytest.mark.parametrize('name', ['AdamW8bit', 'Lion8bit', 'AdEMAMix8bit', 'AdamW32bit'])
def test_bitsandbytes_in_one_process(runs, tmp_path, name):
    eight_bits('bitsandbytes')
    ((straight, resumed, _),) = runs.call(1, interrupted, 'single', tmp_path, type=name)
    equal(resumed, straight)
    codes = straight[0]['diffusion/state1/diffusion.denoising.even'][2][0]
    assert codes.dtype == (torch.float32 if name.endswith('32bit') else torch.uint8)


def test_bitsandbytes_in_two_processes(runs, tmp_path):
    eight_bits('bitsandbytes')
    results = runs.call(2, interrupted, 'ddp', tmp_path, type='AdamW8bit')
    for straight, resumed, _ in results:
        equal(resumed, straight)
        equal(straight, results[0][0])
    found, (expected,) = weights([results[0][0]]), runs.call(1, plainly, 'AdamW')
    assert 0 < farthest(found, expected) < 0.3 * LR  # of six steps of at most LR
    ((tensors, plain, _),) = runs.call(1, go_on, 'single', results[0][2], type='AdamW8bit')
    equal((tensors, plain), results[0][1])


def test_what_of_bitsandbytes_is_refused():
    for name in ('AdamW8bit', 'Lion8bit', 'PagedAdamW32bit', 'LAMB8bit'):
        with pytest.raises(ValueError, match=f"{name!r}.* needs whole parameters.*'fsdp' divides.*'ddp'.*'AdamW'"):
            STRATEGIES.get('fsdp').optimizer_class(name)
    with pytest.raises(ValueError, match=r"'AdamW8bit'.*or to 'fsdp2', where torchao has it"):
        STRATEGIES.get('fsdp').optimizer_class('AdamW8bit')
    with pytest.raises(ValueError, match=r"'Lion8bit'.*'fsdp2' divides"):
        STRATEGIES.get('fsdp2').optimizer_class('Lion8bit')


# -- 8 bits where parameters are divided by rows: torchao


@pytest.mark.parametrize('world_size', [1, 2])
def test_torchao_resumes_exactly(runs, tmp_path, world_size):
    eight_bits('torchao')
    results = runs.call(world_size, interrupted, 'fsdp2', tmp_path, type='AdamW8bit', weight_decay=0.1)
    for straight, resumed, _ in results:
        equal(resumed, straight)
    found = weights([straight for straight, *_ in results])
    (expected,) = runs.call(1, plainly, 'AdamW', weight_decay=0.1)
    assert 0 < farthest(found, expected) < 0.3 * LR
    slots = {
        name.split('/')[1] for result in results for name in result[0][0] if '/' in name and name.endswith('.even')
    }
    parts = ('0', '4096')[:world_size]
    coded = {f'{slot}.{kind}[{p}]' for slot in ('exp_avg', 'exp_avg_sq') for kind in ('codes', 'scale') for p in parts}
    assert {slot for slot in slots if '[' in slot} == coded


def by_torchao_alone(ranks, num_steps):
    import torchao.optim

    model = make_model()
    optimizer = torchao.optim.AdamW8bit(model.parameters(), lr=LR)
    for number in range(1, num_steps + 1):
        optimizer.zero_grad()
        model.diffusion.denoising(torch.tensor(0.1 * number)).backward()
        with torch.compiler.set_stance('force_eager'):
            optimizer.step()
    return model.state_dict()


def test_torchao_computes_what_it_does_by_itself(runs, tmp_path):
    eight_bits('torchao')
    ((straight, _, _),) = runs.call(1, interrupted, 'fsdp2', tmp_path, type='AdamW8bit')
    (expected,) = runs.call(1, by_torchao_alone, 3 * NUM_STEPS)
    assert farthest(weights([straight]), expected) == 0


def rates(ranks):
    training = Training(ranks, 'fsdp2', type='AdamW8bit', paramwise_cfg={'custom_keys': {'bias': {'lr_mult': 0.5}}})
    before = training.state()[0]
    groups = training.optimizers['diffusion'].param_groups
    for group in groups:
        group['lr'] = 0.0
    training.step()
    unchanged = all(torch.equal(a, b) for n, p in before.items() for a, b in zip(p[2], training.state()[0][n][2]))
    return [(group['initial_lr'], group['lr']) for group in groups], unchanged


def test_learning_rates_stay_plain_numbers(runs):
    """A schedule sets them, logs show them, and processes compare them."""
    eight_bits('torchao')
    assert runs.call(1, rates) == [([(LR, 0.0), (LR / 2, 0.0)], True)]


@pytest.mark.parametrize(('before', 'after'), [(1, 2), (2, 1)])
def test_torchao_goes_on_with_another_number_of_processes(runs, tmp_path, before, after):
    eight_bits('torchao')
    results = runs.call(before, interrupted, 'fsdp2', tmp_path, type='AdamW8bit')
    states = runs.call(after, go_on, 'fsdp2', results[0][2], type='AdamW8bit')
    assert farthest(weights(states), weights([resumed for _, resumed, _ in results])) == 0
    for slot in ('exp_avg', 'exp_avg_sq'):
        for kind in ('codes', 'scale'):  # parts begin where blocks begin, so every block is the same
            saved = parts_of([resumed for _, resumed, _ in results], f'{slot}.{kind}', 'even')
            assert torch.equal(parts_of(states, f'{slot}.{kind}', 'even'), saved)
    assert all(tensors['diffusion/step/diffusion.denoising.even'][2][0] == 3 * NUM_STEPS for tensors, *_ in states)
    (said,) = {tuple(text for text in records if 'rounded' in text) for *_, records in states}
    # one process keeps `late` in float32, and that is rounded by the second of two
    assert [text.partition(', so ')[2].partition(' are')[0] for text in said] == ['2 of 18 parts of moments'] * (
        after - 1
    )


def parts_of(states, slot, parameter):
    """The parts of a moment, put together."""
    parts = {}
    for tensors, *_ in states:
        for name, (_, _, values) in tensors.items():
            if name.startswith(f'diffusion/{slot}[') and name.endswith(f'.{parameter}'):
                parts[int(name.split('[')[1].split(']')[0])] = values[0]
    return torch.cat([parts[first] for first in sorted(parts)])


def test_state_of_the_other_package_is_refused(runs, tmp_path):
    eight_bits('torchao')
    eight_bits('bitsandbytes')
    ((_, _, by_torchao),) = runs.call(1, interrupted, 'fsdp2', tmp_path / 'torchao', type='AdamW8bit')
    ((_, _, by_bitsandbytes),) = runs.call(1, interrupted, 'single', tmp_path / 'whole', type='AdamW8bit')
    for message in runs.call(2, refused, 'ddp', by_torchao, type='AdamW8bit'):
        assert "8-bit moments of optimizer 'diffusion' by torchao" in message
        assert "go on with module_wrapper='fsdp2'" in message
    for message in runs.call(2, refused, 'fsdp2', by_bitsandbytes, type='AdamW8bit'):
        assert "moments of optimizer 'diffusion' that are not by torchao" in message
        assert "go on with module_wrapper='ddp'" in message


def compiled(ranks, folder):
    with mock.patch.object(block_moments, 'uncompiled', contextlib.nullcontext):
        found = interrupted(ranks, 'fsdp2', folder / 'compiled', type='AdamW8bit')
    return found, interrupted(ranks, 'fsdp2', folder / 'eager', type='AdamW8bit')


@pytest.mark.slow
def test_torchao_compiles_its_step(runs, tmp_path):
    """Also where processes hold parts of different sizes, and torch has compiled those of another process before."""
    eight_bits('torchao')
    for folder in ('first', 'second'):
        results = runs.call(2, compiled, tmp_path / folder, timeout=400)
        for (straight, resumed, _), _ in results:
            equal(resumed, straight)
        found, expected = (weights([result[i][0] for result in results]) for i in range(2))
        assert farthest(found, expected) < 1e-5


def test_missing_torchao_is_named(monkeypatch):
    block_moments.block_optimizer.cache_clear()
    monkeypatch.setitem(sys.modules, 'torchao', None)
    monkeypatch.setitem(sys.modules, 'torchao.optim', None)
    with pytest.raises(
        ImportError, match=r"^'AdamW8bit' with module_wrapper='fsdp2' needs torchao: pip install torchao\..*'AdamW'"
    ):
        STRATEGIES.get('fsdp2').optimizer_class('AdamW8bit')


def test_optional_packages_are_imported_where_they_are_used():
    code = (
        'import sys\n'
        'from lakonlab.registry import STRATEGIES\n'
        "[STRATEGIES.get(name).optimizer_class('AdamW') for name in ('ddp', 'fsdp', 'fsdp2')]\n"
        "assert not {'torchao', 'bitsandbytes'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[2])
