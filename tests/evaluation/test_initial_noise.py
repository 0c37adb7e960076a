"""Pages say which noise each sample started from, whoever drew it and however the samples were batched."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lakonlab.datasets.noise import seeded_noise
from lakonlab.evaluation.initial_noise import RecordingSource, digest, noise_hashes
from lakonlab.evaluation.results import run_evaluations
from lakonlab.evaluation.viewer import read_page, side_by_side
from lakonlab.ops.random_source import SeededSource
from lakonlab.registry import DATASETS, MODELS
from tests.evaluation.thread_ranks import run_threads
from tests.runner import small_run

ORIGIN = dict(model_sha256='abc')


@DATASETS.register_module()
class NoiseOrNot(torch.utils.data.Dataset):
    """Seven prompts, with noise of a seed to start from, or without any."""

    bucket_ids = None

    def __init__(self, noise_seed=None, size=(1, 4, 4)):
        self.noise_seed, self.size = noise_seed, size

    def __len__(self):
        return 7

    def __getitem__(self, index):
        item = dict(ids=index, name=f'prompt {index}')
        if self.noise_seed is None:
            return item
        return {**item, 'noise': seeded_noise(self.noise_seed + index, self.size)}


class Sampler(nn.Module):
    """Draws its noise as models do where the data bring none, and shows it."""

    def __init__(self, dtype=torch.float32, size=(1, 4, 4)):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.dtype, self.size = dtype, size

    def val_step(self, data, role=None, test_cfg_override=None, source=None):
        noise = data.get('noise')
        if noise is None:
            noise = source.normal('noise', (len(data['ids']), *self.size), self.dtype)
        source.normal('step_noise', noise.shape)
        images = (noise.to(self.dtype) * self.weight / 4 + 0.5).clamp(0, 1).float()
        return dict(num_samples=len(images), pred_imgs=images)


def run(folder, model=None, batch_size=3, seed=0, ranks=None, reuse=False, kind='NoiseOrNot', **data):
    """An evaluation; its page."""
    cfg = dict(
        name='run',
        data=dict(workers_per_gpu=0, val=dict(type=kind, **data), test_dataloader=dict(samples_per_gpu=batch_size)),
        evaluation=[dict(type='GenerativeEvalHook', data='val', viz_dir=str(folder), quantize='uint8')],
    )
    extra = {} if ranks is None else dict(ranks=ranks)
    (results,) = run_evaluations(model or Sampler(), cfg, seed=seed, origin=ORIGIN, reuse=reuse, **extra)
    return results['page']


def noise_of(page):
    return [item.noise for item in read_page(page).items]


def test_hashes_are_of_shape_and_values():
    noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    hashes = noise_hashes(noise)
    assert len(set(hashes)) == 3
    assert noise_hashes(noise.double()) == noise_hashes(noise.transpose(0, 2).contiguous().transpose(0, 2)) == hashes
    assert [noise_hashes(row[None])[0] for row in noise] == hashes
    assert not set(noise_hashes(noise.reshape(3, 4, 2))) & set(hashes)
    changed = noise.clone()
    changed[1, 1, 1] += 1e-6
    assert [found == before for found, before in zip(noise_hashes(changed), hashes)] == [True, False, True]


def test_one_hash_of_many_samples():
    assert digest({1: 'a', 2: 'b'}) == digest({2: 'b', 1: 'a'})
    others = ({1: 'b', 2: 'a'}, {1: 'a'}, {1: 'a', 3: 'b'})
    assert digest({1: 'a', 2: 'b'}) not in {digest(other) for other in others}
    assert digest({1: 'a', 2: None}) is None
    assert digest({}) is None


def test_a_source_that_hashes_draws_the_same():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        plain, recording = SeededSource(3, row_ids=[5, 2]), RecordingSource(3, row_ids=[5, 2])
        assert recording.hashes is None
        for name in ('other', 'noise', 'noise'):
            shape = (2, 3, 5)
            assert torch.equal(recording.normal(name, shape, dtype), plain.normal(name, shape, dtype))
        assert recording.hashes == noise_hashes(SeededSource(3, row_ids=[5, 2]).normal('noise', shape))


@pytest.mark.parametrize('data', [dict(noise_seed=0), dict()], ids=['of the data set', 'of the sampler'])
def test_what_hashes_depend_on(tmp_path, data):
    page = run(tmp_path / 'a', batch_size=1, **data)
    noise = noise_of(page)
    assert len({found for (found,) in noise}) == 7
    drawn = SeededSource(0, row_ids=range(7)).normal('noise', (7, 1, 4, 4))
    given = torch.stack([seeded_noise(number, (1, 4, 4)) for number in range(7)])
    assert [found for (found,) in noise] == noise_hashes(given if data else drawn)
    same = dict(
        batches=run(tmp_path / 'b', **data),
        dtype=run(tmp_path / 'c', Sampler(torch.bfloat16), **data),
        processes=run_threads(lambda ranks: run(tmp_path / 'd', batch_size=2, ranks=ranks, **data), 2)[0],
    )
    for other in same.values():
        assert read_page(other).columns[0].facts['initial_noise'] == digest(
            {i: found for i, (found,) in enumerate(noise)}
        )
        assert all(item.shares_noise for item in side_by_side([page, other], tmp_path / 'both.html').items)


@pytest.mark.parametrize('key', ['noise', 'something_else'], ids=['of the data set', 'of the sampler'])
def test_models_as_they_are(tmp_path, key):
    """Samples of a real model, from the noise of the data set, or drawn by the sampler in ``test_cfg.latent_size``."""
    cfg = small_run.config()
    torch.manual_seed(0)
    model = MODELS.build({**cfg.model, 'train_cfg': cfg.train_cfg, 'test_cfg': cfg.test_cfg})
    data = dict(kind='SmallImages', size=4, key=key)
    pages = [run(tmp_path / str(size), model, batch_size=size, **data) for size in (1, 3)]
    common = side_by_side(pages, tmp_path / 'both.html')
    assert all(item.shares_noise for item in common.items)
    assert len({item.noise[0] for item in common.items}) == 4
    drawn = SeededSource(0, row_ids=range(4)).normal('noise', (4, 1, 8, 8))
    given = torch.stack([DATASETS.build(dict(type='SmallImages', key='noise'))[number]['noise'] for number in range(4)])
    assert [item.noise[0] for item in common.items] == noise_hashes(given if key == 'noise' else drawn)


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        (dict(noise_seed=0), dict(noise_seed=100)),
        (dict(noise_seed=0), dict(noise_seed=0, size=(1, 8, 2))),
        (dict(noise_seed=0), dict()),
        (dict(), dict(model=Sampler(size=(1, 8, 2)))),
        (dict(), dict(seed=1)),
    ],
    ids=['seed of the data set', 'size of the data set', 'who draws', 'size of the sampler', 'seed of the sampler'],
)
def test_other_noise_is_refused(tmp_path, one, other):
    pages = [run(tmp_path / 'one', **one), run(tmp_path / 'other', **other)]
    with pytest.raises(ValueError, match='7 of 7 samples did not start from the same noise'):
        side_by_side(pages, tmp_path / 'both.html')


def test_files_keep_it(tmp_path):
    """Noise is not drawn again where images are used again; of a file that does not say, it is unknown."""
    expected = noise_of(run(tmp_path))
    model = Sampler()
    model.val_step = None
    assert noise_of(run(tmp_path, model, reuse=True)) == expected
    path = tmp_path / 'default' / '000000002.png'
    with Image.open(path) as image:
        pixels = np.array(image)
    Image.fromarray(pixels).save(path)
    assert noise_of(run(tmp_path, model, reuse=True)) == [*expected[:2], [None], *expected[3:]]


def test_real_images_started_from_none(tmp_path):
    data = dict(workers_per_gpu=0, val=dict(type='Digits', split='val'), val_dataloader=dict(samples_per_gpu=100))
    entry = dict(type='GenerativeEvalHook', data='val', viz_dir=str(tmp_path), viz_num=3, generate=False)
    (results,) = run_evaluations(Sampler(), dict(name='run', data=data, evaluation=[entry]))
    assert noise_of(results['page']) == [[None]] * 3
