"""Training on a GPU: as on a CPU, by every strategy, in lower precision, saved and resumed."""

import math
import socket

import pytest
import torch

from lakonlab.parallel.launch import joined_processes
from lakonlab.ranks import ALONE
from lakonlab.runner.seeding import make_deterministic
from tests.cuda.device import DEVICE, determinism_restored, tf32
from tests.parallel.small_runs import SmallRun, assembled, worst_difference
from tests.runner import small_run
from tests.tiny_text_image import SIZES, teacher_file

KINDS = (
    'digits-GM',
    'digits-DX',
    'digits-data-free',
    'Flux-GM',
    'QwenImage-data-free',
    'QwenImage-DX',
    'points-GMFlow',
)
TOLERANCE = 2e-4
"""Relative difference of losses and gradient norms in float32 of the first steps, and of pixels."""
WEIGHT_TOLERANCE = 1e-3
"""One step of AdamW, which turns rounding of gradients near zero into steps."""
STEPS = 5


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teachers')
    return {family: teacher_file(family, folder) for family in SIZES}


def trained(kind, weights, strategy='single', device=DEVICE, ranks=ALONE, steps=STEPS, options=None, **run):
    """Logs, samples and what a checkpoint holds of the model, on the host."""
    options = {'device': device, **(options or {})}
    run = SmallRun(ranks, kind, strategy, options, weights=weights.get(kind.partition('-')[0]), **run)
    logs = [run.step() for _ in range(steps)]
    samples = {role: values.cpu() for role, values in run.sample().items()}
    return logs, samples, {name: value.cpu() for name, value in assembled([run.model_state()]).items()}


def assert_close(found, expected, tolerance=TOLERANCE, weight_tolerance=WEIGHT_TOLERANCE):
    (logs, samples, state), (other_logs, other_samples, other_state) = found, expected
    assert worst_difference(logs, other_logs) < tolerance
    for role, values in other_samples.items():
        torch.testing.assert_close(samples[role], values, rtol=tolerance, atol=2 * tolerance)
    assert state.keys() == other_state.keys()
    assert any(name.startswith('diffusion_ema.') for name in state)
    for name, values in other_state.items():
        if 'quartile' not in name:
            torch.testing.assert_close(state[name], values, rtol=0, atol=weight_tolerance)


@pytest.mark.parametrize('kind', KINDS)
def test_as_on_a_cpu(weights, kind, record_property):
    """The same draws, losses, gradient norms, weights, averages and samples."""
    found, expected = (trained(kind, weights, device=device) for device in (DEVICE, 'cpu'))
    record_property('difference', worst_difference(found[0], expected[0]))
    assert_close(found, expected)


@pytest.fixture
def joined(monkeypatch):
    """A group of one process, as torchrun starts it."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    places = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    with joined_processes('pytorch', {'timeout': 60}, DEVICE) as (ranks, device):
        assert device.type == DEVICE
        assert torch.distributed.get_backend() == {'cuda': 'nccl', 'cpu': 'gloo'}[DEVICE]
        yield ranks


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp', 'fsdp2'])
@pytest.mark.parametrize('kind', ['digits-GM', 'Flux-GM', 'QwenImage-data-free'])
def test_strategies(weights, joined, kind, strategy):
    run = dict(train_cfg=dict(grad_accum_batch_size=2))
    found = trained(kind, weights, strategy, ranks=joined, **run)
    assert_close(found, trained(kind, weights, **run))


@pytest.mark.parametrize('kind', ['digits-GM', 'Flux-GM'])
def test_low_precision(weights, kind):
    """Networks in bfloat16, what is trained in float32; policies do not feel it."""
    is_digits = kind.startswith('digits')
    networks = dict(autocast_dtype='bfloat16') if is_digits else dict(torch_dtype='bfloat16')
    logs, samples, state = trained(kind, weights, networks=networks)
    other_logs, other_samples, _ = trained(kind, weights)
    assert all(map(math.isfinite, (value for values in logs for value in values.values())))
    for values, expected in zip(logs, other_logs):
        assert values['loss_diffusion'] == pytest.approx(expected['loss_diffusion'], rel=0.1 if is_digits else 0.5)
    assert {value.dtype for name, value in state.items() if name.startswith('diffusion.')} == {torch.float32}
    for role, values in other_samples.items():
        assert float((samples[role] - values).std() / values.std()) < (0.2 if is_digits else 0.8)


def test_tf32(weights):
    """What runs allow on GPUs changes losses by what networks lose, not more."""
    expected, _, _ = trained('digits-GM', weights)
    with tf32(True):
        found, _, _ = trained('digits-GM', weights)
    assert worst_difference(found, expected) < 2e-2


@pytest.mark.parametrize('kind', [*KINDS, 'digits-GMFlow'])
def test_deterministic_algorithms(weights, kind):
    """Every step and sampler has them, and with them the same bits each time."""
    with determinism_restored():
        make_deterministic()
        runs = [trained(kind, weights, steps=2) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    for one, other in zip(runs[0][1:], runs[1][1:]):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize('strategy', ['single', 'fsdp2'])
def test_saved_and_loaded(weights, joined, strategy, tmp_path):
    """Weights, averages and moments go through a checkpoint unchanged, and to other devices."""
    options = dict(weights=weights['Flux'])
    run = SmallRun(joined, 'Flux-GM', strategy, {'device': DEVICE}, **options)
    for _ in range(3):
        run.step()
    checkpoint = run.save(tmp_path)
    saved = assembled([run.model_state()]), assembled([run.optimizer_state()])
    for device in (DEVICE, 'cpu'):
        other = SmallRun(ALONE, 'Flux-GM', 'single', {'device': device}, **options)
        other.step()
        other.load(checkpoint)
        loaded = assembled([other.model_state()]), assembled([other.optimizer_state()])
        for found, expected in zip(loaded, saved):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name].cpu(), value.cpu()), name


def test_resumed_run_is_the_same_run(tmp_path):
    """Bit for bit, with deterministic algorithms; written by this process, or by another while training goes on."""
    folders = {name: tmp_path / name for name in ('whole', 'resumed', 'beside')}
    for folder in folders.values():
        folder.mkdir()

    def train(name, **changes):
        return small_run.train(ALONE, folders[name], device=DEVICE, deterministic=True, **changes)

    with determinism_restored():
        assert train('whole') == 0
        assert [train('resumed', total_iters=iterations) for iterations in (4, 8)] == [0, 4]
        assert train('beside', checkpoint_config__asynchronous=True) == 0
    assert small_run.steps(folders['beside']) == small_run.steps(folders['whole'])
    for name in ('resumed', 'beside'):
        assert small_run.result(folders[name]) == small_run.result(folders['whole']), name


@pytest.mark.parametrize('kind', ['AdamW8bit', 'AdamW32bit'])
def test_optimizers_of_bitsandbytes(weights, kind):
    pytest.importorskip('bitsandbytes', reason='pip install bitsandbytes')
    logs, _, state = trained('digits-GM', weights, optimizer=dict(type=kind))
    expected, _, _ = trained('digits-GM', weights)
    assert worst_difference(logs, expected) < (0.05 if kind.endswith('8bit') else 0.02)
    assert all(value.isfinite().all() for value in state.values())
