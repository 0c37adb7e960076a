import html.parser
import json
import re
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from lakonlab.config.errors import ConfigError
from lakonlab.evaluation.viewer import Column, Gallery, Item, read_page, side_by_side, url_from
from lakonlab.runner.compare_samples import compare_samples

NASTY = (
    '</script><script>window.harmed = 1</script><img src=x onerror="window.harmed = 1"> & "quotes" \u2028 $TITLE '
    '\\u003c --> {{x}}'
)
RIGHT_TO_LEFT = 'قطة حمراء على كرسي (اثنان) 42 \u202eabc'


def gallery(count=3, **changes):
    items = [Item(number, f'prompt {number}', [f'img/{number:09d}.png']) for number in range(count)]
    return Gallery(**{**dict(title='a run', columns=[Column('a run', dict(fid=1.5))], items=items), **changes})


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text of its title and scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ('script', 'title'):
            self.texts.append((self.tags[-1][0], data))


def test_no_text_becomes_markup():
    plain = Page(gallery().page())
    items = [Item(0, NASTY, [f'img/{NASTY}.png']), Item(1, RIGHT_TO_LEFT, [None]), Item(2, '\ud83d half', ['a.png'])]
    facts = {NASTY: [float('nan'), NASTY]}
    nasty = gallery(title=NASTY, columns=[Column(NASTY, {NASTY: float('inf')}, facts)], items=items)
    text = nasty.page()
    assert text.encode()
    found = Page(text)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    title = next(data for tag, data in found.texts if tag == 'title')
    assert title == NASTY
    data = json.loads(next(data for tag, data in found.texts if tag == 'script'))
    assert [item['caption'] for item in data['items']] == [NASTY, RIGHT_TO_LEFT, '\ud83d half']
    assert data['columns'][0]['facts'] == {NASTY: ['nan', NASTY]}


def test_nothing_is_loaded_from_elsewhere():
    page = gallery().page()
    found = Page(page)
    assert not [attributes for _, attributes in found.tags if {'src', 'href'} & set(attributes)]
    assert '@import' not in page
    assert 'url(' not in page
    assert len([tag for tag, _ in found.tags if tag == 'script']) == 2


def test_a_page_is_read_back(tmp_path):
    written = gallery()
    written.write(tmp_path / 'a.html')
    assert read_page(tmp_path / 'a.html') == written
    (tmp_path / 'b.html').write_text('<html></html>')
    with pytest.raises(ValueError, match='no page of samples'):
        read_page(tmp_path / 'b.html')


@pytest.mark.parametrize(
    ('page', 'target', 'expected'),
    [
        ('viz/run/a.html', 'viz/run/a/1.png', 'a/1.png'),
        ('viz/all.html', 'viz/ü #?%/1.png', '%C3%BC%20%23%3F%25/1.png'),
        ('viz/x/all.html', 'viz/y/1.png', '../y/1.png'),
        ('s3://bucket/viz/a.html', 's3://bucket/viz/a/1.png', 'a/1.png'),
        ('s3://bucket/x/a.html', 's3://bucket/viz/a/1.png', '../viz/a/1.png'),
        ('a.html', 'https://host/1.png', 'https://host/1.png'),
    ],
)
def test_urls_are_relative(page, target, expected):
    assert url_from(page, target) == expected


@pytest.mark.parametrize(
    ('page', 'target'), [('a.html', 's3://b/1.png'), ('s3://b/a.html', '1.png'), ('s3://b/a.html', 's3://c/1.png')]
)
def test_urls_that_lead_nowhere(page, target):
    with pytest.raises(ValueError, match='cannot show'):
        url_from(page, target)


def written_run(folder, name, numbers, colour):
    (folder / name).mkdir(parents=True)
    items = []
    for number in numbers:
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(folder / name / f'{number}.png')
        items.append(
            Item(number, f'prompt {number}', [url_from(folder / f'{name}.html', folder / name / f'{number}.png')])
        )
    gallery(title=name, columns=[Column(name, dict(fid=colour))], items=items).write(folder / f'{name}.html')
    return folder / f'{name}.html'


def test_side_by_side(tmp_path):
    pages = [written_run(tmp_path / 'one', 'a b', [0, 1, 2], 10), written_run(tmp_path / 'two', 'c', [1, 2, 3], 20)]
    common = side_by_side(pages, tmp_path / 'both.html', names=['first', 'second'])
    assert [column.name for column in common.columns] == ['first', 'second']
    assert [column.numbers for column in common.columns] == [dict(fid=10), dict(fid=20)]
    assert [item.sources for item in common.items] == [
        ['one/a%20b/0.png', None],
        ['one/a%20b/1.png', 'two/c/1.png'],
        ['one/a%20b/2.png', 'two/c/2.png'],
        [None, 'two/c/3.png'],
    ]
    common.write(tmp_path / 'both.html')
    again = side_by_side([tmp_path / 'both.html', pages[0]], tmp_path / 'one' / 'all.html')
    assert [column.name for column in again.columns] == ['first | second: first', 'first | second: second', 'a b']
    assert again.items[1].sources == ['a%20b/1.png', '../two/c/1.png', 'a%20b/1.png']


