"""One process and several of every strategy train the same model, to rounding."""

import itertools
import logging
from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten, tree_unflatten

from lakonlab.models.architecture.roles import unwrapped
from lakonlab.parallel.units import repeated_blocks
from tests.parallel.small_runs import CLIP, DIGITS, SCRATCH, TEXT_IMAGE, SmallRun, assembled, train, worst_difference

logger = logging.getLogger(__name__)

STRATEGIES = ('ddp', 'fsdp', 'fsdp2')
SHARDED = ('fsdp', 'fsdp2')
TOLERANCE = 2e-6
"""Relative difference of losses and gradient norms in float32."""
SAMPLE_TOLERANCE = 5e-6
"""Of pixels in [0, 1] and of points, after some steps."""
WEIGHT_TOLERANCE = 5e-5
"""A twentieth of one step of AdamW, which turns rounding of gradients near zero into steps."""


def close_to(found, reference, tolerance=TOLERANCE):
    """Compare all that training and sampling give.

    Args:
        found: Results by rank.
        reference: Those of one process.
        tolerance: Of losses and gradient norms.
    """
    assert all(run['logs'] == found[0]['logs'] for run in found)
    worst = worst_difference(found[0]['logs'], reference['logs'])
    logger.info('relative difference %.1e', worst)
    assert worst < tolerance
    for number, expected in enumerate(reference['samples']):
        for role, samples in expected.items():
            sampled = torch.cat([run['samples'][number][role] for run in found])
            assert torch.allclose(sampled, samples, rtol=0, atol=SAMPLE_TOLERANCE), role
    state, expected = assembled([run['model'] for run in found]), assembled([reference['model']])
    assert state.keys() == expected.keys()
    assert any(name.startswith('diffusion_ema.') for name in state)
    for name, tensor in state.items():
        if 'quartile' not in name:
            assert torch.allclose(tensor, expected[name], rtol=0, atol=WEIGHT_TOLERANCE), name


def cases(kinds, strategies, quick):
    """All combinations; those that are not listed as quick are slow tests."""
    return [
        pytest.param(kind, strategy, marks=() if (kind, strategy) in quick else pytest.mark.slow)
        for kind in kinds
        for strategy in strategies
    ]


QUICK = {('QwenImage-data-free', 'fsdp2'), *((kind, name) for kind in ('digits-GM', 'Flux-GM') for name in STRATEGIES)}


@pytest.mark.parametrize(('kind', 'strategy'), cases((*DIGITS, *TEXT_IMAGE), STRATEGIES, QUICK))
def test_strategies_agree(runs, kind, strategy):
    """Full fine-tuning, and roles of one base; sampled in the middle, after which weights must not be stale."""
    options = dict(num_steps=20, sample_at=(7, 20))
    reference = runs.reference(kind, **options)
    norms = [values['diffusion_grad_norm'] for values in reference['logs']]
    assert sum(norm > CLIP for norm in norms) > 5  # so that the norm matters
    close_to(runs.train(2, kind, strategy, **options), reference)


@pytest.mark.parametrize(
    ('kind', 'strategy'), cases(('digits-GM', 'Flux-GM', 'QwenImage-data-free'), SHARDED, {('digits-GM', 'fsdp2')})
)
def test_copies_of_shards(runs, kind, strategy):
    """Four processes, two copies of the weights, each divided among two."""
    options = dict(num_steps=20, sample_at=(7,))
    reference = runs.reference(kind, **options)
    close_to(runs.train(4, kind, strategy, **options, options=dict(shard_size=2)), reference)


@pytest.mark.slow
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_four_processes(runs, strategy):
    reference = runs.reference('digits-GM', num_steps=20)
    close_to(runs.train(4, 'digits-GM', strategy, num_steps=20), reference)


@pytest.mark.parametrize(
    ('kind', 'strategy'),
    cases(('digits-data-free', 'Flux-GM', 'Flux-data-free'), STRATEGIES, {('digits-data-free', s) for s in STRATEGIES}),
)
def test_accumulation(runs, kind, strategy):
    """Two micro-batches in each of two processes, and two segments in each if there is no data, make one step."""
    reference = runs.reference(kind, num_steps=20)
    parts = dict(num_steps=20, train_cfg=dict(grad_accum_batch_size=1))
    close_to(runs.train(2, kind, strategy, **parts), reference)


