import itertools

import pytest
import torch

from lakonlab.datasets.collate import collate
from lakonlab.datasets.digits import Digits
from lakonlab.datasets.loader import build_dataloader


def test_batch_of_digits():
    batch = next(iter(build_dataloader(Digits(), 6, shuffle=True)))
    assert batch['latents'].shape == (6, 1, 8, 8)
    assert batch['labels'].shape == batch['negative_labels'].shape == (6,)
    assert batch['name'] == [str(label) for label in batch['labels'].tolist()]
    assert all(isinstance(number, int) for number in batch['ids'])


def ids(loader, count):
    return [batch['ids'] for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize('workers', [0, 2])
def test_training_loader_resumes_with_any_number_of_workers(workers):
    reference = ids(build_dataloader(Digits(), 64, shuffle=True, seed=3), 30)
    resumed = build_dataloader(Digits(), 64, workers, shuffle=True, seed=3, start_iter=21, persistent_workers=True)
    assert ids(resumed, 9) == reference[21:]


def test_evaluation_loader_reads_in_order():
    loader = build_dataloader(Digits('val', test_mode=True, num_test_images=25), 10)
    batches = [batch['ids'] for batch in loader]
    assert batches == [list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_shuffled_evaluation_is_refused():
    with pytest.raises(ValueError, match='infinite=True'):
        build_dataloader(Digits(), 4, shuffle=True, infinite=False)


def test_collate_follows_mappings():
    batch = collate([dict(a=dict(x=torch.zeros(2)), b='p', c=[1, 2]) for _ in range(3)])
    assert batch['a']['x'].shape == (3, 2)
    assert batch['b'] == ['p'] * 3
    assert batch['c'] == [[1, 2]] * 3


def test_collate_names_the_key_at_fault():
    with pytest.raises(ValueError, match="'x': cannot stack"):
        collate([dict(x=torch.zeros(2)), dict(x=torch.zeros(3))])
    with pytest.raises(KeyError, match='y'):
        collate([dict(y=1), dict()])