def test_a_page_with_its_images_in_it(tmp_path):
    pages = [written_run(tmp_path, 'a', [0], 10), written_run(tmp_path, 'b', [0], 20)]
    (tmp_path / 'b' / '0.png').unlink()
    (item,) = side_by_side(pages, tmp_path / 'elsewhere' / 'both.html', embed=True).items
    assert item.sources[0].startswith('data:image/png;base64,iVBOR')
    assert item.sources[1] is None


@pytest.mark.parametrize(
    'source', ['../secret.png', '/etc/hostname', 'a/notes.txt', 'a/link.png', 'a/%2e%2e/../secret.png']
)
def test_only_images_of_a_page_are_put_into_another_one(tmp_path, source):
    (tmp_path / 'run' / 'a').mkdir(parents=True)
    (tmp_path / 'secret.png').write_bytes(b'secret')
    (tmp_path / 'run' / 'a' / 'notes.txt').write_text('secret')
    (tmp_path / 'run' / 'a' / 'link.png').symlink_to(tmp_path / 'secret.png')
    page = tmp_path / 'run' / 'page.html'
    gallery(items=[Item(0, 'prompt', [source])]).write(page)
    with pytest.raises(ValueError, match='is not put into another page'):
        side_by_side([page], tmp_path / 'both.html', embed=True)


def page_of(path, noise, seed=0):
    """A page of samples with these hashes of noise."""
    items = [Item(number, f'prompt {number}', [f'{number}.png'], [found]) for number, found in enumerate(noise)]
    gallery(columns=[Column('a', dict(fid=1.5), dict(sampling_seed=seed))], items=items, title=path.stem).write(path)
    return path


def test_samples_of_the_same_noise(tmp_path, caplog):
    page = page_of(tmp_path / 'a.html', ['x', 'y'])
    common = side_by_side([page, page_of(tmp_path / 'b.html', ['x', 'y', 'z'])], tmp_path / 'both.html')
    assert [item.noise for item in common.items] == [['x', 'x'], ['y', 'y'], [None, 'z']]
    assert [item.shares_noise for item in common.items] == [True, True, None]  # the last one is alone
    assert not caplog.text
    side_by_side([page, page_of(tmp_path / 'c.html', ['x', 'y'], seed=5)], tmp_path / 'both.html')
    assert 'sampling_seed is 0, 5: what samplers draw beyond the initial noise is not the same' in caplog.text


def test_samples_of_other_noise_are_not_compared(tmp_path, caplog):
    pages = [page_of(tmp_path / 'a.html', ['x', 'y', 'z']), page_of(tmp_path / 'b.html', ['x', 'w', 'v'])]
    expected = r"2 of 3 samples did not start from the same noise .*: sample 1 from y in 'a', w in 'b'"
    with pytest.raises(ValueError, match=f'{expected}; .* pass --any-noise'):
        side_by_side(pages, tmp_path / 'both.html')
    assert not caplog.text
    common = side_by_side(pages, tmp_path / 'both.html', any_noise=True)
    assert [item.shares_noise for item in common.items] == [True, False, False]
    assert re.search(expected, caplog.text)


def test_pages_that_do_not_say_their_noise(tmp_path, caplog):
    page = page_of(tmp_path / 'new.html', ['x', 'y'])
    text = page.read_text()
    for hashes in (', "noise": ["x"]', ', "noise": ["y"]'):
        assert text.count(hashes) == 1
        text = text.replace(hashes, '')
    (tmp_path / 'old.html').write_text(text.replace('>new<', '>old<').replace('"new"', '"old"'))
    common = side_by_side([page, tmp_path / 'old.html', page], tmp_path / 'both.html')
    assert [item.noise for item in common.items] == [['x', None, 'x'], ['y', None, 'y']]
    assert {item.shares_noise for item in common.items} == {None}
    assert 'of 2 of 2 samples it is not known' in caplog.text
    assert "because 'old' does not say" in caplog.text


def test_samples_of_different_data_are_not_compared(tmp_path):
    page = written_run(tmp_path, 'a', [0], 10)
    other = gallery(items=[Item(0, 'another prompt', ['0.png'])])
    other.write(tmp_path / 'b.html')
    with pytest.raises(ValueError, match="sample 0 is 'another prompt', but 'prompt 0'"):
        side_by_side([page, tmp_path / 'b.html'], tmp_path / 'both.html')
    with pytest.raises(ValueError, match='1 names for 2 pages'):
        side_by_side([page, page], tmp_path / 'both.html', names=['x'])


def test_command(tmp_path, caplog):
    arguments = dict(out=str(tmp_path / 'both.html'), names=None, embed=False, any_noise=False)
    pages = [str(written_run(tmp_path, 'a', [0], 10)), str(written_run(tmp_path, 'b', [0], 20))]
    assert compare_samples(Namespace(pages=pages, **arguments)) == 0
    assert [column.name for column in read_page(arguments['out']).columns] == ['a', 'b']
    with pytest.raises(OSError, match=r'no\.html'):
        compare_samples(Namespace(pages=[str(tmp_path / 'no.html')], **arguments))
    pages = [str(page_of(tmp_path / f'{name}.html', [name])) for name in 'xy']
    with pytest.raises(ConfigError, match='pass --any-noise'):
        compare_samples(Namespace(pages=pages, **arguments))
    assert compare_samples(Namespace(pages=pages, **{**arguments, 'any_noise': True})) == 0