def count_exchanges(ranks, kind, strategy, **run):
    """How often something is added up among all processes in a step, and how often gradients are among their parts."""
    small_run = SmallRun(ranks, kind, strategy, **run)
    small_run.step()
    small_run.step()  # data parallelism puts gradients into other buckets after the first
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        small_run.step()
    names = Counter(event.name() for event in profiler.profiler.kineto_results.events())
    return names['c10d::allreduce_'], names['c10d::_reduce_scatter_base_']


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_number_of_exchanges(runs, strategy):
    """Once in a step of two micro-batches of two segments, unless every pass is asked for, or needed for precision."""

    def count(**run):
        counts = runs.call(2, count_exchanges, 'digits-data-free', strategy, **run)
        assert counts[0] == counts[1]
        return counts[0]

    parts = dict(grad_accum_batch_size=1)
    if strategy == 'ddp':
        assert count(train_cfg=parts) == (2, 0)  # gradients, and what is logged
        return
    once, always = (1, 4), (1, 4 * 4)  # what is logged with the norm; three blocks and the rest
    assert count(train_cfg=parts) == once
    assert count(train_cfg=parts, options=dict(sync_every_pass=True)) == always
    low = dict(networks=dict(autocast_dtype='bfloat16'), options=dict(param_dtype='bfloat16'))
    assert count(train_cfg=parts, **low) == (always if strategy == 'fsdp' else once)


@pytest.mark.slow
@pytest.mark.parametrize('strategy', SHARDED)
@pytest.mark.parametrize('kind', ['digits-data-free', 'Flux-data-free'])
def test_exchange_after_every_pass(runs, kind, strategy):
    reference = runs.reference(kind, num_steps=20)
    parts = dict(num_steps=20, train_cfg=dict(grad_accum_batch_size=1), options=dict(sync_every_pass=True))
    close_to(runs.train(2, kind, strategy, **parts), reference)


@pytest.mark.parametrize(('kind', 'strategy'), cases(('digits-GM', 'Flux-GM'), STRATEGIES, {('digits-GM', 'fsdp2')}))
def test_gradient_checkpointing(runs, kind, strategy):
    """Against one process that does it the other way."""
    by_default = kind != 'digits-GM'
    reference = runs.reference(kind, num_steps=20)
    close_to(runs.train(2, kind, strategy, num_steps=20, checkpointing=not by_default), reference)


def train_compiled(ranks, kind, strategy, **run):
    """A small run whose blocks are compiled, and how many graphs that made."""
    torch.compiler.reset()
    counters.clear()
    try:
        return {**train(ranks, kind, strategy, **run), 'graphs': counters['stats']['unique_graphs']}
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize(
    ('kind', 'strategy'), cases(('digits-GM', 'Flux-GM'), STRATEGIES, {('digits-GM', name) for name in STRATEGIES})
)
def test_compiled_blocks(runs, kind, strategy):
    """As one graph each, unless FSDP1 has units within the blocks; against one process that compiles nothing."""
    whole = (kind, strategy) != ('Flux-GM', 'fsdp')
    compiled = dict(compile_blocks=True, compile_kwargs=dict(backend='aot_eager', fullgraph=whole))
    run = dict(num_steps=20, networks=compiled, weights=runs.weights(kind), timeout=400)
    found = runs.call(2, train_compiled, kind, strategy, **run)
    assert all(result['graphs'] > 0 for result in found)
    close_to(found, runs.reference(kind, num_steps=20))


