"""The page of samples in a real browser: a script drives it and writes down what it sees."""

import html
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from lakonlab.evaluation.viewer import Column, Gallery, Item
from tests.debian_packages import INSTALLED_AS, needs
from tests.evaluation.test_viewer import NASTY, RIGHT_TO_LEFT

pytestmark = needs('chromium')
COUNT = 500
DRIVER = """
<script>
(async () => {
  const report = {};
  const $ = (id) => document.getElementById(id);
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const press = async (key, target = document.activeElement || document.body) => {
    target.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true }));
    await wait(50);
  };
  const cards = () => [...$('grid').children];
  const isLoaded = (image) => image.complete && image.naturalWidth > 0;
  const loaded = (root) => [...root.querySelectorAll('img')].filter(isLoaded).length;
  const id = (node) => node?.querySelector('b').textContent.trim();
  const shown = () => ({
    cards: cards().length, page: $('page').value, first: id(cards()[0]), hash: location.hash });
  const box = () => ({
    open: $('box').open, where: $('where').textContent, figures: $('stage').querySelectorAll('figure').length,
    transform: $('stage').querySelector('img')?.style.transform, hash: location.hash,
    noise: $('noise').textContent });
  try {
    await wait(1500);
    report.start = {
      ...shown(), pages: $('pages').textContent, loaded: loaded($('grid')), count: $('count').textContent,
      title: document.title };
    const text = (position) => cards()[position].querySelector('.text');
    report.nasty = text(1).lastChild.textContent;
    report.direction = [0, 2].map((position) => getComputedStyle(text(position)).direction);
    report.widths = [...cards()[0].querySelectorAll('img')].map((image) => Math.round(image.clientWidth));
    report.overflow = document.documentElement.scrollWidth - innerWidth;
    report.noise = [0, 3, 4, 5].map((position) => text(position).querySelector('.noise')?.textContent ?? null);
    report.noiseTitle = text(4).querySelector('.noise').title;
    report.noiseCounts = $('tables').querySelector('p').textContent;
    report.missing = cards()[3].querySelectorAll('.missing').length;
    report.pixelated = cards()[0].querySelector('img').classList.contains('small');
    await press('ArrowRight'); report.second = shown();
    await press('End'); report.last = shown();
    await press('ArrowRight'); report.beyond = shown();
    await press('Home'); report.home = shown();
    await press('j'); await press('j'); await press('k'); report.current = id($('grid').querySelector('.current'));
    await press('Enter'); await wait(300); report.enlarged = box(); report.enlargedLoaded = loaded($('stage'));
    const area = [$('box'), $('close')].map((node) => node.getBoundingClientRect());
    report.area = [area[0].top, area[0].bottom - innerHeight, area[0].right - innerWidth, area[1].bottom < innerHeight];
    report.caption = $('caption').textContent;
    await press('+'); report.zoomed = box();
    await press('0'); report.fitted = box();
    await press('ArrowRight'); report.following = box();
    await press(' '); report.alone = [box().figures, box().noise, $('stage').querySelector('figcaption').textContent];
    await press(' '); await press(' '); report.together = box().figures;
    await press('Escape'); report.closed = box().open;
    cards()[5].querySelector('.picture').click(); await wait(50); report.clicked = box();
    await press('Escape');
    $('search').value = '12 prompt'; $('search').dispatchEvent(new Event('input', { bubbles: true })); await wait(50);
    report.found = { ...shown(), count: $('count').textContent };
    $('search').value = ''; $('search').dispatchEvent(new Event('input', { bubbles: true }));
    $('size').value = '240'; $('size').dispatchEvent(new Event('change')); await wait(50);
    report.larger = { ...shown(), pages: $('pages').textContent };
    location.hash = '#page=3'; await wait(100); report.byHash = shown();
    location.hash = '#item=321'; await wait(100); report.byItem = box();
    await press('Escape');
    await press('?', document.body); report.keys = $('keys').open; $('keys').close();
    report.numbers = [...$('tables').querySelectorAll('td, th')].map((cell) => cell.textContent);
    report.harmed = typeof window.harmed;
  } catch (error) { report.error = `${error} ${error.stack}`; }
  const node = document.createElement('pre');
  node.id = 'report';
  node.textContent = JSON.stringify(report);
  document.body.append(node);
})();
</script>
"""


