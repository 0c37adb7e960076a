"""What a step holds only for as long as it needs it."""

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from lakonlab.parallel.units import repeated_blocks
from tests.parallel.small_runs import SmallRun

BLOCKS = dict(num_layers=3, num_single_layers=3)


def places_of_gradients(ranks, **options):
    """Where gradients lie after a step, whether they are zeros after they are cleared, and where they lie then."""
    run = SmallRun(ranks, 'digits-GM', 'ddp', options=options, train_cfg=dict(grad_accum_batch_size=1))
    run.step()
    run.step()  # buckets have found their order
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    before = [p.grad.data_ptr() for p in parameters]
    run.strategy.clear_gradients(run.optimizers)
    cleared = [p.grad is not None and not p.grad.any() for p in parameters]
    run.step()
    return before, cleared, [p.grad.data_ptr() for p in parameters]


def test_gradients_stay_in_their_buckets(runs):
    """New ones would lie beside the buckets until the last pass of a step."""
    (result,) = runs.call(1, places_of_gradients)
    before, cleared, after = result
    assert before == after
    assert all(cleared)


def test_what_takes_no_part_has_no_gradient(runs):
    (result,) = runs.call(1, places_of_gradients, find_unused_parameters=True)
    assert not any(result[1])


def gathered_units(ranks, weights):
    """Most frozen units that are whole at once in a backward pass, and how many blocks there are."""
    run = SmallRun(ranks, 'Flux-GM', 'fsdp', weights=weights, networks=BLOCKS)
    run.step()
    handles = [unit._handle for unit in FullyShardedDataParallel.fsdp_modules(run.model) if unit._handle]
    frozen = [handle.flat_param for handle in handles if not handle.flat_param.requires_grad]
    counts = []

    def count(_):
        counts.append(sum(flat._full_param_padded.untyped_storage().size() > 0 for flat in frozen))

    def watch(module, inputs, output):
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(count)

    blocks = repeated_blocks(run.model.diffusion)
    for block in blocks:
        block.register_forward_hook(watch)
    run.step()
    return max(counts), len(blocks)


def test_frozen_units_are_let_go(runs):
    """The embedding of the time, which all blocks share, has its gradient at the end of a backward pass only."""
    for most, number in runs.call(2, gathered_units, None):
        assert number == 6
        assert most <= 4  # the network's own unit, the block that computes, the one before, the one that is fetched
