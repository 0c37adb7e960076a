"""The page on which teacher and students draw digits."""

from pathlib import Path

import pytest
import torch

from lakonlab.config.load import load_config
from lakonlab.runner.runner import Runner
from lakonlab.ui.digits_app import CONFIGS, DigitModels

STUDENT, TWO_STEPS = 'gmdit_k8_digits_piid_1step', 'gmdit_k8_digits_piid_2step'


def train(name, folder, iterations):
    """Train a config of the demo for a while."""
    options = {'total_iters': iterations, 'checkpoint_config.interval': iterations, 'evaluation': [], 'name': name}
    options['custom_hooks.0.start_iter'] = 1
    options['checkpoint_config.out_dir'] = str(folder / 'checkpoints')
    if name != 'dit_digits_teacher':
        weights = str(folder / 'checkpoints' / 'dit_digits_teacher' / 'latest')
        options.update({f'model.{role}.denoising.pretrained': weights for role in ('teacher', 'diffusion')})
    cfg = load_config(CONFIGS / f'{name}.py', options)
    Runner.from_cfg(cfg, work_dir=str(folder / 'work_dirs' / name)).train()


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    train('dit_digits_teacher', folder, 200)  # enough for classes to make a difference that is seen
    for name in (STUDENT, TWO_STEPS):
        train(name, folder, 20)
    return folder / 'checkpoints'


def test_drawings(checkpoints):
    models = DigitModels(checkpoints)
    assert models.names == ['one step, GMFlow policy', 'two steps, GMFlow policy']
    assert [models.own_steps(name) for name in models.names] == [1, 2]
    name = models.names[0]
    first = models.draw(name, 3, 5, 1, teacher=False)
    assert (first.nfe, first.pixels.shape, first.picture.size) == (1, (8, 8), (256, 256))
    assert first.caption.startswith('NFE 1, ')
    assert torch.equal(first.pixels, models.draw(name, 3, 5, 1, teacher=False).pixels)
    for other in (dict(digit=4, seed=5, steps=1), dict(digit=3, seed=6, steps=1), dict(digit=3, seed=5, steps=4)):
        assert not torch.equal(first.pixels, models.draw(name, teacher=False, **other).pixels)
    teacher = models.draw(name, 3, 5, 8, teacher=True)
    assert teacher.nfe == 8
    assert not torch.equal(teacher.pixels, models.draw(name, 3, 5, 4, teacher=True).pixels)


def test_nothing_trained(tmp_path):
    with pytest.raises(FileNotFoundError, match='make demo'):
        DigitModels(tmp_path)


@pytest.mark.slow
def test_in_a_browser(checkpoints):
    """Another digit, seed or number of steps changes what is drawn and what it took."""
    from tests.ui import browser

    browser.require()
    from playwright.sync_api import expect

    from lakonlab.ui.digits_app import digits_app

    with browser.opened(digits_app(DigitModels(Path(checkpoints)))) as page:
        images = [page.locator(f'#{who}-image img') for who in ('teacher', 'student')]
        captions = [page.locator(f'#{who}-caption textarea, #{who}-caption input') for who in ('teacher', 'student')]
        for image in images:
            expect(image).to_be_visible()
        assert captions[0].input_value().startswith('NFE 32, ')
        assert captions[1].input_value().startswith('NFE 1, ')
        browser.look(page, 'digits')
        for change in (
            lambda: page.locator('#digit').get_by_text('7', exact=True).click(),
            lambda: page.locator('#seed input').fill('12'),
            lambda: page.locator('#student-steps input[type=number]').fill('4'),
        ):
            before = images[1].get_attribute('src')
            change()
            page.locator('#seed input').blur()
            expect(images[1]).not_to_have_attribute('src', before)
        assert captions[1].input_value().startswith('NFE 4, ')
        browser.look(page, 'digits_changed')
