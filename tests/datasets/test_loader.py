import itertools
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from lakonlab.datasets.collate import collate
from lakonlab.datasets.digits import Digits
from lakonlab.datasets.loader import build_dataloader


def test_batch_of_digits():
    batch = next(iter(build_dataloader(Digits(), 6, shuffle=True)))
    assert batch['latents'].shape == (6, 1, 8, 8)
    assert batch['labels'].shape == batch['negative_labels'].shape == (6,)
    assert batch['name'] == [str(label) for label in batch['labels'].tolist()]
    assert all(isinstance(number, int) for number in batch['ids'])


def ids(loader, count):
    return [batch['ids'] for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize('workers', [0, 2])
def test_training_loader_resumes_with_any_number_of_workers(workers):
    reference = ids(build_dataloader(Digits(), 64, shuffle=True, seed=3), 30)
    resumed = build_dataloader(Digits(), 64, workers, shuffle=True, seed=3, start_iter=21, persistent_workers=True)
    assert ids(resumed, 9) == reference[21:]


def test_evaluation_loader_reads_in_order():
    loader = build_dataloader(Digits('val', test_mode=True, num_test_images=25), 10)
    batches = [batch['ids'] for batch in loader]
    assert batches == [list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_shuffled_evaluation_is_refused():
    with pytest.raises(ValueError, match='infinite=True'):
        build_dataloader(Digits(), 4, shuffle=True, infinite=False)


def test_collate_follows_mappings():
    batch = collate([dict(a=dict(x=torch.zeros(2)), b='p', c=[1, 2]) for _ in range(3)])
    assert batch['a']['x'].shape == (3, 2)
    assert batch['b'] == ['p'] * 3
    assert batch['c'] == [[1, 2]] * 3


def test_collate_names_the_key_at_fault():
    with pytest.raises(ValueError, match="'x': cannot stack"):
        collate([dict(x=torch.zeros(2)), dict(x=torch.zeros(3))])
    with pytest.raises(KeyError, match='y'):
        collate([dict(y=1), dict()])


class Logged(torch.utils.data.Dataset):
    """Notes every item that is read, by whichever process, in a file."""

    def __init__(self, folder, size=400):
        self.path, self.size = folder / 'read.txt', size
        self.path.touch()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        with open(self.path, 'a') as file:
            file.write(f'{index}\n')
        return {'ids': index, 'x': torch.tensor(float(index))}

    def read(self):
        return [int(line) for line in self.path.read_text().split()]


@pytest.mark.parametrize('persistent', [False, True])
@pytest.mark.parametrize('start', [0, 1234])
def test_workers_load_only_what_is_read_and_the_next_batches(tmp_path, persistent, start):
    data = Logged(tmp_path)
    loader = build_dataloader(
        data, 5, 2, shuffle=True, start_iter=start, seed=4, persistent_workers=persistent, prefetch_factor=3
    )
    assert data.read() == []
    iterator = iter(loader)
    seen = [next(iterator)['ids'] for _ in range(10)]
    iterator._shutdown_workers()
    sampler = loader.batch_sampler
    assert seen == [sampler.batch(start + number) for number in range(10)]
    read = Counter(data.read())
    # two workers may each be three batches ahead, and nothing was read for any other iteration
    window = Counter(item for number in range(10 + 2 * 3) for item in sampler.batch(start + number))
    assert read <= window
    assert read >= Counter(item for items in seen for item in items)


@pytest.mark.parametrize('persistent', [False, True])
def test_every_pass_of_an_evaluation_reads_every_item_once(tmp_path, persistent):
    data = Logged(tmp_path, size=33)
    loader = build_dataloader(data, 4, 2, persistent_workers=persistent, prefetch_factor=2)
    for passes in (1, 2):
        assert sorted(item for batch in loader for item in batch['ids']) == list(range(33))
        assert Counter(data.read()) == dict.fromkeys(range(33), passes)


@pytest.mark.parametrize('context', ['fork', 'spawn', 'forkserver'])
def test_ways_to_start_workers(context):
    reference = build_dataloader(Digits(), 16, shuffle=True, seed=2)
    loader = build_dataloader(Digits(), 16, 1, shuffle=True, seed=2, multiprocessing_context=context)
    assert ids(loader, 3) == ids(reference, 3)


class Shaken(torch.utils.data.Dataset):
    """Numbers with noise that is drawn anew each time, and the size of each as its bucket."""

    bucket_ids = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1]

    def __len__(self):
        return len(self.bucket_ids)

    def random_item(self, index, source):
        noise = source.normal('noise', (1, 2 + self.bucket_ids[index]))[0]
        return {'ids': index, 'x': noise + 10 * index, 'flip': source.uniform('flip', (1,))[0] < 0.5}


def shaken(iterations, start=0, workers=0, world_size=1, seed=3):
    """What a run reads, as the batches of one process."""
    loaders = [
        build_dataloader(
            Shaken(),
            4 // world_size,
            workers,
            shuffle=True,
            seed=seed,
            start_iter=start,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for parts in itertools.islice(zip(*loaders), iterations):
        assert len({part['x'].shape for part in parts}) == 1
        yield [torch.cat([part[key] for part in parts]) for key in ('x', 'flip')]


@pytest.mark.parametrize('arguments', [dict(workers=2), dict(world_size=2), dict(world_size=4), dict(start=7)])
def test_random_items_depend_on_nothing_but_seed_epoch_and_item(arguments):
    whole = list(shaken(12))
    again = list(shaken(12 - arguments.get('start', 0), **arguments))
    for found, expected in zip(again, whole[arguments.get('start', 0) :], strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_random_items_are_drawn_anew():
    readings = {}
    for seed in (3, 4):
        for x, _ in shaken(60, seed=seed):
            for row in x:
                index = round(float(row.mean()) / 10)
                readings.setdefault((seed, len(row), index), []).append(tuple(row.tolist()))
    rows = [row for found in readings.values() for row in found]
    assert len(rows) == len(set(rows)) == 2 * 60 * 4
    noise = torch.tensor([value - 10 * round(sum(row) / len(row) / 10) for row in rows for value in row])
    assert abs(noise.mean()) < 0.1  # 1200 values: standard error 0.03
    assert abs(noise.std() - 1) < 0.1


def test_random_items_of_an_evaluation_are_the_same_every_time():
    loader = build_dataloader(Shaken(), 3)
    first, second = ([batch['x'] for batch in loader] for _ in range(2))
    assert [x.shape[1] for x in first] == [2, 2, 3, 3]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


class Gathered(torch.utils.data.Dataset):
    """Makes whole batches."""

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return {'ids': list(indices), 'x': torch.tensor(indices)}


def test_data_sets_may_make_whole_batches():
    batches = list(build_dataloader(Gathered(), 4))
    assert [batch['ids'] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch['x'].tolist() for batch in batches] == [batch['ids'] for batch in batches]


HARMLESS = dict(num_gpus=1, dist=True, sampler=None, drop_last=False, seed=None, pin_memory=False)
FOR_WORKERS = dict(
    persistent_workers=True, prefetch_factor=2, timeout=60, multiprocessing_context='fork', worker_init_fn=print
)


@pytest.mark.parametrize('workers', [0, 1])
def test_published_options_are_accepted(workers):
    loader = build_dataloader(Digits(), 4, workers, shuffle=True, **HARMLESS, **FOR_WORKERS)
    assert ids(loader, 2) == ids(build_dataloader(Digits(), 4, shuffle=True), 2)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (dict(num_gpus=8), 'num_gpus=8: only 1 is possible'),
        (dict(sampler=[0, 1]), r'sampler=\[0, 1\]: only None is possible'),
        (dict(drop_last=True), 'drop_last=True: only False is possible'),
        (dict(in_order=False), 'in_order=False'),
        (dict(batch_size=4), 'batch_size=4: it is called samples_per_gpu here'),
        (dict(num_workers=4), 'num_workers=4: it is called workers_per_gpu here'),
        (dict(dist=False, world_size=2), 'dist=False: this loader shares the data with 2 processes'),
        (dict(prefetch=4), r'prefetch=4 is no option of a loader; there are .*prefetch_factor'),
        (dict(samples_per_gpu=0), 'samples_per_gpu=0'),
    ],
)
def test_options_that_cannot_be_had_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        build_dataloader(Digits(), **{'samples_per_gpu': 4, 'shuffle': True, **option})


def test_many_batches_may_be_loaded_ahead():
    """Every tensor of a batch in a queue is an open file, and systems begin with few."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        loader = build_dataloader(Digits(), 1, 1, shuffle=True, prefetch_factor=120)
        iterator = iter(loader)
        first = next(iterator)['ids']
        time.sleep(0.5)  # until all are there
        rest = [next(iterator)['ids'] for _ in range(150)]
        assert [first, *rest] == ids(build_dataloader(Digits(), 1, shuffle=True), 151)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


SIGNALLED = """
import multiprocessing.forkserver, os, signal, time
from lakonlab.datasets.loader import build_dataloader
from tests.datasets.test_loader import Shaken

if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    loader = build_dataloader(
        Shaken(), 2, infinite=False, workers_per_gpu=1, multiprocessing_context='forkserver', prefetch_factor=1
    )
    batches = iter(loader)
    next(batches)
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.5)
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    print(os.waitpid(server, os.WNOHANG), 1 + len(list(batches)), len(loader))
"""


def test_workers_and_their_server_outlive_a_signal_to_all_processes_of_a_run(tmp_path):
    """A worker whose parent, the server, has gone would leave as soon as it has waited for some seconds."""
    script = tmp_path / 'load.py'
    script.write_text(SIGNALLED)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, 'PYTHONPATH': str(root)},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    number = -(-len(Shaken()) // 2)
    assert done.stdout.split('\n')[0] == f'(0, 0) {number} {number}', done.stderr
