import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from lakonlab.evaluation.clip_scores import crop_to, pad_to
from lakonlab.evaluation.color_stats import color_stats
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.registry import METRICS

PROMPTS = ['a red fox', 'the night sky over a city', 'a red fox']
TINY = dict(
    embed_dim=16,
    quick_gelu=True,
    vision_cfg=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8),
    text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=2),
)


@pytest.fixture(scope='module')
def tiny_weights(tmp_path_factory):
    """A model of open_clip that is small, with weights in the layout of published files."""
    open_clip = pytest.importorskip('open_clip', reason="pip install 'lakonlab[clip]'")
    folder = tmp_path_factory.mktemp('clip')
    (folder / 'tiny-lakonlab.json').write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / 'tiny-lakonlab.json')
    torch.manual_seed(0)
    model = open_clip.create_model('tiny-lakonlab')
    state = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    torch.save(
        {'epoch': 1, 'state_dict': {f'module.{name}': tensor for name, tensor in state.items()}}, folder / 'a.pt'
    )
    return folder / 'a.pt', state


def images(height=40, width=56):
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))


def scored(kind, path, samples, sizes=(2, 1), **arguments):
    metric = METRICS.build(dict(type=kind, model='tiny-lakonlab', pretrained=str(path), precision='fp32', **arguments))
    metric.bind(ExtractorPool())
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        metric.feed(SampleBatch(samples[part], list(range(3))[part], prompts=PROMPTS[part], feed_batch_size=1))
        start += size
    return metric.compute(), metric


def expected_scores(state, prepared):
    """By the library alone, with the preprocessing given."""
    import open_clip

    model = open_clip.create_model('tiny-lakonlab').eval()
    model.load_state_dict(state)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    with torch.no_grad():
        image = model.encode_image(functional.normalize(prepared, list(mean), list(std)))
        text = model.encode_text(open_clip.get_tokenizer('tiny-lakonlab')(PROMPTS))
    return torch.cosine_similarity(image, text).double()


@pytest.mark.parametrize('shape', [(40, 56), (56, 40), (32, 32), (20, 30)])
def test_clip_similarity(tiny_weights, shape):
    path, state = tiny_weights
    samples = images(*shape)
    numbers, metric = scored('CLIPSimilarity', path, samples, prefix='p')
    interpolation = functional.InterpolationMode.BICUBIC
    resized = functional.resize(samples, [32], interpolation, antialias=True)
    expected = expected_scores(state, functional.center_crop(resized, [32, 32]))
    assert expected.std() > 1e-3
    assert numbers['p_clipsim'] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert numbers['p_clipsim_std'] == pytest.approx(expected.std(correction=0).item(), abs=1e-5)
    assert metric.better == dict(p_clipsim='higher')
    protocol = metric.protocol()
    assert protocol['num_images'] == 3
    assert len(protocol['scorer']['weights_sha256']) == 64


