import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from lakonlab.datasets.collate import collate, items_of
from lakonlab.datasets.combine import ConcatDataset, Subset
from lakonlab.datasets.loader import build_dataloader
from lakonlab.registry import DATASETS


class Numbers(Dataset):
    """Items that say where they come from."""

    def __init__(self, name, size, bucket_ids=None, reason=None, has_images=True):
        self.name, self.size, self.bucket_ids = name, size, bucket_ids
        self.needs_text_encoder, self.has_images = reason, has_images

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert 0 <= index < self.size
        return {'ids': index, 'name': f'{self.name}{index}'}


class Drawn(Numbers):
    def random_item(self, index, source):
        return {**self[index], 'draw': float(source.uniform('draw', (1,)))}


def test_one_after_the_other():
    data = ConcatDataset([Numbers('a', 2), Numbers('b', 0), Numbers('c', 3)])
    assert len(data) == 5
    assert [data[i]['name'] for i in range(5)] == ['a0', 'a1', 'c0', 'c1', 'c2']
    assert [data[i]['ids'] for i in range(5)] == list(range(5))  # they name files, so no two are alike
    assert data.bucket_ids is None
    for index in (-1, 5):
        with pytest.raises(IndexError, match='ConcatDataset of 5'):
            data[index]


def test_buckets_of_different_sets_are_different():
    data = ConcatDataset([Numbers('a', 3, [0, 2, 0]), Numbers('b', 2, np.array([1, 0]))])
    ids = data.bucket_ids
    assert len(ids) == 5
    assert ids[0] == ids[2] != ids[1]
    assert not set(ids[:3]) & set(ids[3:])
    assert ids[3] != ids[4]
    with pytest.raises(ValueError, match=r'1 of 2 .* have no buckets'):
        _ = ConcatDataset([Numbers('a', 1, [0]), Numbers('b', 1)]).bucket_ids


def test_a_part_keeps_ids_and_buckets():
    data = Subset(Numbers('a', 5, [4, 5, 6, 7, 8]), [3, 1, 1])
    assert [data[i]['ids'] for i in range(len(data))] == [3, 1, 1]
    assert data.bucket_ids.tolist() == [7, 5, 5]
    assert Subset(Numbers('a', 5), [0]).bucket_ids is None
    with pytest.raises(IndexError, match='Subset of 3'):
        data[3]
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=f'indices: found {wrong}, expected numbers from 0 to 4'):
            len(Subset(Numbers('a', 5), [0, wrong]))


def test_needs_are_those_of_the_parts():
    plain, texts = Numbers('a', 1), Numbers('b', 1, reason='texts', has_images=False)
    assert ConcatDataset([plain]).needs_text_encoder is None
    assert ConcatDataset([plain, texts]).needs_text_encoder == Subset(texts, [0]).needs_text_encoder == 'texts'
    assert ConcatDataset([plain]).has_images
    assert not ConcatDataset([plain, texts]).has_images
    assert not Subset(texts, [0]).has_images


def test_random_items_stay_random():
    data = ConcatDataset([Numbers('a', 2), Subset(Drawn('b', 4), [3, 0])])
    batches = iter(build_dataloader(Subset(data, [2, 3]), 2, infinite=True))
    draws = [next(batches)['draw'] for _ in range(3)]
    assert len({draw for pair in draws for draw in pair}) == 6
    assert not hasattr(ConcatDataset([Numbers('a', 2)]), 'random_item')
    assert not hasattr(Subset(Numbers('a', 2), [0]), 'random_item')


def test_built_from_configs_and_pickled():
    parts = [dict(type='Digits', split='val'), dict(type='Subset', dataset=dict(type='Digits'), indices=[7, 8])]
    data = pickle.loads(pickle.dumps(DATASETS.build(dict(type='ConcatDataset', datasets=parts))))
    assert len(data) == 357
    assert (data[356]['latents'] == DATASETS.build(dict(type='Digits'))[8]['latents']).all()
    with pytest.raises(ValueError, match='expected at least one'):
        ConcatDataset([])


class Gathered(Numbers):
    """Makes whole batches, with tensors and dicts in them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = []

    def __getitem__(self, index):
        value = torch.tensor([float(index), float(ord(self.name))])
        return {**super().__getitem__(index), 'x': value, 'more': {'y': value + 1}}

    def __getitems__(self, indices):
        self.read.append(list(indices))
        return collate([self[index] for index in indices])


@pytest.mark.parametrize('chosen', [[0, 1], [5, 0, 3, 4, 1, 0], [4, 3]])
def test_batches_are_read_by_the_data_sets(chosen):
    parts = [Gathered('a', 2), Gathered('b', 3), Numbers('c', 0)]
    data = ConcatDataset(parts)
    if 5 in chosen:  # a data set that knows nothing of batches
        parts[2] = Gathered('c', 1)
        data = ConcatDataset([*parts[:2], Subset(parts[2], [0])])
    batch, items = collate(data.__getitems__(chosen)), collate([data[index] for index in chosen])
    assert batch['ids'] == chosen
    assert batch['name'] == items['name']
    assert torch.equal(batch['x'], items['x'])
    assert torch.equal(batch['more']['y'], items['more']['y'])
    expected = [[i for i in chosen if i < 2], [i - 2 for i in chosen if 2 <= i < 5], [i - 5 for i in chosen if i == 5]]
    assert [part.read for part in parts if isinstance(part, Gathered)] == [
        [numbers] if numbers else [] for numbers in expected[: 3 if 5 in chosen else 2]
    ]


def test_data_sets_without_batches_are_read_item_by_item():
    data = ConcatDataset([Gathered('a', 2), Gathered('b', 3)])
    plain = ConcatDataset([Numbers('a', 2), Numbers('b', 3)])
    assert [item['name'] for item in plain.__getitems__([4, 0])] == ['b2', 'a0']
    assert [item['name'] for item in data.__getitems__([4, 0])] == ['b2', 'a0']


def test_items_of_a_batch():
    items = [{'ids': n, 'x': torch.tensor([n, 2.0]), 'more': {'y': torch.tensor(n), 'z': str(n)}} for n in range(3)]
    for found, expected in zip(items_of(collate(items)), items, strict=True):
        assert found.keys() == expected.keys()
        assert torch.equal(found['x'], expected['x'])
        assert (found['ids'], found['more']['z']) == (expected['ids'], expected['more']['z'])
        assert torch.equal(found['more']['y'], expected['more']['y'])
