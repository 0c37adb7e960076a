"""Distances in features of a network that knows ImageNet, between real pictures of clothes."""

import importlib.util

import pytest
import torch

from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.frechet import frechet_distance
from lakonlab.evaluation.mobilenet import INSTALL, PACKAGE
from lakonlab.evaluation.preparation import Preparation
from lakonlab.evaluation.reference_making import make_reference
from lakonlab.registry import DATASETS
from tests.debian_packages import needs

COUNT = 2000
pytestmark = [
    pytest.mark.slow,  # 14,000 pictures through the network
    needs('dataset-fashion-mnist'),
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f'no weights of MobileNetV2: {INSTALL}'),
]


def pictures(split, rows, classes=range(10)):
    """Pictures in [0, 1] of some classes, in the order of the data set."""
    data = DATASETS.build(dict(type='FashionMNIST', split=split))
    found = []
    for row in rows:
        item = data[row]
        if int(item['labels']) in classes:
            found.append(item['latents'] / 2 + 0.5)
        if len(found) == COUNT:
            break
    return torch.stack(found)


def test_order_of_distances():
    extractor = ExtractorPool().build(dict(type='MobileNetV2', input_size=64))
    preparation = Preparation(extractor.input_size)

    def statistics(images):
        return make_reference(images.split(250), extractor, preparation, {}, keep_features=False)

    train = pictures('train', range(60000))
    noise = torch.randn(train.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        'itself': train,
        'other pictures': pictures('train', range(30000, 60000)),
        'half the classes': pictures('train', range(30000, 60000), range(5)),
        **{f'noise {level}': (train + level * noise).clamp(0, 1) for level in (0.1, 0.3, 0.6)},
    }
    reference = statistics(train)
    found = {}
    for name, images in sets.items():
        other = statistics(images)
        found[name] = frechet_distance(other.mean, other.covariance, reference.mean, reference.covariance)
    print({name: round(value, 2) for name, value in found.items()})  # noqa: T201 - the figures of docs/evaluation.md
    assert found['itself'] == pytest.approx(0, abs=1e-6)
    order = list(found.values())
    assert order == sorted(order)
    assert found['other pictures'] < 0.1 * found['noise 0.1']  # most of it is the bias of 2,000 pictures
    assert found['half the classes'] / found['other pictures'] > 3
    assert found['noise 0.1'] > 2 * found['half the classes']
