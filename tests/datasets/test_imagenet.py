import numpy as np
import pytest
import torch
from PIL import Image

from lakonlab.datasets.imagenet import ImageNet, read_image

NAMES = "{0: 'tench, Tinca tinca',\n 1: \"jack-o'-lantern\",\n 999: 'toilet tissue'}\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with three images, two latents, and lists of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'names.txt').write_text(NAMES)
    rng = np.random.default_rng(0)
    for name, shape in {'a.png': (40, 30, 3), 'b.png': (17, 64), 'c.png': (16, 16, 4)}.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    for number in range(2):
        torch.save({'x': torch.full((4, 2, 2), number).half(), 'y': torch.tensor(number)}, tmp_path / f'{number}.pth')
    (tmp_path / 'images.txt').write_text('a.png 0\nb.png 1\n\nc.png 999\n')
    (tmp_path / 'latents.txt').write_text('0.pth\n1.pth 1\n')
    return tmp_path


def dataset(datalist='images.txt', **arguments):
    return ImageNet('.', datalist, 'names.txt', **{'image_size': 16, **arguments})


def test_images_and_their_mirror_images(files):
    data = dataset()
    assert len(data) == 6
    items = [data[i] for i in range(6)]
    for index, item in enumerate(items):
        assert item['images'].shape == (3, 16, 16)
        assert item['images'].dtype == torch.float32
        assert item['ids'] == index
        assert item['negative_labels'] == 1000
        assert torch.equal(item['images'].flip(-1), items[(index + 3) % 6]['images'])
    assert [int(item['labels']) for item in items] == [0, 1, 999] * 2
    assert [item['name'] for item in items[:2]] == ['tench, Tinca tinca', "jack-o'-lantern"]
    assert len(dataset(random_flip=False, negative_label=None)) == 3
    assert 'negative_labels' not in dataset(negative_label=None)[0]
    # grey becomes three equal channels, transparency is dropped
    assert torch.equal(items[1]['images'][0], items[1]['images'][2])
    pixels = np.asarray(Image.open('c.png'))
    assert np.array_equal((items[2]['images'] * 255).round().permute(1, 2, 0).numpy(), pixels[..., :3])


@pytest.mark.parametrize('mode', ['CMYK', 'P', 'L', 'RGB'])
def test_any_kind_of_image(tmp_path, mode):
    path = tmp_path / ('x.jpg' if mode == 'CMYK' else 'x.png')
    image = Image.new('RGB', (50, 90), (250, 10, 20))
    (image.quantize() if mode == 'P' else image.convert(mode)).save(path)
    image = read_image(path, 16)
    expected = torch.tensor([250, 10, 20]) if mode != 'L' else torch.full((3,), 0.299 * 250 + 0.587 * 10 + 0.114 * 20)
    assert (image * 255 - expected[:, None, None]).abs().max() < 4


def test_shrinking_averages_and_crops_the_centre(tmp_path):
    # three fields of 64 x 64: the middle one is what the centre crop keeps
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = np.indices((64, 64)).sum(axis=0)[..., None] % 2 * 200
    Image.fromarray(pixels).save(tmp_path / 'fields.png')
    image = read_image(tmp_path / 'fields.png', 16)
    assert torch.allclose(image, torch.tensor(100 / 255), atol=1e-6)


def test_latents(files):
    data = dataset('latents.txt')
    assert len(data) == 2  # not mirrored
    item = data[1]
    assert torch.equal(item['latents'], torch.ones(4, 2, 2))
    assert item['labels'].dtype == torch.int64
    assert item['labels'] == 1
    assert item['paths'].endswith('1.pth')


def test_noise_is_a_function_of_the_number(files):
    data = ImageNet(label2name_path='names.txt', test_mode=True, num_test_images=12, test_label_repeat=3)
    assert len(data) == 12
    items = [data[i] for i in range(12)]
    expected = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(1007))
    assert torch.equal(items[7]['noise'], expected)
    labels = [int(item['labels']) for item in items]
    assert labels[:3] == labels[:1] * 3
    assert len(set(labels)) == 4
    equal = ImageNet(label2name_path='names.txt', test_mode=True, test_label_sampling='equal')
    assert [int(equal[i]['labels']) for i in (0, 5, 1003)] == [0, 5, 3]


def test_nothing_is_unpickled(files):
    torch.save({'x': ImageNet, 'y': 0}, '0.pth')
    with pytest.raises(Exception, match=r'[Ww]eights'):
        dataset('latents.txt')[0]


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('a b.png 1', "line 1: expected a path without spaces and a label, found 'a b.png 1'"),
        ('a.png first', 'line 1: expected a path'),
        ('a.gif 1', r"line 1: 'a.gif' ends in none of \.pth"),
        ('', 'the data list is empty'),
    ],
)
def test_wrong_lists(files, line, message):
    (files / 'wrong.txt').write_text(line + '\n')
    with pytest.raises(ValueError, match=message):
        len(dataset('wrong.txt'))


def test_wrong_arguments_and_files(files):
    with pytest.raises(ValueError, match="test_label_sampling='all': expected one of 'random', 'equal'"):
        dataset(test_label_sampling='all')
    with pytest.raises(ValueError, match='image_size=0'):
        dataset(image_size=0)
    with pytest.raises(FileNotFoundError, match=r"datalist_path='none\.txt'"):
        len(dataset('none.txt'))
    with pytest.raises(IndexError, match='item 6'):
        dataset()[6]
    (files / 'names.txt').write_text('tench\n')
    with pytest.raises(ValueError, match='line 1: expected label'):
        dataset()[0]
    (files / 'names.txt').write_text(NAMES)
    (files / 'bare.txt').write_text('a.png\n')
    with pytest.raises(ValueError, match='gives no label'):
        dataset('bare.txt')[0]
    torch.save({'z': torch.zeros(1)}, '0.pth')
    with pytest.raises(ValueError, match="expected a dict with 'x'"):
        dataset('latents.txt')[0]
