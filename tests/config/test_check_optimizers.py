"""An optimiser that the strategy of a run does not have is refused before anything is loaded."""

import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.parallel.block_moments import block_optimizer

CONFIG = Path(__file__).parents[1] / 'data' / 'published_style_digits.py'
SEVERAL = {'single_process': False}


class Eight(torch.optim.AdamW):
    """Stands for an optimiser of an optional package."""


@pytest.fixture
def packages(monkeypatch):
    """Make optional packages present, with an ``AdamW8bit``, or absent."""

    def set_packages(**present):
        block_optimizer.cache_clear()
        for package in ('bitsandbytes', 'torchao'):
            module = ModuleType(package) if present.get(package) else None
            optim = ModuleType(f'{package}.optim') if present.get(package) else None
            if module is not None:
                module.optim, optim.AdamW8bit = optim, Eight
            monkeypatch.setitem(sys.modules, package, module)
            monkeypatch.setitem(sys.modules, f'{package}.optim', optim)

    yield set_packages
    block_optimizer.cache_clear()


def configured(wrapper, kind='AdamW8bit', **options):
    keys = {f'optimizer.diffusion.{key}': value for key, value in options.items()}
    return load_config(CONFIG, {'module_wrapper': wrapper, 'optimizer.diffusion.type': kind, **keys})


@pytest.mark.parametrize(
    ('wrapper', 'message'),
    [
        ('ddp', r"'AdamW8bit' needs bitsandbytes: pip install bitsandbytes\. Without it, use 'AdamW'\."),
        (None, r"'AdamW8bit' needs bitsandbytes: pip install bitsandbytes\. Without it, use 'AdamW'\."),
        ('fsdp2', r"'AdamW8bit' with module_wrapper='fsdp2' needs torchao: pip install torchao\. .* use 'AdamW'\."),
    ],
)
def test_a_missing_package_stops_a_run_and_is_noted_in_a_plan(packages, caplog, wrapper, message):
    packages()
    with pytest.raises(ConfigError, match=rf'\n  optimizer\.diffusion\.type: {message}$'):
        check_config(configured(wrapper), **SEVERAL)
    check_config(configured(wrapper), training=False, **SEVERAL)
    assert 'AdamW8bit' not in caplog.text
    with caplog.at_level(logging.WARNING, 'lakonlab.config'):
        check_config(configured(wrapper), planning=True)
    assert f'optimizer.diffusion.type: {message[:11]}' in caplog.text


@pytest.mark.parametrize('how', [SEVERAL, {'planning': True}])
@pytest.mark.parametrize(
    ('wrapper', 'kind', 'message'),
    [
        ('fsdp', 'AdamW8bit', r"needs whole parameters.*set module_wrapper to 'ddp', or to 'fsdp2'.*such as 'AdamW'"),
        ('fsdp2', 'Lion8bit', r"needs whole parameters.*set module_wrapper to 'ddp'"),
        ('fsdp', 'Adafactor', r"looks at whole parameters.*such as 'AdamW'"),
        ('fsdp2', 'Rprop', r"divides by rows.*such as 'AdamW'"),
        ('ddp', 'LBFGS', r"several times in a step.*such as 'AdamW'"),
    ],
)
def test_what_a_strategy_cannot_run(packages, wrapper, kind, message, how):
    packages(bitsandbytes=True, torchao=True)
    with pytest.raises(ConfigError, match=rf"\n  optimizer\.diffusion\.type: .*'{kind}'.*{message}"):
        check_config(configured(wrapper, kind), **how)


def test_names_mean_what_the_strategy_has(packages):
    packages(bitsandbytes=True)
    check_config(configured('ddp'), **SEVERAL)
    check_config(configured('fsdp'))  # one process divides nothing
    check_config(configured('fsdp'), training=False, **SEVERAL)  # nothing is trained
    packages(torchao=True)
    check_config(configured('fsdp2'), **SEVERAL)


def test_arguments_are_those_of_the_package_in_use():
    pytest.importorskip('torchao', reason='needs torchao: pip install torchao')
    check_config(configured('fsdp2', betas=(0.9, 0.95), block_size=128), **SEVERAL)
    with pytest.raises(ConfigError, match=r'optimizer\.diffusion\.min_8bit_size: .*AdamW8bit'):
        check_config(configured('fsdp2', min_8bit_size=1), **SEVERAL)
