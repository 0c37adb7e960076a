"""The repeated blocks of networks, and compiling them, against networks that are not compiled."""

import pytest
import torch
from torch import nn

from lakonlab.models.architecture.blocks import block_lists, compile_blocks
from lakonlab.ops.random_source import SeededSource
from tests import tiny_text_image as tiny
from tests.models.architecture.networks import build, flat, inputs, randomised


class CountingBackend:
    """Runs graphs as they are, and counts their operations."""

    def __init__(self):
        self.num_operations = 0

    def __call__(self, graph, example_inputs):
        self.num_operations += len(graph.graph.nodes)
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Compiled code is kept by function, and so is its number limited, for all tests of a process."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    return {family: tiny.teacher_file(family, folder) for family in ('Flux', 'QwenImage')}


def outcome(network):
    """Output and gradients of a DiT, whose dropout is of seed 0."""
    output = flat(network(*inputs(), source=SeededSource(0)))
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in network.parameters())]


def steps(weights, family, **options):
    """Losses of two training steps, and the gradients of the last."""
    changes = {f'diffusion__denoising__{name}': value for name, value in options.items()}
    model = tiny.build(tiny.config(family, 'GM', weights[family], **changes), family).train()
    optimizer = {'diffusion': torch.optim.SGD(tiny.trainable(model).values(), lr=1e-3)}
    data, losses = tiny.batch(family), []
    for iteration in range(2):
        status, source = {'iteration': iteration}, SeededSource(0, iteration)
        losses.append(model.train_step(data, optimizer, running_status=status, source=source)['log_vars'])
    losses = torch.tensor([logs['loss_diffusion'] for logs in losses])
    return [losses, *(parameter.grad for parameter in tiny.trainable(model).values())]


def assert_near(found, expected, tolerance):
    assert len(found) == len(expected)
    for value, other in zip(found, expected):
        assert (value - other).norm() <= tolerance * other.norm()


def test_outermost_lists_of_one_kind():
    network = nn.Module()
    network.blocks = nn.ModuleList(
        nn.ModuleDict({'layers': nn.ModuleList(nn.Linear(1, 1) for _ in range(4))}) for _ in range(3)
    )
    network.pair = nn.ModuleList(nn.ReLU() for _ in range(2))
    network.mixed = nn.ModuleList([nn.ReLU(), nn.SiLU(), nn.ReLU()])
    assert block_lists(network) == [(network, 'blocks')]
    assert block_lists(network, least=2) == [(network, 'blocks'), (network, 'pair')]


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize(('backend', 'tolerance'), [('eager', 0), ('aot_eager', 1e-6)])
def test_a_dit_of_compiled_blocks(backend, tolerance, checkpointing):
    options = dict(dropout=0.5, class_dropout_prob=0.5, checkpointing=checkpointing)
    expected = outcome(randomised(build('GMDiTTransformer2DModelV2', **options)))
    options.update(compile_blocks=True, compile_kwargs=dict(backend=backend, fullgraph=True))
    network = randomised(build('GMDiTTransformer2DModelV2', **options))
    assert_near(outcome(network), expected, tolerance)
    assert network.state_dict().keys() == build('GMDiTTransformer2DModelV2').state_dict().keys()


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_compiled_dit_that_draws(checkpointing):
    """What it draws is the same as without compilation."""
    options = dict(dropout=0.5, class_dropout_prob=0.5, checkpointing=checkpointing)
    expected = outcome(randomised(build('DXDiTTransformer2DModel', **options)))
    options.update(compile_forward=True, compile_kwargs=dict(backend='eager'))
    assert_near(outcome(randomised(build('DXDiTTransformer2DModel', **options))), expected, 0)


EAGER, AHEAD_OF_TIME, NATIVE = 'eager', 'aot_eager', 'inductor'
QUICK = [
    ('Flux', 'compile_blocks', EAGER, True),
    ('QwenImage', 'compile_blocks', AHEAD_OF_TIME, False),
    ('QwenImage', 'compile_forward', EAGER, True),
]
SLOW = [
    (family, option, backend, checkpointing)
    for family in ('Flux', 'QwenImage')
    for option in ('compile_blocks', 'compile_forward')
    for backend in (EAGER, AHEAD_OF_TIME, NATIVE)
    for checkpointing in (False, True)
    if (family, option, backend, checkpointing) not in QUICK
]
TOLERANCES = {EAGER: 0, AHEAD_OF_TIME: 1e-5, NATIVE: 1e-4}


@pytest.mark.parametrize(
    ('family', 'option', 'backend', 'checkpointing'),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_roles_of_a_compiled_base(weights, family, option, backend, checkpointing):
    """Teacher and student, whose adapters drop: no graph is broken by it, and the masks stay."""
    options = dict(lora_dropout=0.5, checkpointing=checkpointing)
    expected = steps(weights, family, **options)
    compiled = {option: True, 'compile_kwargs': dict(backend=backend, fullgraph=True)}
    assert_near(steps(weights, family, **options, **compiled), expected, TOLERANCES[backend])


def test_compiling_blocks_does_not_take_longer_for_deep_networks():
    counts = {}
    for option in ('compile_blocks', 'compile_forward'):
        for num_layers in (2, 6):
            torch.compiler.reset()
            backend = CountingBackend()
            options = {option: True, 'compile_kwargs': {'backend': backend}, 'checkpointing': False}
            build('DXDiTTransformer2DModel', num_layers=num_layers, **options)(*inputs())
            counts[option, num_layers] = backend.num_operations
    assert counts['compile_blocks', 2] == counts['compile_blocks', 6]
    assert counts['compile_forward', 6] > 2 * counts['compile_forward', 2] > 4 * counts['compile_blocks', 6]


def test_transformers_say_themselves_what_they_repeat(weights):
    """FLUX has two kinds of blocks, in two lists."""
    model = tiny.build(tiny.config('Flux', 'GM', weights['Flux'], diffusion__denoising__compile_blocks=True))
    tree = model.diffusion.denoising.transformer
    compiled = {name for name, module in tree.named_modules() if module._compiled_call_impl is not None}
    blocks = {f'{kind}.{index}' for kind in ('transformer_blocks', 'single_transformer_blocks') for index in range(2)}
    assert compiled == blocks


def test_one_way_of_compiling():
    with pytest.raises(ValueError, match='compile_forward=True and compile_blocks=True: expected one of them'):
        build('DXDiTTransformer2DModel', compile_forward=True, compile_blocks=True)


def test_a_network_without_blocks_is_named():
    with pytest.raises(ValueError, match=r'compile_blocks=True, but Sequential has no list.*compile_forward=True'):
        compile_blocks(nn.Sequential(nn.Linear(1, 1)))
