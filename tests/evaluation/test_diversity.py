import math
import time

import pytest
import torch
from torch import nn

from lakonlab.evaluation.diversity import vendi_score
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.results import run_evaluations
from lakonlab.evaluation.samples import SampleBatch, extract
from lakonlab.phases import PhaseClock, phase
from lakonlab.registry import FEATURE_EXTRACTORS, METRICS
from tests.evaluation.test_evaluate import config
from tests.evaluation.test_inception_metrics import FourPixels

LPIPS_MISSING = "pip install 'lakonlab[lpips]'"


@pytest.fixture(autouse=True)
def _extractor(monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS._module_dict, 'FourPixels', FourPixels)


def built(kind, **arguments):
    metric = METRICS.build(dict(type=kind, **arguments))
    metric.bind(ExtractorPool())
    return metric


def one_hot(*places):
    return nn.functional.one_hot(torch.tensor(places), 12).float().reshape(-1, 3, 2, 2)


def test_vendi_score():
    assert vendi_score(torch.ones(5, 3)) == pytest.approx(1)
    assert vendi_score(torch.eye(7)) == pytest.approx(7)
    assert vendi_score(torch.eye(3).repeat(20, 1)) == pytest.approx(3)
    # two members at an angle: eigenvalues (1 +- cos) / 2
    cosine = 0.6
    pair = torch.tensor([[1.0, 0.0], [cosine, 0.8]])
    entropy = -sum(p * math.log(p) for p in ((1 + cosine) / 2, (1 - cosine) / 2))
    assert vendi_score(3 * pair) == pytest.approx(math.exp(entropy))


def test_vendi_score_of_prompts():
    metric = built('VendiScore', extractor=dict(type='FourPixels'))
    metric.feed(SampleBatch(one_hot(0, 1, 2), [0, 1, 2], prompts=['a', 'a', 'b']))
    metric.feed(SampleBatch(one_hot(2, 2), [3, 4], prompts=['a', 'b']))
    assert metric.compute() == pytest.approx(dict(vendi=2, vendi_std=1))
    assert metric.protocol()['num_groups'] == 2
    assert metric.protocol()['images_per_group'] == [2, 3]
    together = built('VendiScore', extractor=dict(type='FourPixels'), per_group=False, prefix='all')
    together.feed(SampleBatch(one_hot(0, 1, 2, 3), [0, 1, 2, 3], prompts=['a', 'a', 'b', 'b']))
    assert together.compute() == pytest.approx(dict(all_vendi=4, all_vendi_std=0))


def test_cosine_diversity():
    metric = built('CosineDiversity', extractor=dict(type='FourPixels'), max_per_group=3)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    metric.feed(SampleBatch(one_hot(0, 0, 1, 5, 2, 3, 4), list(range(7)), labels))
    # class 0, of which three count: 0, 1, 1; class 1: 1; class 2 has no pair
    assert metric.compute()['cosine_diversity'] == pytest.approx((2 / 3 + 1) / 2)
    assert metric.protocol()['num_images'] == 6
    metric.reset()
    metric.feed(SampleBatch(one_hot(0, 1), [0, 1], torch.tensor([0, 1])))
    with pytest.raises(ValueError, match='at least two samples'):
        metric.compute()


@pytest.fixture(scope='module')
def alexnet(tmp_path_factory):
    pytest.importorskip('lpips', reason=LPIPS_MISSING)
    from torchvision.models import alexnet as build

    torch.manual_seed(0)
    net = build()
    path = tmp_path_factory.mktemp('lpips') / 'alexnet.pth'
    torch.save(net.state_dict(), path)
    return path, net.eval()


def lpips_by_hand(net, left, right):
    """The formula, of torchvision's network and the linear weights of the package."""
    from pathlib import Path

    import lpips

    linear = torch.load(Path(lpips.__file__).parent / 'weights/v0.1/alex.pth', map_location='cpu', weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1)
    states = [(2 * images - 1 - shift) / scale for images in (left, right)]
    total, number = 0, 0
    with torch.no_grad():
        for layer in net.features:
            states = [layer(state) if not isinstance(layer, nn.ReLU) else layer(state.clone()) for state in states]
            if isinstance(layer, nn.ReLU):
                unit = [state / (state.norm(dim=1, keepdim=True) + 1e-10) for state in states]
                weighted = (unit[0] - unit[1]).square() * linear[f'lin{number}.model.1.weight']
                total = total + weighted.sum(dim=1).mean(dim=(1, 2))
                number += 1
    assert number == 5
    return total


def test_lpips_to_a_reference_and_among_samples(alexnet):
    path, net = alexnet
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reference = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    metric = built('ReferenceLPIPS', network=dict(backbone=str(path)))
    for part in (slice(0, 3), slice(3, 4)):
        metric.feed(SampleBatch(images[part], [0] * len(images[part]), reference=reference[part], feed_batch_size=2))
    expected = lpips_by_hand(net, images, reference)
    assert metric.compute()['reference_lpips'] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert metric.better == dict(reference_lpips='lower')
    assert len(metric.protocol()['network']['weights_sha256']) == 64
    metric = built('LPIPSDiversity', network=dict(backbone=str(path)))
    metric.feed(SampleBatch(images, list(range(4)), torch.tensor([0, 1, 0, 0])))
    pairs = [lpips_by_hand(net, images[i : i + 1], images[j : j + 1]).item() for i, j in ((0, 2), (0, 3), (2, 3))]
    assert metric.compute()['lpips_diversity'] == pytest.approx(sum(pairs) / 3, rel=1e-5)
    torch.save({'weight': torch.zeros(2)}, path.with_name('other.pth'))
    with pytest.raises(ValueError, match='does not hold alex'):
        built('LPIPSDiversity', network=dict(backbone=str(path.with_name('other.pth'))))


