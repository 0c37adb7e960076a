import pytest
import torch

from lakonlab.datasets.digits import NUM_CLASSES, Digits, load_split
from lakonlab.registry import DATASETS


def test_splits_are_disjoint_complete_and_stratified():
    from sklearn.datasets import load_digits

    train, train_labels = load_split('train')
    held_out, held_out_labels = load_split('val')
    assert len(train) == len(train_labels) == 1442
    assert len(held_out) == len(held_out_labels) == 355
    # no two images of the data set are equal, so images identify items
    pixels = {tuple(image.flatten().tolist()) for image in train}
    held_out_pixels = {tuple(image.flatten().tolist()) for image in held_out}
    assert not pixels & held_out_pixels
    assert len(pixels | held_out_pixels) == len(load_digits().target)
    fraction = torch.bincount(held_out_labels) / torch.bincount(torch.cat([train_labels, held_out_labels]))
    assert fraction.shape == (NUM_CLASSES,)
    assert fraction.min() > 0.19
    assert fraction.max() < 0.21


def test_training_items():
    dataset = DATASETS.build(dict(type='Digits', split='train', negative_label=10))
    item = dataset[3]
    assert item['latents'].shape == (1, 8, 8)
    assert item['latents'].dtype == torch.float32
    assert item['labels'].dtype == item['negative_labels'].dtype == torch.int64
    assert item['negative_labels'] == 10
    assert item['ids'] == 3
    assert item['name'] == str(int(item['labels']))
    images, _ = load_split('train')
    assert images.min() == -1
    assert images.max() == 1


def test_sampling_items_depend_on_their_number_only():
    dataset = Digits('val', test_mode=True, num_test_images=5000)
    assert len(dataset) == 5000
    item = dataset[4321]
    assert 'latents' not in item
    assert item['labels'] == 1
    expected = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(5321))
    assert torch.equal(item['noise'], expected)
    assert torch.bincount(torch.stack([dataset[i]['labels'] for i in range(100)])).tolist() == [10] * 10


def test_negative_label_can_be_left_out():
    assert 'negative_labels' not in Digits(negative_label=None)[0]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(split='test'), "split='test'.*'train', 'val'"),
        (dict(num_test_images=0), 'num_test_images=0'),
        (dict(latent_size=(1, 16, 16)), 'latent_size'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_index_out_of_range():
    with pytest.raises(IndexError, match='355'):
        Digits('val')[355]