@pytest.mark.parametrize('shape', [(40, 56), (57, 40), (32, 32), (9, 30)])
def test_hpsv2(tiny_weights, shape):
    path, state = tiny_weights
    samples = images(*shape)
    numbers, _ = scored('HPSv2', path, samples, sizes=(3,))
    scale = 32 / max(shape)
    height, width = (round(side * scale) for side in shape)
    resized = functional.resize(samples, [height, width], functional.InterpolationMode.BICUBIC, antialias=True)
    below, right = 32 - height, 32 - width
    padded = functional.pad(resized, [right // 2, below // 2, right - right // 2, below - below // 2], fill=0)
    assert numbers['hpsv2'] == pytest.approx(expected_scores(state, padded).mean().item(), abs=1e-5)


def test_half_precision_on_a_cpu(tiny_weights):
    path, _ = tiny_weights
    exact, _ = scored('CLIPSimilarity', path, images())
    metric = METRICS.build(dict(type='CLIPSimilarity', model='tiny-lakonlab', pretrained=str(path)))
    metric.bind(ExtractorPool())
    metric.feed(SampleBatch(images(), [0, 1, 2], prompts=PROMPTS))
    assert metric.compute()['clipsim'] == pytest.approx(exact['clipsim'], abs=5e-3)
    assert metric.protocol()['scorer']['precision'] == 'fp16'


def test_images_are_prepared_as_published():
    samples = images(400, 300)
    for size in (224, 336):
        bicubic = dict(interpolation=functional.InterpolationMode.BICUBIC, antialias=True)
        cropped = functional.center_crop(functional.resize(samples, [size], **bicubic), [size, size])
        torch.testing.assert_close(crop_to(samples, size), cropped, atol=1e-6, rtol=0)
        inner = functional.resize(samples, [size, size * 3 // 4], **bicubic)
        padded = pad_to(samples, size)
        left = (size - size * 3 // 4) // 2
        torch.testing.assert_close(padded[..., left : left + size * 3 // 4], inner, atol=1e-6, rtol=0)
        assert padded[..., :left].eq(0).all()


PIL_TOLERANCE = 2.5 / 255
"""Of pixels in [0, 1]: PIL rounds to 8 bits after each direction that it resizes in."""
SQUASHED = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize_mode='squash')


@pytest.mark.parametrize('tag', [{}, SQUASHED])
@pytest.mark.parametrize('shape', [(300, 400), (64, 64), (25, 20), (331, 97)])
def test_images_are_prepared_as_open_clip_prepares_pictures(tiny_weights, monkeypatch, tag, shape):
    """The values of its own transform of PIL pictures, of weights that a tag names."""
    import open_clip
    from open_clip import pretrained

    monkeypatch.setitem(pretrained._PRETRAINED, 'tiny-lakonlab', {'own': dict(tag, file=str(tiny_weights[0]))})
    # of a middle range, because PIL clips what exceeds 8 bits after each direction, and tensors keep it
    pictures = np.random.RandomState(0).randint(60, 196, (3, *shape, 3), np.uint8)
    _, _, transform = open_clip.create_model_and_transforms('tiny-lakonlab', pretrained='own')
    expected = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    metric = METRICS.build(dict(type='CLIPSimilarity', model='tiny-lakonlab', pretrained='own', precision='fp32'))
    metric.bind(ExtractorPool())
    found = metric.scorer.prepare(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    tolerance = PIL_TOLERANCE / metric.scorer.std
    assert ((found - expected).abs() <= tolerance).all()
    facts = metric.scorer.protocol()
    assert facts['mean'] == list(tag.get('mean', open_clip.OPENAI_DATASET_MEAN))
    assert ('squash' in facts['images']) == bool(tag)


def test_tags_that_resize_in_other_ways_are_refused(tiny_weights, monkeypatch):
    from open_clip import pretrained

    tag = dict(file=str(tiny_weights[0]), interpolation='bilinear')
    monkeypatch.setitem(pretrained._PRETRAINED, 'tiny-lakonlab', {'own': tag})
    with pytest.raises(ValueError, match='wants images resized by bilinear'):
        scored('CLIPSimilarity', 'own', images())


def test_weights_that_do_not_fit(tiny_weights, tmp_path):
    path, state = tiny_weights

    def bound(**arguments):
        arguments = dict(dict(type='CLIPSimilarity', model='tiny-lakonlab', pretrained=str(path)), **arguments)
        METRICS.build(arguments).bind(ExtractorPool())

    with pytest.raises(ValueError, match="'tiny' is no model of open_clip"):
        bound(model='tiny')
    with pytest.raises(OSError, match='no such file, and no such tag of ViT-L-14-336'):
        bound(model='ViT-L-14-336', pretrained='opnai')
    torch.save({name: tensor for name, tensor in state.items() if 'text' not in name and 'ln_final' not in name},
               tmp_path / 'part.pt')  # fmt: skip
    with pytest.raises(ValueError, match='does not hold tiny-lakonlab'):
        bound(pretrained=str(tmp_path / 'part.pt'))
    for name, content in (('text.pt', b'no weights'), ('evil.pt', pickle.dumps(print))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match='does not hold tiny-lakonlab'):
            bound(pretrained=str(tmp_path / name))
    with pytest.raises(ValueError, match="version='v3'"):
        METRICS.build(dict(type='HPSv2', version='v3'))
    metric = METRICS.build(dict(type='HPSv2', model='tiny-lakonlab', pretrained=str(path)))
    metric.bind(ExtractorPool())
    with pytest.raises(ValueError, match='needs samples with prompts'):
        metric.feed(SampleBatch(images(), [0, 1, 2]))


def test_open_clip_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'open_clip', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lakonlab\[clip\]'"):
        METRICS.build(dict(type='CLIPSimilarity')).bind(ExtractorPool())


def test_color_stats():
    grey = torch.full((1, 3, 4, 4), 0.5)
    red = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    checked = (torch.arange(16).reshape(1, 1, 4, 4) % 2).float().expand(1, 3, 4, 4)
    found = color_stats(torch.cat([grey, red, checked]))
    # linear 0.2126, encoded 1.055 * 0.2126 ** (1 / 2.4) - 0.055
    assert found['brightness'].tolist() == pytest.approx([0.5, 0.49844, 0.5], abs=1e-5)
    assert found['contrast'].tolist() == pytest.approx([0, 0, 0.5], abs=1e-9)
    assert found['saturation'].tolist() == pytest.approx([0, 1, 0])
    metric = METRICS.build(dict(type='ColorStats', prefix='p'))
    metric.feed(SampleBatch(grey, [0]))
    metric.feed(SampleBatch(red, [1]))
    numbers = metric.compute()
    assert numbers['p_saturation'] == pytest.approx(0.5)
    assert numbers['p_saturation_std'] == pytest.approx(0.5)
    assert metric.protocol() == dict(num_images=2)
