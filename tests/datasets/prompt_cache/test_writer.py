"""Making a cache: by any number of processes, in one go or in many, it is the same cache."""

import json
import subprocess
import sys

import pytest
import torch

from lakonlab.datasets.prompt_cache import CacheError, open_prompt_cache
from lakonlab.datasets.prompt_cache.index import INDEX_FILE, PLAN_FILE, PROMPTS, Table
from lakonlab.datasets.prompt_cache.rows import text_tensor
from lakonlab.datasets.prompt_cache.sharded import EMBEDS, PROMPT
from lakonlab.datasets.prompt_cache.writer import CacheWriter
from lakonlab.ranks import ALONE, Ranks
from tests.datasets.prompt_cache.caches import content_of, normal
from tests.processes import run_processes

ROWS, ROWS_PER_SHARD = 23, 4


class Killed(BaseException):
    """Ends a process where it is."""


def make_rows(rows, made=None, stop_after=None):
    if made is not None:
        made.extend(rows)
        if stop_after is not None and len(made) > stop_after:
            raise Killed
    return [
        {PROMPT: text_tensor(f'prompt {row}'), 'encoder_hidden_states': normal(2 + row % 3, 8, seed=row)}
        for row in rows
    ]


def new_writer(folder, ranks=ALONE, rows_per_shard=ROWS_PER_SHARD, **plan):
    return CacheWriter(
        str(folder), PROMPTS, ROWS, {EMBEDS: Table(ROWS, rows_per_shard)}, {'of': 'tests', **plan}, ranks
    )


def make(folder, ranks=ALONE, made=None, stop_after=None, **options):
    writer = new_writer(folder, ranks, **options)
    if not writer.start():
        return False
    writer.fill(EMBEDS, lambda rows: make_rows(rows, made, stop_after), 3, 'rows')
    writer.finish({'fact': 1})
    return True


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('caches') / 'whole'
    assert make(folder)
    return folder


def test_batches_do_not_span_shards(tmp_path):
    batches = []
    writer = new_writer(tmp_path / 'cache')
    writer.start()
    writer.fill(EMBEDS, lambda rows: batches.append(list(rows)) or make_rows(rows), 3, 'rows')
    assert batches[:4] == [[0, 1, 2], [3], [4, 5, 6], [7]]


@pytest.mark.parametrize('stop_after', range(0, ROWS, 5))
def test_interrupted_and_gone_on_with(stop_after, whole, tmp_path):
    folder = tmp_path / 'cache'
    with pytest.raises(Killed):
        make(folder, made=[], stop_after=stop_after)
    assert not (folder / INDEX_FILE).exists()
    with pytest.raises(CacheError, match='not finished'):
        open_prompt_cache(folder)
    kept = stop_after // ROWS_PER_SHARD
    made = []
    assert make(folder, made=made)
    assert made == list(range(kept * ROWS_PER_SHARD, ROWS))
    assert content_of(folder) == content_of(whole)


def test_finished_caches_are_not_made_again(whole):
    before = content_of(whole)
    made = []
    assert not make(whole, made=made)
    assert made == []
    assert content_of(whole) == before


def _make(ranks, folder):
    return make(folder, ranks)


