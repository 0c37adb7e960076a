"""The page on which teacher and students draw digits."""

import signal

import pytest
import torch
from PIL import Image

from lakonlab.config.load import load_config
from lakonlab.runner.runner import Runner
from lakonlab.ui.digits_app import CONFIGS, SCALE, DigitModels
from tests.ui import browser

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
    train('dit_digits_teacher', folder, 60)  # enough for classes to make a difference that is seen
    for name in (STUDENT, TWO_STEPS):
        train(name, folder, 10)
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


@pytest.fixture(scope='module')
def address(checkpoints):
    """Of the page."""
    browser.require()
    from lakonlab.ui.digits_app import digits_app

    with browser.served(lambda: digits_app(DigitModels(checkpoints))) as address:
        yield address


@pytest.fixture(scope='module')
def tab(address):
    with browser.started() as tab:
        yield tab


class Page:
    """The page, and what it shows of teacher and student."""

    def __init__(self, tab, address, width='laptop'):
        self.tab = browser.visit(tab, address, width)
        self.images = {who: tab.locator(f'#{who}-image img') for who in ('teacher', 'student')}
        self.settle(32, 1)

    def settle(self, *nfe):
        """Wait for captions with these numbers of evaluations, and a latency."""
        for who, count in zip(self.images, nfe):
            browser.shown(self.tab, f'{who}-caption', rf'^NFE {count}, [\d.]+ ms$')

    @property
    def sources(self):
        from playwright.sync_api import expect

        for image in self.images.values():
            expect(image).to_be_visible()
        return {who: image.get_attribute('src') for who, image in self.images.items()}

    def changes(self, before, *whose):
        """Wait until those have drawn something else; the other is the same."""
        from playwright.sync_api import expect

        for who in whose:
            expect(self.images[who]).not_to_have_attribute('src', before[who])
        now = self.sources
        assert {who for who in now if now[who] != before[who]} == set(whose)
        return now


def test_digits_and_seeds(tab, address):
    """Teacher and student side by side; another digit or seed is another drawing of both."""
    page = Page(tab, address)
    before = page.sources
    assert {browser.size(image) for image in page.images.values()} == {(8 * SCALE, 8 * SCALE)}
    tab.locator('#digit').get_by_text('7', exact=True).click()
    now = page.changes(before, 'teacher', 'student')
    browser.enter(tab, 'seed', 12)
    page.changes(now, 'teacher', 'student')
    browser.look(tab, 'digits_changed')
    browser.enter(tab, 'seed', 0)
    tab.locator('#digit').get_by_text('3', exact=True).click()
    for who, image in page.images.items():
        expect_source(image, before[who])


def expect_source(image, source):
    from playwright.sync_api import expect

    expect(image).to_have_attribute('src', source)


def test_steps(tab, address):
    """Dragging the steps of one changes its drawing and its number of evaluations only."""
    page = Page(tab, address)
    before = page.sources
    browser.drag(tab, 'student-steps', 3 / 7)
    page.settle(32, 4)
    now = page.changes(before, 'student')
    browser.drag(tab, 'teacher-steps', 0.0)
    page.settle(1, 4)
    page.changes(now, 'teacher')
    tab.locator('#student input').click()
    tab.get_by_role('option', name='two steps, GMFlow policy').click()
    page.settle(1, 2)


def test_an_empty_seed(tab, address):
    from playwright.sync_api import expect

    Page(tab, address)
    browser.enter(tab, 'seed', '')
    expect(tab.get_by_text('The seed is empty')).to_be_visible()


@pytest.mark.parametrize('width', browser.WIDTHS)
def test_layout(tab, address, width):
    """Teacher and student are side by side, also on a phone."""
    page = Page(tab, address, width)
    assert len(set(page.sources.values())) == 2
    teacher, student = (image.bounding_box() for image in page.images.values())
    assert teacher['x'] + teacher['width'] <= student['x']
    assert teacher['y'] == student['y']
    browser.check_layout(tab)
    browser.look(tab, f'digits_{width}')


@pytest.mark.slow
def test_script(checkpoints, tmp_path):
    browser.require()
    from tests.ui.page_scripts import served

    with served('gradio_digits.py', tmp_path, '--checkpoints', checkpoints, ended_by=signal.SIGTERM) as client:
        teacher, work, student, own = client.predict('two steps, GMFlow policy', '5', 1, 8, 2, api_name='/draw')
    assert Image.open(teacher).size == Image.open(student).size == (8 * SCALE, 8 * SCALE)
    assert work.startswith('NFE 8, ')
    assert own.startswith('NFE 2, ')
