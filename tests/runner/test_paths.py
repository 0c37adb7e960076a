"""Where a run writes."""

import pytest
from mmengine.config import Config

from lakonlab.config.errors import ConfigError
from lakonlab.runner.paths import check_places, places_written, require_writable_places, run_directory, settle_work_dir
from lakonlab.storage import files


@pytest.mark.parametrize(
    ('out_dir', 'work_dir', 'mirror', 'expected'),
    [
        (None, 'work_dirs/a', None, 'checkpoints/a'),
        ('work_dirs/a', 'work_dirs/a', None, 'work_dirs/a'),
        ('s3://bucket/x/', 'work_dirs/a', None, 's3://bucket/x/a'),
        ('s3://bucket', 'work_dirs/a', 's3://bucket/logs/a', 's3://bucket/a'),
        ('s3://bucket/runs/a', 'work_dirs/a', 's3://bucket/runs/a', 's3://bucket/runs/a'),
    ],
)
def test_directory_of_checkpoints(out_dir, work_dir, mirror, expected):
    assert str(run_directory(out_dir, work_dir, mirror)) == expected


def test_a_remote_work_dir_is_a_local_one_with_a_copy():
    cfg = Config(dict(work_dir='s3://bucket/logs/a/'))
    settle_work_dir(cfg)
    assert (cfg.work_dir, cfg.work_dir_mirror) == ('work_dirs/a', 's3://bucket/logs/a')
    cfg = Config(dict(work_dir='somewhere/a'))
    settle_work_dir(cfg)
    assert cfg.to_dict() == dict(work_dir='somewhere/a')
    with pytest.raises(ConfigError, match='only one of the two can be remote'):
        settle_work_dir(Config(dict(work_dir='s3://bucket/a', work_dir_mirror='s3://bucket/b')))


def config(where):
    return dict(
        work_dir='work_dirs/a',
        checkpoint_config=dict(out_dir=f'{where}/checkpoints'),
        evaluation=[dict(viz_dir=f'{where}/viz'), dict(viz_dir='https://host/x', viz_num=0), dict()],
    )


def test_every_place_is_checked(bucket):
    cfg = config(bucket)
    assert list(places_written(cfg)) == ['checkpoint_config.out_dir', 'work_dir', 'evaluation[0].viz_dir']
    check_places(cfg, {'--ckpt': None, '--resume-from': 'huggingface://a/b/c'})
    require_writable_places(cfg)
    assert files.list_files(bucket) == []
    with pytest.raises(ConfigError, match=r"load_from: 'https://host/x': https:// cannot be listed"):
        check_places({**cfg, 'load_from': 'https://host/x'}, {})
    with pytest.raises(OSError, match=r'choose another directory with checkpoint_config\.out_dir'):
        require_writable_places(config('s3://absent-bucket'))
    require_writable_places(config('s3://absent-bucket'), 'work_dir_mirror')
