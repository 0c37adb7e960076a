"""Batches whose shapes differ between processes, as those of buckets do, are one step of all of them."""

import pytest
import torch

from lakonlab.ops.random_source import SeededSource
from tests import tiny_text_image
from tests.parallel.small_runs import SmallRun, assembled

SIZES = [((4, 6), (2, 2)), ((2, 4), (6, 4)), ((4, 4), (4, 6))]
"""Height and width of the latents: iteration, process."""


def batch(iteration: int, rank: int):
    """Two samples of a process; prompts are of different length, too."""
    data = tiny_text_image.batch('Flux', 2, text_length=3 + 2 * rank + iteration, seed=10 * iteration + rank)
    generator = torch.Generator().manual_seed(iteration + rank)
    return {**data, 'latents': torch.randn(2, 4, *SIZES[iteration][rank], generator=generator)}


def train(ranks, kind, strategy, weights):
    """Three steps; what was logged, and what this process holds."""
    run = SmallRun(ranks, kind, strategy, weights=weights)
    logs = []
    for iteration in range(len(SIZES)):
        outputs = run.model.train_step(
            batch(iteration, ranks.rank),
            run.optimizers,
            running_status={'iteration': iteration, 'epoch': 0},
            source=SeededSource(3, iteration, first_row=2 * ranks.rank),
            exchange=run.strategy,
        )
        logs.append(outputs['log_vars'])
    return logs, run.model_state()


@pytest.mark.parametrize('kind', ['Flux-GM', 'Flux-data-free'])
def test_different_shapes(runs, kind):
    """No process waits for ever, and what is divided is trained like what is not."""
    results = {
        strategy: runs.call(2, train, kind, strategy, runs.weights(kind), timeout=60)
        for strategy in ('ddp', 'fsdp', 'fsdp2')
    }
    logs, states = zip(*results['ddp'])
    assert logs[0] == logs[1]
    expected = assembled(states)
    for strategy in ('fsdp', 'fsdp2'):
        logs_divided, states = zip(*results[strategy])
        for found, by_ddp in zip(logs_divided[1], logs[0]):
            assert found == pytest.approx(by_ddp, rel=2e-6)
        found = assembled(states)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
