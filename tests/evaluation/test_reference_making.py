from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from lakonlab.config.errors import ConfigError
from lakonlab.datasets.digits import load_split
from lakonlab.evaluation.digit_classifier import DigitClassifier
from lakonlab.evaluation.statistics import read_reference
from lakonlab.runner.make_reference import make

DIGIT_CONFIG = 'configs/digits/dit_digits_teacher.py'


def run(source, out, **changes):
    """What the command does with its defaults and some changes."""
    defaults = dict(
        data=None, extractor='DigitClassifier', no_resize=False, center_crop=False, resize_mode=None,
        num_images=None, batch_size=64, no_features=False, device='cpu',
    )  # fmt: skip
    return make(Namespace(source=str(source), out=str(out), **{**defaults, **changes}))


def made(tmp_path, source, **changes):
    assert run(source, tmp_path / 'out.safetensors', **changes) == 0
    return read_reference(tmp_path / 'out.safetensors')


def expected_of(pixels):
    with torch.no_grad():
        values = DigitClassifier()(pixels).embedding
    return values, torch.cov(values.double().T)


def quantised_digits():
    return ((load_split('val')[0] / 2 + 0.5) * 255).round().byte()


def check(found, pixels):
    values, covariance = expected_of(pixels)
    torch.testing.assert_close(found.features, values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.covariance, covariance, atol=1e-6, rtol=1e-5)
    assert found.num_images == len(pixels)
    assert found.provenance['extractor'] == DigitClassifier().protocol()
    assert found.provenance['preparation'] == dict(size=8, center_crop=False, mode='bicubic')


def test_of_a_config(tmp_path):
    found = made(tmp_path, DIGIT_CONFIG, data='train')
    check(found, load_split('train')[0] / 2 + 0.5)
    assert found.provenance['source']['config']['type'] == 'Digits'


def test_of_an_npz(tmp_path):
    digits = quantised_digits()
    np.savez(tmp_path / 'a.npz', arr_0=digits.permute(0, 2, 3, 1).numpy())
    found = made(tmp_path, tmp_path / 'a.npz', num_images=100, batch_size=32)
    check(found, digits[:100] / 255)
    assert len(found.provenance['source']['sha256']) == 64


class GreyDigits(DigitClassifier):
    """A digit classifier of colour images."""

    def forward(self, images):
        return super().forward(images.mean(dim=1, keepdim=True))


def test_of_a_folder(tmp_path):
    from lakonlab.evaluation.preparation import Preparation
    from lakonlab.evaluation.reference_making import images_of_folder, make_reference

    digits = quantised_digits()[:20]
    for number, image in enumerate(digits):
        folder = tmp_path / 'images' / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        scale = 1 + number % 3  # of several sizes
        Image.fromarray(image[0].numpy()).resize((8 * scale, 8 * scale), Image.Resampling.BOX).save(
            folder / f'{number:02}.png'
        )
    (tmp_path / 'images' / 'notes.txt').touch()
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    batches, source = images_of_folder(tmp_path / 'images', 4)
    found = make_reference(batches, GreyDigits().eval(), Preparation(8, mode='bilinear'), source)
    values, _ = expected_of(digits[order] / 255)
    torch.testing.assert_close(found.features, values, atol=1e-4, rtol=1e-4)
    assert found.provenance['source']['num_files'] == 20
    with pytest.raises(FileNotFoundError, match='has no images'):
        images_of_folder(tmp_path / 'nothing')
    batches, source = images_of_folder(tmp_path / 'images', 4)
    with pytest.raises(ValueError, match='only 20 images, expected at least 21'):
        make_reference(batches, GreyDigits().eval(), Preparation(8), source, num_images=21)


@pytest.mark.parametrize('origin', [None, dict(seed=0)])
def test_of_samples_that_an_evaluation_wrote(tmp_path, origin):
    """The grid, which shows all of them once more, is no sample; nor is a stranger where it is known what is one."""
    from lakonlab.evaluation.images import ImageFolder
    from lakonlab.evaluation.reference_making import images_of_folder

    samples = ImageFolder(tmp_path / 'iter_4', origin=origin)
    samples.add(quantised_digits()[:20] / 255, range(20))
    samples.finish()
    Image.new('L', (8, 8)).save(tmp_path / 'iter_4' / 'mine.png')
    (tmp_path / 'others').mkdir()
    Image.new('L', (8, 8)).save(tmp_path / 'others' / 'grid.png')  # beside no samples, an image like any other
    batches, source = images_of_folder(tmp_path)
    assert sum(len(batch) for batch in batches) == source['num_files'] == (22 if origin is None else 21)


def test_of_statistics(tmp_path):
    values, covariance = expected_of(quantised_digits() / 255)
    np.savez(tmp_path / 'a.npz', mu=values.mean(0), sigma=covariance, pool_3=values)
    found = made(tmp_path, tmp_path / 'a.npz', no_features=True, extractor=None)
    assert found.features is None
    np.testing.assert_array_equal(found.covariance, covariance)
    assert found.provenance['source']['kind'] == 'statistics'
    with pytest.raises(
        ConfigError, match=r'^--extractor, --center-crop, --num-images: SOURCE=.* holds statistics already'
    ):
        run(tmp_path / 'a.npz', tmp_path / 'b.safetensors', center_crop=True, num_images=5)
    assert not (tmp_path / 'b.safetensors').exists()


@pytest.mark.parametrize(
    ('source', 'out', 'changes', 'message'),
    [
        ('folder', 'out.pkl', {}, r'ends in \.safetensors'),
        ('folder', 'out.safetensors', {}, 'has no images'),
        (DIGIT_CONFIG, 'out.safetensors', dict(data='vall'), "data='vall'"),
        ('folder', 'out.safetensors', dict(data='train'), "--data train: only a config has .*SOURCE='folder'"),
        ('a.npz', 'out.safetensors', dict(data='train'), "--data train: only a config has .*SOURCE='a.npz'"),
        ('a.npz', 'out.safetensors', dict(extractor=None), "SOURCE: there is no file of reference statistics 'a.npz'"),
        (
            DIGIT_CONFIG,
            'out.safetensors',
            dict(extractor='DigitsClassifier'),
            "--extractor: 'DigitsClassifier' is no feature extractor; did you mean 'DigitClassifier'",
        ),
        (DIGIT_CONFIG, 'out.safetensors', dict(extractor='{"type": 5}'), '--extractor: 5 is no feature extractor'),
        (
            DIGIT_CONFIG,
            'out.safetensors',
            dict(extractor='{"type": "DINOv2", "size": 8}'),
            "--extractor: 'size' is no argument of DINOv2",
        ),
        (DIGIT_CONFIG, 'out.safetensors', dict(extractor='{"typ": 1}'), "'type' is missing"),
        (DIGIT_CONFIG, 'out.safetensors', dict(extractor='{"type": '), 'a dict in JSON'),
        (DIGIT_CONFIG, 'out.safetensors', dict(extractor='{"type": "DigitClassifier", "weights": "no"}'), 'no file'),
    ],
)
def test_what_is_refused(tmp_path, source, out, changes, message):
    with pytest.raises((ConfigError, OSError), match=message):
        run(source, tmp_path / out, **changes)
    assert not list(tmp_path.iterdir())