def chromium(page, *options):
    command = [
        INSTALLED_AS['chromium'], '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars',
        f'--user-data-dir={page.parent / "profile"}', *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def large_gallery(folder):
    for run in ('ä #1', 'b'):
        (folder / run).mkdir()
        for number in range(10):
            pixels = np.random.RandomState(number).randint(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / run / f'{number}.png')
    captions = {1: NASTY, 2: RIGHT_TO_LEFT}
    items = []
    for number in range(COUNT):
        sources = [f'%C3%A4%20%231/{number % 10}.png', f'b/{number % 10}.png']
        if number == 3:
            sources = [None, 'b/not_there.png']
        noise = {4: ['aa', 'bb'], 5: ['aa', None]}.get(number, ['aa', 'aa'])
        items.append(Item(number, captions.get(number, f'prompt {number}'), sources, noise))
    columns = [
        Column('four steps', dict(fid=2.5, recall=0.5, kid=float('nan'))),
        Column(NASTY, dict(fid=3.25), dict(note=NASTY)),
    ]
    return Gallery('a & b <i>', columns, items)


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp('viewer')
    text = large_gallery(folder).page()
    (folder / 'page.html').write_text(text.replace('</body>', DRIVER + '</body>'), encoding='utf-8')
    done = chromium(folder / 'page.html', '--virtual-time-budget=20000', '--dump-dom')
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-3000:]
    return json.loads(html.unescape(found[1]))


def test_it_opens_and_shows_the_first_page(report):
    assert 'error' not in report, report['error']
    start = report['start']
    assert (start['cards'], start['page'], start['pages'], start['first']) == (60, '1', '9', '0')
    assert start['loaded'] >= 8  # those in view
    assert start['count'] == '1–60 of 500'
    assert start['title'] == 'a & b <i>'
    assert report['missing'] == 2
    assert len(set(report['widths'])) == 1  # whatever the runs are called
    assert report['overflow'] <= 0
    assert report['pixelated']
    assert report['noise'] == ['same noise', None, 'different noise', 'noise not known']
    assert report['noiseTitle'] == f'four steps: aa\n{NASTY}: bb'
    counts = '497 same noise, 1 different noise, 1 noise not known'
    assert report['noiseCounts'] == f'samples in several runs: {counts}'
    assert report['numbers'] == ['', 'four steps', NASTY, 'fid', '2.5', '3.25', 'recall', '0.5', '–', 'kid', 'nan', '–']


def test_no_prompt_does_harm(report):
    assert report['nasty'] == NASTY
    assert report['direction'] == ['ltr', 'rtl']
    assert report['harmed'] == 'undefined'


def test_pages(report):
    assert (report['second']['page'], report['second']['first'], report['second']['hash']) == ('2', '60', '#page=2')
    assert (report['last']['page'], report['last']['cards'], report['last']['first']) == ('9', 20, '480')
    assert report['beyond'] == report['last']
    assert report['home']['page'] == '1'
    assert report['byHash']['page'] == '3'
    assert report['larger'] == dict(cards=240, page='1', first='0', hash='#page=1', pages='3')


def test_search(report):
    assert report['found']['count'] == '1–15 of 15'  # 12, 112, 120 to 129, 212, 312, 412
    assert report['found']['first'] == '12'


def test_the_enlarged_view(report):
    assert report['current'] == '1'
    assert report['enlarged']['open']
    assert report['enlarged']['where'] == '1  (2 of 500)'
    assert report['area'] == [0, 0, 0, True]
    assert report['enlarged']['hash'] == '#item=1'
    assert report['caption'] == NASTY
    assert (report['enlarged']['figures'], report['enlargedLoaded']) == (2, 2)
    assert 'scale(1.5)' in report['zoomed']['transform']
    assert report['fitted']['transform'] == 'translate(0px, 0px) scale(1)'
    assert report['following']['where'] == '2  (3 of 500)'
    assert report['alone'] == [1, 'noise aa', 'four steps']
    assert report['following']['noise'] == 'same noise'
    assert report['together'] == 2
    assert report['closed'] is False
    assert report['clicked']['where'] == '5  (6 of 500)'
    assert report['byItem']['where'] == '321  (322 of 500)'
    assert report['keys'] is True