def test_images_of_a_full_group_are_not_kept(alexnet):
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rounded = (images * 255).round() / 255
    numbers = []
    for samples, most in ((rounded, 3), (rounded, 16), (images, 3)):
        metric = built('LPIPSDiversity', network=dict(backbone=str(alexnet[0])), max_per_group=most)
        for start in range(0, 6, 2):
            metric.feed(SampleBatch(samples[start : start + 2], [start, start + 1], prompts=['a', 'b']))
        kept = [member for members in metric._groups.values() for member in members]
        assert len(kept) == (0 if most == 3 else 6)
        assert all(member.dtype == torch.uint8 for member in kept)
        assert metric.protocol()['num_groups'] == 2
        numbers.append(metric.compute()['lpips_diversity'])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
    assert numbers[0] != numbers[2]


def test_dinov2(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    net = Dinov2Model(Dinov2Config(**shape)).eval()
    net.save_pretrained(tmp_path / 'net')
    extractor = ExtractorPool().build(dict(type='DINOv2', weights=str(tmp_path / 'net'), input_size=28))
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    found = extract(extractor, images, 1).embedding
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = net((images - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(extractor.protocol()['weights_sha256']) == 64
    Dinov2Model(Dinov2Config(**{**shape, 'num_hidden_layers': 1})).save_pretrained(tmp_path / 'part')
    (tmp_path / 'part' / 'config.json').write_text((tmp_path / 'net' / 'config.json').read_text())
    with pytest.raises(ValueError, match=r'DINOv2\.weights=.* it lacks \d+ tensors'):
        ExtractorPool().build(dict(type='DINOv2', weights=str(tmp_path / 'part')))


class Multiplier(nn.Module):
    """Makes images by two products of 8 x 8 matrices for each sample."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8, 8), 0.1))

    def val_step(self, data, source=None, **arguments):
        noise = data['noise'].reshape(-1, 8, 8)
        images = (noise @ self.weight @ self.weight).reshape(-1, 1, 8, 8)
        return dict(num_samples=len(images), pred_imgs=images, nfe=2)


class Attention(nn.Module):
    """Makes images by attention of 8 positions with 8 numbers among each other."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def val_step(self, data, source=None, **arguments):
        noise = data['noise'].reshape(-1, 1, 8, 8) + self.weight
        images = nn.functional.scaled_dot_product_attention(noise, noise, noise)
        return dict(num_samples=len(images), pred_imgs=images, nfe=1)


class Sleeper(Multiplier):
    """Takes its time, and says what for."""

    def val_step(self, data, source=None, **arguments):
        for _ in range(2):
            with phase('policy'):
                time.sleep(0.02)
                with phase('network'):
                    time.sleep(0.05)
        time.sleep(0.03)  # decoding
        return super().val_step(data, source, **arguments)


def test_time_of_the_network_and_of_policies():
    with PhaseClock(torch.device('cpu')).active() as training:
        (results,) = run_evaluations(Sleeper(), config(metrics=[dict(type='SamplingSpeed')]))
        assert set(training.seconds()) == {'other'}  # what a run logs is not divided further
    numbers = results['metrics']
    assert 0.1 <= numbers['network_time'] < 0.2
    assert 0.04 <= numbers['policy_time'] < 0.1
    assert numbers['network_time'] + numbers['policy_time'] + 0.03 <= numbers['total_time'] < 0.3
    assert results['protocol']['SamplingSpeed']['batch_size'] == 10
    (results,) = run_evaluations(Multiplier(), config(metrics=[dict(type='SamplingSpeed')]))
    assert set(results['metrics']) == {'samples_per_second', 'total_time'}  # it does not say


def test_operations_of_attention():
    (results,) = run_evaluations(Attention(), config(metrics=[dict(type='SamplingCost')]))
    assert results['metrics']['gflops_per_sample'] == pytest.approx(2 * 2 * 8**3 / 1e9)


def test_cost_of_samples():
    (results,) = run_evaluations(Multiplier(), config(metrics=[dict(type='SamplingCost')]))
    assert results['metrics']['gflops_per_sample'] == pytest.approx(2 * 2 * 8**3 / 1e9)
    assert results['metrics']['latency_seconds'] > 0
    assert results['protocol']['SamplingCost']['batch_size'] == 10
    assert results['protocol']['SamplingCost']['num_batches'] == 1  # the first warms up, the last is of 5
    metric = built('SamplingCost')
    for seconds, warm_up in ((50.0, True), (1.0, False), (2.0, False)):
        metric.feed(SampleBatch(torch.zeros(1, 1, 2, 2), [0], seconds=seconds, warm_up=warm_up))
    assert metric.compute() == dict(latency_seconds=1.5)
    metric = built('SamplingCost')
    for count, seconds, warm_up in ((8, 50.0, True), (8, 4.0, False), (8, 6.0, False), (2, 1.0, False)):
        ids = list(range(count))
        metric.feed(SampleBatch(torch.zeros(count, 1, 2, 2), ids, seconds=seconds, warm_up=warm_up))
    assert metric.compute() == dict(latency_seconds=5.0)
    assert (metric.protocol()['batch_size'], metric.protocol()['num_batches']) == (8, 2)
    assert not metric.protocol()['includes_warm_up']
    with pytest.raises(ValueError, match='generated now'):
        metric.feed(SampleBatch(torch.zeros(1, 1, 2, 2), [0]))
