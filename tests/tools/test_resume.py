"""An interrupted and resumed run of the real command is the uninterrupted run, bit for bit."""

import signal

import pytest
import torch

from tests.tools.conftest import TOTAL_ITERS
from tests.tools.training import DATA_BASED, DATA_FREE, assert_same_run, trained_tensors

EXIT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize(
    ('config', 'signals'),
    [(DATA_BASED, [signal.SIGKILL]), (DATA_FREE, [signal.SIGTERM, signal.SIGINT])],
)
def test_resumed_run_is_the_same(new_training, uninterrupted, config, signals):
    training = new_training('interrupted', config)
    for number, signum in enumerate(signals, 1):
        process = training.start()
        goal = number * TOTAL_ITERS // (len(signals) + 1)
        training.wait_for(process, lambda goal=goal: training.newest_step >= goal)
        process.send_signal(signum)
        assert process.wait(timeout=60) == EXIT_CODES[signum], training.output
        assert goal <= training.newest_step < TOTAL_ITERS
        if signum != signal.SIGKILL:
            assert f'stopped by {signum.name} after iteration {training.newest_step}, saved in' in training.output
    stopped_at = training.newest_step
    output = training.run()
    assert f'resuming after iteration {stopped_at} from checkpoints/{config}/iter_{stopped_at}' in output
    assert_same_run(training, uninterrupted[config])


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
