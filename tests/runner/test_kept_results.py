"""What stays in a file of results, and what is evaluated again, when the same checkpoint is evaluated again."""

import shutil

import pytest
import torch

from lakonlab.evaluation.digit_classifier import SHIPPED_WEIGHTS
from lakonlab.evaluation.frechet import Moments
from lakonlab.evaluation.statistics import ReferenceStatistics
from lakonlab.runner.testing import evaluate_checkpoint
from tests.runner.test_testing import config, save


def write_reference(path, shift=0.0):
    moments = Moments()
    moments.update(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) + shift)
    ReferenceStatistics(moments.mean(), moments.covariance(), 200).save(path)


@pytest.fixture
def cfg(tmp_path):
    """An entry that compares with a file and sees through another one, and one that does neither."""
    cfg = config(tmp_path)
    save(tmp_path)
    write_reference(tmp_path / 'r.safetensors')
    shutil.copyfile(SHIPPED_WEIGHTS, tmp_path / 'w.safetensors')
    metric = dict(
        type='InceptionMetrics',
        reference=str(tmp_path / 'r.safetensors'),
        extractor=dict(type='DigitClassifier', weights=str(tmp_path / 'w.safetensors')),
        use_pr=False,
    )
    fid, plain = (dict(entry, viz_num=0) for entry in cfg.evaluation)
    cfg.evaluation = [dict(fid, metrics=metric), dict(plain, metrics=[dict(type='ColorStats')])]
    return cfg


def replace_weights(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(SHIPPED_WEIGHTS)
    save_file({name: tensor * 1.1 for name, tensor in state.items()}, folder / 'w.safetensors')


@pytest.mark.parametrize(
    ('replace', 'fact'),
    [
        (lambda folder: write_reference(folder / 'r.safetensors', 3.0), 'InceptionMetrics: reference.sha256 was'),
        (replace_weights, 'InceptionMetrics: extractor.weights_sha256 was'),
    ],
)
def test_results_of_replaced_files_are_not_kept(cfg, tmp_path, caplog, replace, fact):
    first = evaluate_checkpoint(cfg, skip_existing=True)['evaluations']
    assert evaluate_checkpoint(cfg, skip_existing=True)['evaluations'] == first
    assert not any('again' in record.getMessage() for record in caplog.records)
    replace(tmp_path)
    fid, plain = evaluate_checkpoint(cfg, skip_existing=True)['evaluations']
    assert plain == first[1]
    assert fid['metrics']['fid'] != pytest.approx(first[0]['metrics']['fid'], rel=0.01)
    assert fact in caplog.text


def test_a_reference_that_has_gone_is_missed(cfg, tmp_path):
    evaluate_checkpoint(cfg)
    (tmp_path / 'r.safetensors').unlink()
    with pytest.raises(OSError, match=r'r\.safetensors'):
        evaluate_checkpoint(cfg, skip_existing=True)


def test_kept_results_say_how_they_were_made(cfg):
    first = evaluate_checkpoint(cfg, command='first')['evaluations']
    cfg.evaluation = [dict(cfg.evaluation[0], metrics=[dict(type='ColorStats')]), cfg.evaluation[1]]
    second = evaluate_checkpoint(cfg, command='second', skip_existing=True)
    assert [entry['made']['command'] for entry in second['evaluations']] == ['second', 'first']
    assert second['evaluations'][1] == first[1]
    assert {'finished', 'torch', 'python', 'versions', 'strategy', 'num_threads'} <= set(first[0]['made'])
    assert not {'command', 'versions', 'strategy', 'num_threads'} & set(second)  # which would be of all of them