@pytest.mark.parametrize(
    ('kind', 'strategy'), cases(('Flux-GM', 'QwenImage-data-free'), STRATEGIES, {('Flux-GM', 'fsdp2')})
)
def test_dropout(runs, kind, strategy):
    """Masks belong to samples, wherever these are, and are the same when blocks are recomputed."""
    reference = runs.reference(kind, num_steps=20, lora_dropout=0.3)
    without = runs.reference(kind, num_steps=1)
    assert worst_difference(reference['logs'][:1], without['logs']) > 1e-3
    close_to(runs.train(2, kind, strategy, num_steps=20, lora_dropout=0.3), reference)


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('kind', SCRATCH)
def test_from_scratch(runs, kind, strategy):
    """Several networks, one of them without repeated blocks, dropped labels, and double precision throughout."""
    options = dict(num_steps=20, sample_at=(7, 20))
    double = dict(options=dict(reduce_dtype=None)) if strategy in SHARDED else {}
    found = runs.train(2, kind, strategy, **options, **double)
    close_to(found, runs.reference(kind, **options), tolerance=1e-11 if kind == 'digits-GMFlow' else TOLERANCE)


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_running_averages_of_losses(runs, strategy):
    """Processes hold the mean of what each would have by itself."""
    found = assembled([run['model'] for run in runs.train(2, 'points-GMFlow', strategy, num_steps=1)])
    halves = [runs.reference('points-GMFlow', num_steps=1, rows=rows)['model'] for rows in (slice(0, 2), slice(2, 4))]
    first, second = (assembled([half]) for half in halves)
    for name in ('quartile_loss', 'quartile_var', 'quartile_count'):
        for child in ('diffusion', 'diffusion_ema'):
            entry = f'{child}.flow_loss.{name}'
            assert not torch.equal(first[entry], second[entry])
            assert torch.allclose(found[entry], (first[entry] + second[entry]) / 2)


class OneNode(torch.autograd.Function):
    """The identity of all that a block is given."""

    @staticmethod
    def forward(ctx, *tensors):
        """Return what comes."""
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        """Return what comes back."""
        return gradients


def through_one_node(module, args, kwargs):
    """Let the gradients of what a module is given be summed within the module first."""
    values, structure = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor) and value.requires_grad]
    for i, tensor in zip(places, OneNode.apply(*(values[i] for i in places)) if places else ()):
        values[i] = tensor
    return tree_unflatten(values, structure)


def train_in_order_of_blocks(ranks, kind, num_steps, **run):
    """Logs of data parallelism that sums the gradients of a block's inputs as it is when blocks are units."""
    small_run = SmallRun(ranks, kind, 'ddp', **run)
    for block in repeated_blocks(unwrapped(small_run.model.diffusion).denoising.backbone.tree):
        block.register_forward_pre_hook(through_one_node, with_kwargs=True)
    return [small_run.step() for _ in range(num_steps)]


def mixed_cases():
    """Networks, strategies, precision of the trained parts and ``param_dtype``; one is quick."""
    quick = {('Flux-GM', 'fsdp2', 'float32', 'bfloat16')}
    every = itertools.product(
        ('Flux-GM', 'QwenImage-DX', 'QwenImage-data-free'), SHARDED, ('float32', 'bfloat16'), (None, 'bfloat16')
    )
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(('kind', 'strategy', 'precision', 'param_dtype'), mixed_cases())
def test_mixed_precision(runs, kind, strategy, precision, param_dtype):
    """A base in bfloat16 under trained parts in float32, which compute in ``precision``.

    Sums of gradients in bfloat16 depend by 4e-3 on their order, and so does all that follows on the last digit of a
    float32 weight that is rounded to bfloat16. So the order is made the same; gradients are not clipped, which would
    multiply all weights by a norm with a last digit; and AdamW is the plain one, as the fused one rounds by the place
    of a number in memory. Then strategies agree as they do in float32.
    """
    model = dict(
        num_steps=20,
        networks=dict(torch_dtype='bfloat16'),
        freeze_exclude_autocast_dtype=precision,
        train_cfg=dict(diffusion_grad_clip=0.0),
        optimizer=dict(fused=False, foreach=False),
    )
    expected = runs.call(2, train_in_order_of_blocks, kind, weights=runs.weights(kind), **model)[0]
    found = runs.train(2, kind, strategy, options=dict(param_dtype=param_dtype), **model)
    worst = worst_difference(found[0]['logs'], expected)
    logger.info('relative difference %.1e', worst)
    assert worst < TOLERANCE
