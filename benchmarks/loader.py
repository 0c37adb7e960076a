"""How many cached latents a loader delivers, and how much memory it takes for that.

    python benchmarks/loader.py [--samples N] [--rounds N] [--workers 0 2] [--batch N] [--where local s3]

Latents of 256-pixel images, (4, 32, 32) in single precision, in batches in random order. What is compared with is a
plain ``DataLoader`` of PyTorch over one file per sample: a pickled dict of tensors (``pickle.load``); the file that
``torch.save`` makes, which is the published layout (``torch.load``); and, as the least that a file per sample can cost,
a pickled dict of a numpy array and an int. Ours is the ``ImageNet`` data set over the shards that
``tools/cache_imagenet_data_sdvae.py`` makes, through ``build_dataloader``.

Every case runs in a process of its own, with one thread per process, and all take turns in each round: a pass through
the data after the loader is built, with workers starting, shards opened and checksums compared; and the passes after
it. Medians over the rounds with the lowest and highest value. Processor time is that of all processes of a case.
Memory is measured apart from time, during two passes, every 50 ms: the most that all processes of a case held at once
beyond what they held before, as their own memory and memory shared among them, and the pages of files that are mapped,
which the system can take back.

With ``--where s3`` the files of tensors and the shards of a 32nd of the samples lie in a bucket of OpenStack Swift on
loopback (package ``swift`` of the ``test`` extra); the first pass of ours then downloads the shards. The server runs on
the same cores as the loaders.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lakonlab.datasets.imagenet import ImageNet  # noqa: E402
from lakonlab.datasets.loader import build_dataloader  # noqa: E402
from tests.datasets.latent_files import write_latents  # noqa: E402

SHAPE = (4, 32, 32)
LATER_PASSES = 3
POLL_SECONDS = 0.05
REMOTE_SHARE = 32
REMOTE_CASES = ('pickle', 'torch', 'ours')
CASES = {
    'pickle': 'pickled tensors, a file each',
    'torch': 'torch.save, a file each (published)',
    'numpy': 'pickled arrays, a file each',
    'ours': 'shards, ours',
}
BASELINES = [case for case in CASES if case != 'ours']


def dump(case: str, latents: torch.Tensor, label: int) -> bytes:
    """The file of one sample."""
    if case == 'numpy':
        return pickle.dumps({'x': latents.numpy(), 'y': label})
    record = {'x': latents.clone(), 'y': torch.tensor(label)}
    if case == 'pickle':
        return pickle.dumps(record)
    stream = io.BytesIO()
    torch.save(record, stream)
    return stream.getvalue()


class FilePerSample(Dataset):
    """What one would write without further thought.

    Args:
        folder: A directory, or ``s3://bucket/prefix``.
        count: Number of files in it.
        case: How they are written.
    """

    def __init__(self, folder: str, count: int, case: str):
        self.folder, self.count, self.case = folder, count, case
        self._client: Any = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        with self._open(index) as file:
            record = torch.load(file, weights_only=True) if self.case == 'torch' else pickle.load(file)
        latents = torch.from_numpy(record['x']) if self.case == 'numpy' else record['x']
        return {'latents': latents, 'labels': record['y'], 'ids': index}

    def _open(self, index: int) -> Any:
        if not self.folder.startswith('s3://'):
            return open(f'{self.folder}/{index}', 'rb')
        import boto3

        self._client = self._client or boto3.client('s3')
        bucket, _, prefix = self.folder.removeprefix('s3://').partition('/')
        return io.BytesIO(self._client.get_object(Bucket=bucket, Key=f'{prefix}/{index}')['Body'].read())


def batches_of(folder: str, case: str, count: int, batch: int, workers: int) -> Iterator[dict]:
    """Batches without end, as a training loop would get them."""
    if case == 'ours':
        data = ImageNet(folder, label2name_path=os.environ['LABEL_NAMES'], random_flip=False)
        yield from build_dataloader(data, batch, workers, shuffle=True, seed=1, persistent_workers=True)
    data = FilePerSample(folder, count, case)
    loader = DataLoader(data, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader


def measure(folder: str, case: str, count: int, batch: int, workers: int, passes: int) -> dict[str, list[float]]:
    """Time some passes; called in a process of its own.

    Returns:
        ``seconds`` and ``processor`` seconds of each pass.
    """
    torch.set_num_threads(1)
    seconds, processor = [], []
    per_pass = count // batch
    begun, used = time.perf_counter(), processor_seconds(os.getpid())
    batches = batches_of(folder, case, count, batch, workers)
    for _ in range(passes):
        for loaded in itertools.islice(batches, per_pass):
            if loaded['latents'].shape != (batch, *SHAPE):
                raise RuntimeError(f'{case}: a batch of shape {tuple(loaded["latents"].shape)}')
        ended, total = time.perf_counter(), processor_seconds(os.getpid())
        seconds.append(ended - begun)
        processor.append(total - used)
        begun, used = ended, total
    return {'seconds': seconds, 'processor': processor}


def tree(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f'/proc/{parent}/task'):
                found += map(int, Path(f'/proc/{parent}/task/{task}/children').read_text().split())
    return found


def processor_seconds(process: int) -> float:
    """Processor time of a process and all that run below it."""
    nanoseconds = 0
    for each in tree(process):
        with contextlib.suppress(OSError):
            for task in os.listdir(f'/proc/{each}/task'):
                nanoseconds += int(Path(f'/proc/{each}/task/{task}/schedstat').read_text().split()[0])
    return nanoseconds / 1e9


def held_bytes(process: int) -> tuple[int, int]:
    """What a process and all below it hold: memory that is theirs, and mapped pages of files."""
    own = mapped = 0
    for each in tree(process):
        with contextlib.suppress(OSError):
            lines = Path(f'/proc/{each}/smaps_rollup').read_text().splitlines()[1:]
            sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(':') for line in lines)}
            own += sizes['Pss_Anon'] + sizes['Pss_Shmem']
            mapped += sizes['Pss_File']
    return own, mapped


def measure_memory(*arguments: Any) -> dict[str, int]:
    """Most bytes held while reading two passes, beyond those held before; called in a process of its own."""
    before = held_bytes(os.getpid())
    peaks, done = [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            for kind, value in enumerate(held_bytes(os.getpid())):
                peaks[kind] = max(peaks[kind], value - before[kind])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        measure(*arguments, 2)
    finally:
        done.set()
        watcher.join()
    return {'own': peaks[0], 'mapped': peaks[1]}


def in_process(name: str, *arguments: Any) -> dict[str, Any]:
    """Call a function of this file in a new process."""
    call = [sys.executable, __file__, '--call', json.dumps([name, *arguments])]
    done = subprocess.run(call, stdout=subprocess.PIPE, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return json.loads(done.stdout.splitlines()[-1])


def described(values: list[float], form: str = ',.0f') -> str:
    """Median, lowest and highest value."""
    return f'{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})'


def compare(folders: dict[str, str], count: int, arguments: argparse.Namespace, prepare: Callable[[], None]) -> None:
    """Measure all cases in turn, and print.

    Args:
        folders: Where the files of each case lie.
        count: Samples.
        arguments: Of the command line.
        prepare: Called before each measurement.
    """
    batch = min(arguments.batch, count // 4)
    for workers in arguments.workers:
        found: dict[str, list[dict]] = {case: [] for case in folders}
        for _ in tqdm(range(arguments.rounds), desc=f'{workers} workers', unit='round'):
            for case, folder in folders.items():
                prepare()
                passes = 1 + LATER_PASSES
                found[case].append(in_process('measure', folder, case, count, batch, workers, passes))
        read = count // batch * batch
        rates = {
            case: [
                (read / one['seconds'][0], LATER_PASSES * read / sum(one['seconds'][1:]), one['processor'])
                for one in measured
            ]
            for case, measured in found.items()
        }
        print(f'\n{workers} worker(s), batches of {batch}: samples per second')
        for case, rows in rates.items():
            first, later = ([row[column] for row in rows] for column in range(2))
            spent = [sum(row[2][1:]) / (LATER_PASSES * read) * 1e6 for row in rows]
            prepare()
            memory = in_process('measure_memory', folders[case], case, count, batch, workers)
            print(
                f'  {CASES[case]:36} first pass {described(first)}; later {described(later)}; '
                f'{described(spent, ".0f")} us of processor time each; '
                f'{memory["own"] / 1e6:.0f} MB, and {memory["mapped"] / 1e6:.0f} MB of mapped files'
            )
        for case in filter(folders.get, BASELINES):
            ratios = [
                [ours[column] / its[column] for ours, its in zip(rates['ours'], rates[case])] for column in (0, 1)
            ]
            cost = [sum(its[2][1:]) / sum(ours[2][1:]) for ours, its in zip(rates['ours'], rates[case])]
            print(
                f'  ours : {CASES[case]:29} first pass {described(ratios[0], ".1f")}; later '
                f'{described(ratios[1], ".1f")}; processor time {described(cost, ".1f")}'
            )
        sys.stdout.flush()


def local(folder: Path, latents: torch.Tensor, arguments: argparse.Namespace) -> None:
    """Files on a local disk, all of them in the page cache."""
    folders = {}
    for case in tqdm(BASELINES, desc='files'):
        folders[case] = str(folder / case)
        (folder / case).mkdir()
        for number, value in enumerate(latents):
            (folder / case / str(number)).write_bytes(dump(case, value, number % 1000))
    folders['ours'] = str(folder / 'ours')
    write_latents(folders['ours'], latents)
    print(f'\nlocal disk, {len(latents)} samples')
    compare(folders, len(latents), arguments, lambda: None)


def remote(folder: Path, latents: torch.Tensor, arguments: argparse.Namespace) -> None:
    """The same over S3; downloads of a measurement are thrown away before the next."""
    from tests.s3_server import PLACES, place_with_attributes, run_swift

    latents = latents[: len(latents) // REMOTE_SHARE]
    place = place_with_attributes(PLACES)
    with tempfile.TemporaryDirectory(prefix='loader-benchmark-', dir=place) as disk, run_swift(Path(disk)) as server:
        os.environ.update(server.environment())
        client = server.client()
        client.create_bucket(Bucket='benchmark')
        folders = {case: f's3://benchmark/{case}' for case in REMOTE_CASES}
        for case in filter(folders.get, BASELINES):
            for number, value in enumerate(tqdm(latents, desc=case)):
                body = dump(case, value, number % 1000)
                client.put_object(Bucket='benchmark', Key=f'{case}/{number}', Body=body)
        write_latents(folders['ours'], latents)
        caches = itertools.count()

        def prepare() -> None:
            os.environ['LAKONLAB_CACHE_DIR'] = str(folder / f'cache_{next(caches)}')

        print(f'\nS3 (Swift on loopback), {len(latents)} samples')
        compare(folders, len(latents), arguments, prepare)


PLACES = {'local': local, 's3': remote}


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--samples', type=int, default=8192, help='samples')
    parser.add_argument('--rounds', type=int, default=5, help='how often every case is measured')
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 2], help='worker processes of a loader')
    parser.add_argument('--batch', type=int, default=256, help='batch size')
    parser.add_argument('--where', nargs='+', choices=list(PLACES), default=['local'], help='where the files lie')
    parser.add_argument('--call', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        name, *values = json.loads(arguments.call)
        print(json.dumps({'measure': measure, 'measure_memory': measure_memory}[name](*values)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers are stopped on the way out
    latents = torch.randn(arguments.samples, *SHAPE, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory(prefix='loader-benchmark-') as name:
        folder = Path(name)
        os.environ['LABEL_NAMES'] = str(folder / 'names.txt')
        (folder / 'names.txt').write_text('\n'.join(f"{label}: 'class {label}'," for label in range(1000)))
        for place in arguments.where:
            (folder / place).mkdir()
            PLACES[place](folder / place, latents, arguments)
    print(f'load average at the end: {os.getloadavg()[0]:.1f}, cores: {os.cpu_count()}')


if __name__ == '__main__':
    main()