@pytest.mark.parametrize('world_size', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_make_the_same_cache(world_size, whole, tmp_path):
    folder = tmp_path / 'cache'
    assert run_processes(_make, world_size, folder) == [True] * world_size
    assert content_of(folder) == content_of(whole)


def test_shards_are_dealt_out_evenly(tmp_path):
    shares = []
    for rank in range(4):
        writer = new_writer(tmp_path / 'cache', Ranks(rank=rank, world_size=4))
        writer._missing = {EMBEDS: list(range(6))}
        shares.append(writer.share(EMBEDS))
    assert sorted(number for share in shares for number in share) == list(range(6))
    assert {len(share) for share in shares} == {1, 2}


def test_another_plan_is_refused(whole):
    before = content_of(whole)
    with pytest.raises(CacheError, match=r"of 'tests' there and 'others' here.*Nothing is overwritten"):
        make(whole, of='others')
    with pytest.raises(CacheError, match='tables'):
        make(whole, rows_per_shard=5)
    assert content_of(whole) == before


def test_damaged_and_foreign_shards_are_made_again(whole, tmp_path, caplog):
    folder, other = tmp_path / 'cache', tmp_path / 'other'
    make(folder)
    make(other, of='others')
    (folder / INDEX_FILE).unlink()
    first, second, third = (folder / f'embeds-00000{number}.safetensors' for number in range(3))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes((other / second.name).read_bytes())
    third.unlink()
    made = []
    assert make(folder, made=made)
    assert made == list(range(3 * ROWS_PER_SHARD))
    assert content_of(folder) == content_of(whole)
    assert 'made again' in caplog.text


def test_an_index_without_a_plan_is_not_touched(whole, tmp_path):
    folder = tmp_path / 'cache'
    make(folder)
    (folder / PLAN_FILE).unlink()
    with pytest.raises(CacheError, match=PLAN_FILE):
        make(folder)


def test_rows_that_fail_to_be_made_are_raised(tmp_path):
    writer = new_writer(tmp_path / 'cache')
    writer.start()
    with pytest.raises(CacheError, match='1 rows were made of 3'):
        writer.fill(EMBEDS, lambda rows: make_rows(rows)[:1], 3, 'rows')

    def unreadable(rows):
        return [{'x': torch.ones(2, dtype=torch.complex64)} for _ in rows]

    with pytest.raises(CacheError, match='complex'):  # raised by the thread that encodes, not lost in it
        writer.fill(EMBEDS, unreadable, 3, 'rows')
    with pytest.raises(CacheError, match='6 shards of embeds were not made'):
        writer.finish({})
    assert not (tmp_path / 'cache' / INDEX_FILE).exists()


@pytest.mark.parametrize(
    'header',
    [
        b'{}',
        b'[]',
        b'{"a.rows": {}}',
        b'{"a.rows": {"shape": [], "data_offsets": [0, 0]}}',
        b'{"a.rows": {"shape": [1, 5], "data_offsets": ["x", 0]}}',
        b'{"a.data": {"shape": [1], "data_offsets": [8, 0]}}',
        b'{"__metadata__": {"plan": 1}}',
        b'\xff\xff',
        b'[' * 100000,
    ],
    ids=range(9),
)
def test_shards_with_a_damaged_head_are_made_again(header, tmp_path, caplog):
    make(tmp_path / 'whole')
    make(tmp_path / 'cache')
    (tmp_path / 'cache' / INDEX_FILE).unlink()
    path = tmp_path / 'cache' / 'embeds-000000.safetensors'
    path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(64))
    make(tmp_path / 'cache')
    assert 'embeds-000000.safetensors' in caplog.text
    assert content_of(tmp_path / 'cache') == content_of(tmp_path / 'whole')


def test_a_write_that_fails_is_raised(tmp_path, monkeypatch):
    from lakonlab.datasets.prompt_cache import writer as module

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(module, 'write_shard', full)
    with pytest.raises(OSError, match='No space left'):
        make(tmp_path / 'cache')
    assert {path.name for path in (tmp_path / 'cache').iterdir() if path.suffix} == {PLAN_FILE}


def test_two_runs_at_once_are_refused(tmp_path):
    folder = tmp_path / 'cache'
    writer = new_writer(folder)
    writer.start()
    code = (
        'from pathlib import Path; from lakonlab.storage.local import directory_lock\n'
        f'with directory_lock(Path({str(folder)!r}), 0.2): pass'
    )
    assert (
        'in use by another run' in subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr
    )
    writer.fill(EMBEDS, make_rows, 3, 'rows')
    writer.finish({})
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_what_killed_writers_left_is_removed(whole, tmp_path):
    folder = tmp_path / 'cache'
    folder.mkdir()
    (folder / '.embeds-000000.safetensors.tmp-1-abcdef').write_bytes(b'half')
    assert make(folder)
    assert not (folder / '.embeds-000000.safetensors.tmp-1-abcdef').exists()
    assert content_of(folder) == content_of(whole)


def test_facts_are_in_the_index(whole):
    facts = json.loads((whole / INDEX_FILE).read_text())['facts']
    assert facts['fact'] == 1
    assert facts['of'] == 'tests'
