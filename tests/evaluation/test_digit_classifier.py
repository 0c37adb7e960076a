import json

import pytest
import torch
from safetensors.torch import save_file

from lakonlab.datasets.digits import load_split
from lakonlab.evaluation.digit_classifier import SHIPPED_WEIGHTS, DigitClassifier
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.frechet import Moments, frechet_distance

FIGURES = json.loads(SHIPPED_WEIGHTS.with_suffix('.json').read_text())


def test_shipped_weights_are_small_and_the_recorded_ones():
    assert SHIPPED_WEIGHTS.stat().st_size < 300_000
    assert DigitClassifier().weights_hash == FIGURES['sha256']


@pytest.mark.parametrize(('split', 'key'), [('train', 'train_accuracy'), ('val', 'held_out_accuracy')])
def test_accuracy_is_the_recorded_one(split, key):
    images, labels = load_split(split)
    with torch.no_grad():
        logits = DigitClassifier()(images / 2 + 0.5).logits
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    assert accuracy == pytest.approx(FIGURES[key], abs=0.003)
    assert accuracy > 0.98


def test_distance_between_real_splits_is_the_recorded_one():
    moments = []
    for split in ('train', 'val'):
        images, _ = load_split(split)
        with torch.no_grad():
            embedding = DigitClassifier()(images / 2 + 0.5).embedding
        moments.append(Moments())
        moments[-1].update(embedding)
        assert embedding.shape == (len(images), FIGURES['feature_dim'])
    assert moments[0].covariance().trace() / FIGURES['feature_dim'] == pytest.approx(1, rel=1e-4)
    distance = frechet_distance(moments[0].mean(), moments[0].covariance(), moments[1].mean(), moments[1].covariance())
    assert distance == pytest.approx(FIGURES['frechet_distance_train_to_held_out'], rel=1e-3)


def test_pool_builds_each_extractor_once_and_frozen():
    pool = ExtractorPool()
    extractor = pool.build(dict(type='DigitClassifier'))
    assert extractor is pool.build(dict(type='DigitClassifier'))
    assert not extractor.training
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert extractor.protocol()['weights_sha256'] == FIGURES['sha256']


def test_bad_weights_and_images(tmp_path):
    with pytest.raises(FileNotFoundError, match='no file'):
        DigitClassifier(str(tmp_path / 'missing.safetensors'))
    save_file({'weight': torch.zeros(2)}, tmp_path / 'other.safetensors')
    with pytest.raises(ValueError, match='does not hold a digit classifier'):
        DigitClassifier(str(tmp_path / 'other.safetensors'))
    with pytest.raises(ValueError, match=r'\(B, 1, 8, 8\)'):
        DigitClassifier()(torch.zeros(2, 3, 8, 8))
