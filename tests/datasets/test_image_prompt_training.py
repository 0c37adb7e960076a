"""Batches of prompt data sets train both kinds of trainers, and sample; from the loader to the optimiser."""

import pytest
import torch

import tests.tiny_text_image as tiny
from lakonlab.datasets.loader import build_dataloader
from lakonlab.ops.random_source import SeededSource
from lakonlab.runner.optimizer import build_optimizers
from tests.datasets.prompt_files import cached, quantised, write_datalist, write_record


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return tiny.teacher_file('QwenImage', tmp_path_factory.mktemp('teacher'))


@pytest.fixture
def folder(tmp_path):
    """A cache of four prompts of different length; the first two have latents."""
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        states, scale, _ = quantised(torch.randn(2 + number, 20, generator=generator))
        mask = torch.ones(2 + number, dtype=torch.int64)
        embeds = dict(encoder_hidden_states=states, encoder_hidden_states_scale=scale, encoder_hidden_states_mask=mask)
        latents = dict(latents=torch.randn(tiny.LATENT_SIZE, generator=generator)) if number < 2 else {}
        write_record(tmp_path / 'cache', number, prompt_embed_kwargs=embeds, **latents)
    write_datalist(tmp_path / 'cache.jsonl.gz', [f'{number:012d}' for number in range(4)])
    return tmp_path


def model_of(weights, trainer):
    return tiny.build(tiny.config('QwenImage', 'GM', weights, diffusion__type=trainer), 'QwenImage')


def losses(model, dataset, workers=0):
    optimizer = build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)})
    loader = build_dataloader(dataset, 2, workers, shuffle=True, seed=3)
    return [
        float(
            model.train_step(batch, optimizer, running_status={'iteration': step}, source=SeededSource(0, step))[
                'log_vars'
            ]['loss_diffusion']
        )
        for step, batch in zip(range(3), loader)
    ]


def test_training_without_data(folder, weights):
    dataset = cached(folder, latent_size=tiny.LATENT_SIZE, ignore_cached_latents=True)
    found = losses(model_of(weights, 'PiFlowImitationDataFree'), dataset)
    assert all(0 < loss < 1e3 for loss in found)
    # padding to a length says the same, and so do workers, which get the data set pickled
    padded = cached(folder, latent_size=tiny.LATENT_SIZE, ignore_cached_latents=True, pad_seq_len=9)
    assert losses(model_of(weights, 'PiFlowImitationDataFree'), padded, workers=1) == pytest.approx(found, rel=1e-4)


def test_training_on_latents(folder, weights):
    dataset = cached(folder, latent_size=tiny.LATENT_SIZE, end_ind=2)
    assert all(0 < loss < 1e3 for loss in losses(model_of(weights, 'PiFlowImitation'), dataset))
    with pytest.raises(ValueError, match='PiFlowImitation is trained on data'):
        losses(model_of(weights, 'PiFlowImitation'), cached(folder, latent_size=tiny.LATENT_SIZE, start_ind=2))


def test_sampling(folder, weights):
    dataset = cached(folder, latent_size=tiny.LATENT_SIZE, test_mode=True, repeat=2)
    model = model_of(weights, 'PiFlowImitation').eval()
    images = [image for batch in build_dataloader(dataset, 3) for image in model.val_step(batch)['pred_imgs'].unbind()]
    assert len(images) == 8
    assert not torch.equal(images[0], images[1])  # the same prompt with other noise
