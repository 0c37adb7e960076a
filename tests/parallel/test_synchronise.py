"""What processes do about initial weights that are not the same in all of them."""

import logging

import pytest
import torch
from torch import nn

from lakonlab.models.architecture.roles import named_state
from lakonlab.registry import STRATEGIES
from tests.parallel.small_runs import assembled, build, copied

ALL = pytest.mark.parametrize('strategy', ['ddp', 'fsdp', 'fsdp2'])
BLOCK = 'transformer_blocks.1'
TRAINED = {
    'digits-GM': {
        f'diffusion.denoising.{BLOCK}.attn1.to_q.weight',
        'diffusion.denoising.proj_out_means.bias',
        f'diffusion_ema.denoising.{BLOCK}.attn1.to_q.weight',
    },
    'Flux-GM': {
        f'diffusion.denoising.{BLOCK}.ff.net.2.lora_A.default.weight',
        f'diffusion_ema.denoising.{BLOCK}.ff.net.2.lora_B.default.weight',
    },
}
FROZEN = {
    'digits-GM': f'teacher.denoising.{BLOCK}.attn1.to_q.weight',
    'Flux-GM': f'teacher.denoising.{BLOCK}.attn.to_q.weight',
}


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def wrap(ranks, kind, strategy, weights, different=()):
    """Wrap a model some of whose tensors are different in the second process.

    Returns what this process saves of it and what was logged, or the error.
    """
    model = build(kind, weights)
    tensors = dict(named_state(model))
    if ranks.rank:
        with torch.no_grad():
            for name in different:
                tensors[name].add_(1)
    engine = STRATEGIES.build(dict(type=strategy, ranks=ranks, device='cpu'))
    messages, logger = Messages(), logging.getLogger('lakonlab.parallel')
    logger.addHandler(messages)
    try:
        model = engine.wrap(model)
    except RuntimeError as error:
        return str(error)
    finally:
        logger.removeHandler(messages)
    state = {name: copied(pieces) for name, pieces in engine.model_state(model).items()}
    return state, [text for text in messages.texts if 'differed' in text]


def whole(results):
    """Whole tensors of results by rank; where several processes hold an element, they hold the same."""
    return assembled([state for state, _ in results])


@ALL
@pytest.mark.parametrize('kind', TRAINED)
def test_what_is_trained_is_that_of_the_main_process(runs, kind, strategy):
    names, weights = TRAINED[kind], runs.weights(kind)
    expected = whole(runs.call(1, wrap, kind, 'single', weights))
    results = runs.call(2, wrap, kind, strategy, weights, names)
    found = whole(results)
    assert found.keys() == expected.keys() > names
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    for _, messages in results:
        assert messages == [f'{len(names)} initial tensors differed between processes; those of the main one are used']


@ALL
def test_nothing_is_said_of_weights_that_are_the_same(runs, strategy):
    assert [messages for _, messages in runs.call(2, wrap, 'digits-GM', strategy, None)] == [[], []]


@ALL
@pytest.mark.parametrize('kind', FROZEN)
def test_frozen_weights_of_different_files(runs, kind, strategy):
    """Every process fails, whatever else differs; what roles share is named once."""
    name = FROZEN[kind]
    for message in runs.call(2, wrap, kind, strategy, runs.weights(kind), [name, *TRAINED[kind]]):
        assert message == (
            f'1 frozen tensors differ between processes, among them {name}: the nodes read different files. '
            'Check `pretrained` and model_name_or_path on every node, or name a revision.'
        )


def wrap_unlike(ranks, strategy, what):
    """The error of wrapping a model that is not the same in the second process."""
    model = build('digits-GM')
    network = model.diffusion.denoising
    if ranks.rank and what == 'frozen':
        network.proj_out_means.bias.requires_grad_(False)
    elif ranks.rank and what == 'shape':
        network.proj_out_means.bias = nn.Parameter(torch.zeros(7))
    elif what == f'missing on rank {ranks.rank}':
        network.proj_out_means.bias = None
    try:
        STRATEGIES.build(dict(type=strategy, ranks=ranks, device='cpu')).wrap(model)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize('what', ['frozen', 'shape', 'missing on rank 0', 'missing on rank 1'])
def test_other_tensors(runs, what):
    """Every process fails, and none waits for one that has."""
    for message in runs.call(2, wrap_unlike, 'ddp', what, timeout=30):
        assert 'diffusion.denoising.proj_out_means.bias' in message
        assert 'the processes do not build the same model' in message
