"""A run whose data sets do not bring what its model needs is refused before weights are loaded."""

import pytest
from torch.utils.data import Dataset

from lakonlab.config.errors import ConfigError
from lakonlab.registry import DATASETS
from lakonlab.runner.data_plan import check_data, planned_data_problems, used_splits


@pytest.fixture
def wants():
    """A data set that says what it needs and has, registered while a test runs."""

    @DATASETS.register_module(name='Wants')
    class Wants(Dataset):
        def __init__(self, needs_text_encoder=None, has_images=True, fails=False):
            if fails:
                raise FileNotFoundError('list.txt is missing')
            self.needs_text_encoder, self.has_images = needs_text_encoder, has_images

    yield dict(type='Wants')
    del DATASETS.module_dict['Wants']


def config(train, val=None, trainer='PiFlowImitation', text_encoder=None):
    return {
        'model': {'diffusion': {'type': trainer}, 'text_encoder': text_encoder},
        'data': {'train': train, **({'val': val} if val else {})},
        'evaluation': [{'data': 'val'}] if val else [],
    }


def test_texts_need_a_text_encoder(wants):
    texts = {**wants, 'needs_text_encoder': 'cache_dir is not there'}
    cfg = config(wants, texts)
    check_data(cfg, used_splits(cfg, training=True, evaluating=False))
    with pytest.raises(ConfigError, match=r'data\.val: cache_dir is not there, and the model has no text encoder'):
        check_data(cfg, used_splits(cfg, training=True))
    check_data(config(texts, texts, text_encoder=dict(type='x')), ['train', 'val'])


def test_trainers_on_data_need_images(wants):
    bare = {**wants, 'has_images': False}
    with pytest.raises(ConfigError, match=r'data\.train: holds neither images nor latents, and PiFlowImitation is'):
        check_data(config(bare), ['train'])
    check_data(config(bare, trainer='PiFlowImitationDataFree'), ['train'])
    check_data(config(wants, bare), ['train', 'val'])  # what is sampled needs none


def test_plans_say_what_a_run_would_stumble_over(wants):
    problems = planned_data_problems(config({**wants, 'fails': True}, dict(type='Digits')), ['train', 'val'])
    assert problems == ['data.train: list.txt is missing']


def test_data_sets_that_say_nothing_are_fine():
    check_data(config(dict(type='Digits')), ['train'])
