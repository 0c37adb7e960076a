"""The examples of the how-to pages run as they are printed."""

import re
from pathlib import Path

import pytest

from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES
from lakonlab.registry import DATASETS, MODULES

DOCS = Path(__file__).parents[2] / 'docs'
PAGES = sorted(DOCS.glob('add_a_*.md'))


@pytest.fixture(autouse=True)
def _forget_examples():
    """What an example registers is gone after it."""
    yield
    pages = {page.stem for page in PAGES}
    for table in (MODULES.module_dict, DATASETS.module_dict, POLICY_CLASSES):
        for name in [name for name, kind in table.items() if kind.__module__ in pages]:
            del table[name]


def test_there_are_pages():
    assert [page.stem for page in PAGES] == ['add_a_backbone', 'add_a_dataset', 'add_a_policy']


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_examples_run(page):
    blocks = re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    exec(compile('\n'.join(blocks), str(page), 'exec'), {'__name__': page.stem})


@pytest.mark.parametrize('page', sorted(DOCS.glob('*.md')), ids=lambda page: page.stem)
def test_paths_in_the_text_exist(page):
    text = page.read_text(encoding='utf-8')
    named = set(re.findall(r'`((?:lakonlab|configs|tools|tests|demo|docs)/[\w/.]+)`', text))
    named |= {f'docs/{link}' for link in re.findall(r'\]\((\w+\.md)\)', text)}
    missing = [path for path in named if not (DOCS.parent / path).exists()]
    assert not missing
