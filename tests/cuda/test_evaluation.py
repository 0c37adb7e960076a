"""Metrics on a GPU: the numbers of a CPU, and no memory kept."""

import gc

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2

from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.frechet import Moments
from lakonlab.evaluation.hook import GenerativeEvalHook
from lakonlab.evaluation.inception_metrics import InceptionMetrics
from lakonlab.evaluation.kernel_distance import kernel_distance
from lakonlab.evaluation.manifold import precision_recall
from lakonlab.evaluation.mobilenet import MobileNetV2
from lakonlab.evaluation.results import run_evaluations
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.evaluation.statistics import ReferenceStatistics
from tests.cuda.device import DEVICE

SIZE = 64


@pytest.fixture(scope='module')
def extractor(tmp_path_factory):
    """Config of a network with drawn weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('mobilenet') / 'weights.pth'
    torch.save(mobilenet_v2().state_dict(), path)
    return dict(type='MobileNetV2', weights=str(path), input_size=SIZE)


def drawn(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) + shift
    return nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode='bilinear').clamp(0, 1)


@pytest.fixture(scope='module')
def reference(extractor, tmp_path_factory):
    network = ExtractorPool().build(extractor)
    moments, features = Moments(), []
    with torch.no_grad():
        for part in drawn(200, seed=1).split(100):
            features.append(network(part).embedding)
            moments.update(features[-1])
    path = tmp_path_factory.mktemp('reference') / 'reference.safetensors'
    ReferenceStatistics(moments.mean(), moments.covariance(), 200, torch.cat(features), {}).save(path)
    return str(path)


def numbers(reference, extractor, device):
    metric = InceptionMetrics(reference, extractor=extractor, use_kid=True, kid_max_subset_size=100)
    metric.bind(ExtractorPool())
    metric.reset()
    for number, part in enumerate(drawn(150, seed=2, shift=0.1).to(device).split(50)):
        metric.feed(SampleBatch(part, list(range(50 * number, 50 * number + 50)), feed_batch_size=32))
    assert next(metric.extractor.parameters()).device.type == torch.device(device).type
    return metric.compute()


def test_as_on_a_cpu(reference, extractor):
    found, expected = (numbers(reference, extractor, device) for device in (DEVICE, 'cpu'))
    assert {'fid', 'kid', 'is', 'precision', 'recall'} <= set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=0.02 if name in ('precision', 'recall') else 1e-6), (
            name
        )


def test_functions_of_features_on_the_device():
    """They take features where they are."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(500, 32, generator=generator) + shift for shift in (0.0, 0.3))
    here = precision_recall(first.to(DEVICE), second.to(DEVICE)), kernel_distance(first.to(DEVICE), second, 5, 200)
    there = precision_recall(first, second), kernel_distance(first, second, 5, 200)
    assert here[0] == pytest.approx(there[0], abs=0.01)
    assert here[1].mean == pytest.approx(there[1].mean, rel=1e-4)
    moments = Moments()
    moments.update(first.to(DEVICE))
    torch.testing.assert_close(moments.covariance(), torch.cov(first.double().T))


class Painter(nn.Module):
    """Paints noise brighter."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.full((), 0.5))

    def val_step(self, data, role=None, test_cfg_override=None, source=None):
        draws = source.normal('probe', data['noise'].shape, device=data['noise'].device)
        images = (0.2 * data['noise'] + 0.05 * draws + self.offset).clamp(0, 1)
        return dict(num_samples=len(images), pred_imgs=images, nfe=1)


def evaluation(extractor, **entry):
    digits = dict(type='Digits', split='val', test_mode=True, num_test_images=60)
    distance = dict(type='FrechetDistance', extractor=dict(type='DigitClassifier'), reference=dict(type='Digits'))
    accuracy = dict(type='ClassAccuracy', extractor=dict(type='DigitClassifier'))
    wide = dict(type='VendiScore', extractor=extractor, per_group=False)
    return dict(
        name='run',
        data=dict(workers_per_gpu=0, train=dict(type='Digits'), val=digits, val_dataloader=dict(samples_per_gpu=20)),
        evaluation=[
            dict(
                dict(type='GenerativeEvalHook', data='val', prefix='p', viz_num=0, metrics=[distance, accuracy, wide]),
                **entry,
            )
        ],
    )


def test_evaluation_of_a_model(extractor):
    cfg = evaluation(extractor)
    (found,), (expected,) = (run_evaluations(Painter().to(device), cfg) for device in (DEVICE, 'cpu'))
    assert found['metrics'].keys() == expected['metrics'].keys()
    for name, value in expected['metrics'].items():
        if 'second' not in name and 'per_s' not in name:
            assert found['metrics'][name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize('is_offloaded', [True, False])
def test_networks_leave_the_device(extractor, is_offloaded):
    """Between evaluations, if asked to; and come back."""
    cfg = evaluation(extractor)
    entry = {key: value for key, value in cfg['evaluation'][0].items() if key != 'type'}
    hook = GenerativeEvalHook(**entry, metric_cpu_offload=is_offloaded)
    model = Painter().to(DEVICE)
    results, held = [], []
    for tag in ('1', '2'):
        gc.collect()
        before = torch.cuda.memory_allocated() if DEVICE == 'cuda' else 0
        results.append(hook.run(model, cfg['data'], 'run', tag)[0])
        gc.collect()
        held.append((torch.cuda.memory_allocated() if DEVICE == 'cuda' else 0) - before)
        places = {
            tensor.device.type for network in hook.extractors._extractors.values() for tensor in network.buffers()
        }
        assert places == {'cpu' if is_offloaded else DEVICE}
    if DEVICE == 'cuda':  # the first time includes what libraries of the device keep
        assert held[1] < 2**20
        assert held[0] > 2**23 or is_offloaded
    assert results[0]['metrics']['vendi'] == pytest.approx(results[1]['metrics']['vendi'])


def test_extractor_by_name_and_device(extractor):
    """Features of single and of many images, on either device, are those of the network."""
    network = MobileNetV2(extractor['weights'], SIZE).eval()
    pixels = drawn(4, seed=3)
    with torch.no_grad():
        expected = network(pixels)
        found = network.to(DEVICE)(pixels.to(DEVICE))
    torch.testing.assert_close(found.embedding.cpu(), expected.embedding, rtol=1e-3, atol=1e-5)
