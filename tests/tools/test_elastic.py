"""A run that goes on with another number of processes, divided in another way, sees the same samples and noise."""

from dataclasses import replace

import pytest

from tests.tools.training import DATA_BASED

STOPS = (6, 12, 18)
TOLERANCE = 2e-6  # rounding: sums over the batch are grouped by process


def losses(training):
    """Iteration -> loss and gradient norm."""
    return {
        step: (entries[0]['loss_diffusion'], entries[0]['diffusion_grad_norm'])
        for step, entries in training.logged().items()
    }


def test_one_two_one(new_training):
    options = {'optimizer.diffusion.lr': 1e-3, 'log_config.interval': 1, 'checkpoint_config.interval': 6}
    whole = new_training('whole', DATA_BASED, total_iters=STOPS[-1], **options)
    whole.run()
    elastic = new_training('elastic', DATA_BASED, **options)
    for stop, processes, strategy in zip(STOPS, (1, 2, 1), ('ddp', 'fsdp2', 'ddp')):
        changes = {'total_iters': stop, 'module_wrapper': strategy}
        replace(elastic, processes=processes, options={**elastic.options, **changes}).run()
        assert elastic.newest_step == stop
    output = elastic.output
    assert f'resuming after iteration {STOPS[0]}' in output
    assert f'resuming after iteration {STOPS[1]}' in output
    assert '2 process(es), fsdp2' in output
    expected = losses(whole)
    assert list(expected) == list(range(1, STOPS[-1] + 1))
    found = losses(elastic)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=TOLERANCE), step
    assert any(found[step] != expected[step] for step in range(STOPS[0] + 1, STOPS[1] + 1))
