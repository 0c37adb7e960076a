"""A run saved under any strategy goes on under any other."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.parallel.small_runs import SmallRun, assembled, worst_difference

LAYOUTS = {
    'single': (1, 'single'),
    'ddp x2': (2, 'ddp'),
    'fsdp x2': (2, 'fsdp'),
    'fsdp2 x2': (2, 'fsdp2'),
    'ddp x1': (1, 'ddp'),
    'fsdp x1': (1, 'fsdp'),
    'fsdp2 x1': (1, 'fsdp2'),
}
NUM_STEPS = 3


def train_and_save(ranks, kind, strategy, folder, **run):
    """Train, save in the middle, and go on without a break."""
    small_run = SmallRun(ranks, kind, strategy, **run)
    before = [small_run.step() for _ in range(NUM_STEPS)]
    checkpoint = small_run.save(Path(folder))
    saved = small_run.model_state(), small_run.optimizer_state()
    logs = [small_run.step() for _ in range(NUM_STEPS)]
    final = small_run.model_state(), small_run.optimizer_state()
    return dict(checkpoint=str(checkpoint), before=before, saved=saved, logs=logs, final=final)


def resume(ranks, kind, strategy, checkpoint, folder, **run):
    """Go on from a checkpoint, saving once more in the end."""
    small_run = SmallRun(ranks, kind, strategy, **run)
    small_run.load(Path(checkpoint))
    loaded = small_run.model_state(), small_run.optimizer_state()
    logs = [small_run.step() for _ in range(NUM_STEPS)]
    final = small_run.model_state(), small_run.optimizer_state()
    return dict(loaded=loaded, logs=logs, final=final, again=str(small_run.save(Path(folder))))


def whole(results, key):
    """Whole tensors of the model and of the optimiser, of results by rank."""
    return [assembled([result[key][part] for result in results]) for part in range(2)]


def same_bits(tensors, others):
    """Compare two dicts of tensors."""
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def read_files(folder):
    """The tensors of a folder of files, put together here; every element has to be there once."""
    tensors, times = {}, {}
    for path in sorted(folder.glob('*.safetensors')):
        with safe_open(path, framework='pt') as file:
            partial = json.loads((file.metadata() or {}).get('pieces', '{}'))
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                piece = file.get_tensor(key)
                own = partial.get(key, dict(name=key, offsets=[0] * piece.dim(), shape=list(piece.shape)))
                name, shape = own['name'], own['shape']
                tensors.setdefault(name, torch.zeros(shape, dtype=piece.dtype))
                times.setdefault(name, torch.zeros(shape, dtype=torch.int32))
                box = tuple(slice(start, start + size) for start, size in zip(own['offsets'], piece.shape))
                tensors[name][box] = piece
                times[name][box] += 1
    for name, count in times.items():
        assert count.eq(1).all(), name
    return tensors


@pytest.fixture(scope='module')
def saved(runs, tmp_path_factory):
    """Trained and saved runs by kind and layout, made when they are asked for."""
    made = {}

    def find(kind, layout):
        if (kind, layout) not in made:
            world_size, strategy = LAYOUTS[layout]
            folder = str(tmp_path_factory.mktemp('run'))
            made[kind, layout] = runs.call(
                world_size, train_and_save, kind, strategy, folder, weights=runs.weights(kind)
            )
        return made[kind, layout]

    return find


def is_quick(kind, source, target):
    """Everything for a network of a few layers; for blocks and for roles, less."""
    same = source == target and source.endswith('x2')
    change = {('fsdp x2', 'fsdp2 x2'), ('fsdp2 x2', 'fsdp x2'), ('ddp x2', 'fsdp2 x2'), ('fsdp2 x2', 'single')}
    return kind == 'points-GMFlow' or same or (kind == 'digits-GM' and (source, target) in change)


CASES = [
    pytest.param(kind, source, target, marks=() if is_quick(kind, source, target) else pytest.mark.slow)
    for kind in ('digits-GM', 'Flux-GM', 'points-GMFlow')
    for source in LAYOUTS
    for target in LAYOUTS
]


@pytest.mark.parametrize(('kind', 'source', 'target'), CASES)
def test_resume(runs, saved, tmp_path, kind, source, target):
    """What is loaded has the bits that were saved; what follows is the same run, to the bit on the same layout."""
    before = saved(kind, source)
    world_size, strategy = LAYOUTS[target]
    checkpoint = before[0]['checkpoint']
    after = runs.call(world_size, resume, kind, strategy, checkpoint, str(tmp_path), weights=runs.weights(kind))
    for found, expected in zip(whole(after, 'loaded'), whole(before, 'saved')):
        same_bits(found, expected)
    for found, expected in zip(whole(after, 'final'), whole(before, 'final')):
        if source == target:
            same_bits(found, expected)
        steps = {name for name in found if '/step/' in name}
        same_bits({name: found[name] for name in steps}, {name: expected[name] for name in steps})
    if source == target:
        assert [result['logs'] for result in after] == [result['logs'] for result in before]
    assert worst_difference(after[0]['logs'], before[0]['logs']) < 2e-6
    for part, tensors in zip(('model', 'optimizer'), whole(after, 'final')):
        same_bits(read_files(Path(after[0]['again'], part)), tensors)


@pytest.mark.parametrize(
    ('kind', 'layout'), [(kind, layout) for kind in ('digits-GM', 'Flux-GM') for layout in LAYOUTS]
)
def test_files_hold_every_element_once(saved, kind, layout):
    results = saved(kind, layout)
    size = 0
    for part, tensors in zip(('model', 'optimizer'), whole(results, 'saved')):
        folder = Path(results[0]['checkpoint'], part)
        same_bits(read_files(folder), tensors)
        size += sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors.values())
    files = [path.stat().st_size for path in Path(results[0]['checkpoint']).glob('*/*.safetensors')]
    assert len(files) == 2 * LAYOUTS[layout][0]  # every process has its part in writing
    assert sum(files) < 1.2 * size + 2**16  # headers


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['fsdp', 'fsdp2'])
@pytest.mark.parametrize('kind', ['digits-GM', 'Flux-GM'])
def test_copies_of_shards(runs, saved, tmp_path, kind, strategy):
    """Four processes hold two copies, which are saved once; two processes go on with it, and the other way round."""
    weights, copies = runs.weights(kind), dict(shard_size=2)
    four = runs.call(4, train_and_save, kind, strategy, str(tmp_path / 'four'), weights=weights, options=copies)
    two = saved(kind, f'{strategy} x2')
    for part, tensors in zip(('model', 'optimizer'), whole(four, 'saved')):
        same_bits(read_files(Path(four[0]['checkpoint'], part)), tensors)
    after = runs.call(2, resume, kind, strategy, four[0]['checkpoint'], str(tmp_path / 'on two'), weights=weights)
    back = runs.call(
        4, resume, kind, strategy, two[0]['checkpoint'], str(tmp_path / 'on four'), weights=weights, options=copies
    )
    for found, source in ((after, four), (back, two)):
        for tensors, expected in zip(whole(found, 'loaded'), whole(source, 'saved')):
            same_bits(tensors, expected)
        assert worst_difference(found[0]['logs'], source[0]['logs']) < 2e-6
