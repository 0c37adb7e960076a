"""What the real command says, in two processes, of checkpoints that it cannot use."""

import shutil

from tests.tools.training import DATA_BASED


def test_said_once_and_nothing_changed(new_training, uninterrupted_in_two_processes):
    whole = uninterrupted_in_two_processes('fsdp2')
    training = new_training('damaged', DATA_BASED, processes=2, **whole.options)
    shutil.copytree(whole.checkpoints, training.checkpoints)
    shards = sorted(training.checkpoints.glob('iter_*/optimizer/rank_00001_*.safetensors'))
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    before = sorted(training.checkpoints.rglob('*'))
    process = training.start()
    assert process.wait(120) == 1
    printed = training.output
    assert printed.count('error: none of the 2 checkpoints in ') == printed.count('error: ') == 1
    for shard in shards:
        name = shard.relative_to(training.folder)
        assert f'{name} is damaged: its checksum is not the one in the manifest' in printed
    assert 'Traceback (most recent call last)' not in printed.partition('error: ')[0]
    assert sorted(training.checkpoints.rglob('*')) == before
