"""What a process holds and gathers under every strategy, by the record of torch's allocator."""

import contextlib
import gc
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from lakonlab.models.architecture.roles import named_state
from lakonlab.parallel.units import networks_of, select_units
from tests.parallel.small_runs import SmallRun, build

NETWORKS = {
    'digits-GM': dict(num_layers=8, attention_head_dim=64, checkpointing=True),
    'Flux-GM': dict(
        num_layers=4,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        axes_dims_rope=(8, 12, 12),
    ),
}
"""Eight blocks in which weights are much larger than activations."""
MOMENTS = 2
SHARDED = ('fsdp', 'fsdp2')
GATHERED = {'fsdp': 3.1, 'fsdp2': 4.1}
"""Units that a process has whole at a time: the weights of two, and the gradients of one or, with FSDP2, what it has
received for the two but not yet freed."""


@dataclass
class Record:
    """Bytes that a process has allocated, as a function of time.

    Args:
        live: At the end of each phase.
        peak: Most during each phase.
    """

    live: dict[str, int]
    peak: dict[str, int]


def record_of(profiler, mapped_sizes=()):
    """Read the record of the allocator.

    Left out are the copies that gloo makes for itself (other backends make none), since threads free them of which the
    profiler knows nothing, and files mapped into memory, which it takes for allocations.

    Args:
        profiler: Has seen phases, each ended by a mark.
        mapped_sizes: Sizes of files that were mapped.
    """
    events, waiting = [], [(event, False) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while waiting:
        event, in_collective = waiting.pop()
        if event.tag.name == 'Allocation':
            if not in_collective or event.extra_fields.alloc_size < 0:
                events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name.startswith('end of '):
            events.append((event.start_time_ns, event.name.removeprefix('end of '), None))
        waiting += [(child, in_collective or event.name.startswith('c10d::')) for child in event.children]
    record, sizes, total, peak = Record({}, {}), {}, 0, 0
    for _, what, size in sorted(events, key=lambda event: event[0]):
        if size is None:
            record.live[what], record.peak[what] = total, peak
            peak = total
        elif size > 0 and size not in mapped_sizes:
            sizes[what] = size
            total += size
            peak = max(peak, total)
        else:
            total -= sizes.pop(what, 0)
    return record


def end(phase):
    """Mark the end of a phase."""
    gc.collect()
    with record_function(f'end of {phase}'):
        pass


@contextlib.contextmanager
def collectives_that_let_go():
    """Let threads of gloo forget tensors before their owner does, who frees them where the profiler sees it."""

    def patient(collective):
        def call(*args, async_op=False, **kwargs):
            work = collective(*args, async_op=async_op, **kwargs)
            if work is not None:
                work.wait()
            time.sleep(0.001)
            return work

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ('all_gather', 'all_gather_single', 'reduce_scatter_single'):
            patch.setattr(dist, name, patient(getattr(dist, name)))
        yield


def measure(ranks, kind, strategy, folder, **run):
    """The record of a small run that is saved and loaded into another one, and the bytes of moments that it saves."""
    gc.collect()
    recording = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with collectives_that_let_go(), recording as profiler:
        small_run = SmallRun(ranks, kind, strategy, **run)
        end('wrapping')
        for number in range(3):
            small_run.step()
            end(f'step {number}')
        small_run.sample()
        end('sampling')
        checkpoint = small_run.save(Path(folder))
        end('saving')
        handed_over = sum(
            pieces.num_bytes
            for part in small_run.strategy.optimizer_state(small_run.model, small_run.optimizers)[:1]
            for pieces in part.values()
        )
        del small_run
        other = SmallRun(ranks, kind, strategy, **run)
        end('wrapping again')
        other.load(checkpoint)
        end('loading')
    sizes = {path.stat().st_size for path in checkpoint.glob('*/*.safetensors')}
    return record_of(profiler, sizes), handed_over


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of a model, each counted once.

    Args:
        divided: Weights and averages that a strategy may divide.
        whole: Everything else.
        trained: What has gradients and moments.
        unit: Largest module that is gathered at a time.
    """

    divided: int
    whole: int
    trained: int
    unit: int


def sizes_of(kind):
    """Sizes of a small model, without any strategy."""
    model = build(kind, networks=NETWORKS[kind])
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(list(named_state(model)))}
    of_student = {id(tensor) for child in (model.diffusion, model.diffusion_ema) for _, tensor in named_state(child)}
    buffers = {id(buffer): buffer for buffer in model.buffers()}
    networks = [place.module for place in networks_of(model, 'diffusion')]
    units = [*select_units(networks, ()).values()]
    rest = [p for network in networks for p in network.parameters() if not any(p in set(u.parameters()) for u in units)]
    return Sizes(
        divided=sum(size_of(tensor) for key, (_, tensor) in tensors.items() if key in of_student),
        whole=sum(size_of(tensor) for key, (_, tensor) in tensors.items() if key not in of_student)
        + sum(size_of(buffer) for key, buffer in buffers.items() if key not in tensors),
        trained=sum(size_of(tensor) for _, tensor in tensors.values() if tensor.requires_grad),
        unit=max(sum(map(size_of, unit)) for unit in (rest, *(list(unit.parameters()) for unit in units))),
    )


def size_of(tensor):
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


@pytest.fixture(scope='module')
def measured(runs, tmp_path_factory):
    """Records by rank of a kind under a strategy, made when they are asked for."""
    made = {}

    def find(kind, strategy):
        if (kind, strategy) not in made:
            folder = str(tmp_path_factory.mktemp('run'))
            world_size = 1 if strategy == 'single' else 2
            made[kind, strategy] = runs.call(world_size, measure, kind, strategy, folder, networks=NETWORKS[kind])
        return made[kind, strategy]

    return find


def cases(*strategies):
    """Kinds and strategies; the slowest is a slow test."""
    return pytest.mark.parametrize(
        ('kind', 'strategy'),
        [
            pytest.param(kind, strategy, marks=pytest.mark.slow if (kind, strategy) == ('Flux-GM', 'fsdp') else ())
            for kind in NETWORKS
            for strategy in strategies
        ],
    )


@cases('single', 'ddp', 'fsdp', 'fsdp2')
def test_what_a_process_holds(measured, kind, strategy):
    """Weights that several roles share count once; of what is divided, every process has its part."""
    sizes = sizes_of(kind)
    parts = 2 if strategy in SHARDED else 1
    weights = sizes.whole + sizes.divided / parts
    training = weights + (1 + MOMENTS) * sizes.trained / parts
    for record, handed_over in measured(kind, strategy):
        assert handed_over == pytest.approx(MOMENTS * sizes.trained / parts, rel=0.01)
        buckets = sizes.trained if strategy == 'ddp' else 0  # made with the wrapper, and taken over by gradients
        assert record.live['wrapping'] == pytest.approx(weights + buckets, rel=0.02)
        for phase in ('step 0', 'step 1', 'step 2', 'sampling', 'saving'):
            assert record.live[phase] == pytest.approx(training, rel=0.02), phase


@cases('fsdp', 'fsdp2')
def test_what_a_process_gathers(measured, kind, strategy):
    """A few units, whether it trains or samples; beside them, activations are those of data parallelism."""
    sizes = sizes_of(kind)
    gathered = GATHERED[strategy] * sizes.unit
    assert gathered < 0.7 * sizes.divided
    for (record, _), (whole, _) in zip(measured(kind, strategy), measured(kind, 'ddp')):
        for before, phase in (('step 1', 'step 2'), ('step 2', 'sampling')):
            activations = whole.peak[phase] - whole.live[before]
            assert record.peak[phase] - record.live[before] < activations + gathered, phase
            assert record.peak[phase] - record.live[before] > activations + sizes.unit, phase


@cases('fsdp', 'fsdp2')
def test_while_a_model_is_divided(measured, kind, strategy):
    """What is divided goes unit by unit."""
    sizes = sizes_of(kind)
    for record, _ in measured(kind, strategy):
        assert record.peak['wrapping'] < sizes.whole + sizes.divided + 2 * sizes.unit


@cases('single', 'ddp', 'fsdp', 'fsdp2')
def test_checkpoints_gather_nothing(measured, kind, strategy):
    """Saving takes no copy that grows with the model; loading takes the moments that were not there, and a tensor."""
    sizes = sizes_of(kind)
    parts = 2 if strategy in SHARDED else 1
    for record, _ in measured(kind, strategy):
        assert record.peak['saving'] - record.live['sampling'] < sizes.unit
        new = record.live['loading'] - record.live['wrapping again']
        assert new == pytest.approx(MOMENTS * sizes.trained / parts, rel=0.02)
        assert record.peak['loading'] - record.live['wrapping again'] < new + sizes.unit / 2
