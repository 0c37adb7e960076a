"""An interrupted and resumed run of the real command is the uninterrupted run, bit for bit."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.tools.conftest import TOTAL_ITERS
from tests.tools.training import DATA_BASED, DATA_FREE, assert_same_run, trained_tensors

EXIT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


SIGNALS = {DATA_BASED: [signal.SIGKILL], DATA_FREE: [signal.SIGTERM, signal.SIGINT]}


def interrupt_and_resume(training):
    """Interrupt a run with each of its signals, then let it finish; returns where each signal left it."""
    stops = []
    signals = SIGNALS[training.config]
    for number, signum in enumerate(signals, 1):
        process = training.start()
        goal = number * TOTAL_ITERS // (len(signals) + 1)
        training.wait_for(process, lambda goal=goal: training.newest_step >= goal)
        process.send_signal(signum)
        assert process.wait(timeout=120) == EXIT_CODES[signum], training.output
        assert goal <= training.newest_step < TOTAL_ITERS
        stops.append(training.newest_step)
    training.run()
    return stops


@pytest.fixture(scope='module')
def interrupted(new_training):
    trainings = {config: new_training('interrupted', config) for config in SIGNALS}
    with ThreadPoolExecutor() as pool:
        stops = list(pool.map(interrupt_and_resume, trainings.values()))
    return trainings, dict(zip(trainings, stops))


@pytest.mark.parametrize('config', SIGNALS)
def test_resumed_run_is_the_same(interrupted, uninterrupted, config):
    trainings, stops = interrupted
    output = trainings[config].output
    for signum, step in zip(SIGNALS[config], stops[config]):
        assert f'resuming after iteration {step} from checkpoints/{config}/iter_{step}' in output
        if signum != signal.SIGKILL:
            assert f'stopped by {signum.name} after iteration {step}, saved in' in output
    assert_same_run(trainings[config], uninterrupted[config])


@pytest.mark.parametrize('config', [DATA_BASED, DATA_FREE])
def test_reference_did_train(uninterrupted, config):
    """Otherwise the comparisons of this folder would show nothing."""
    weights = trained_tensors(uninterrupted[config])
    student = {name: tensor for name, tensor in weights.items() if name.startswith('diffusion.')}
    assert student
    for name, tensor in student.items():
        average = weights[name.replace('diffusion.', 'diffusion_ema.', 1)]
        if tensor.is_floating_point() and 'pos_embed.pos_embed' not in name:
            assert not torch.equal(average, tensor), name
    losses = [entries[0]['loss_diffusion'] for entries in uninterrupted[config].logged().values()]
    assert len(set(losses)) == len(losses) == TOTAL_ITERS // 3


def test_finished_run_is_not_run_again(uninterrupted):
    training = uninterrupted[DATA_BASED]
    before = training.result()
    assert f'all {TOTAL_ITERS} iterations are done' in training.run()
    assert training.result() == before
