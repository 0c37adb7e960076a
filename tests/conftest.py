"""Settings of all tests."""

import logging
import os
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ['tests.object_store', 'tests.s3_server', 'tests.web_server']

# As the tools do: MKL's products are otherwise not the same bits from call to call when several threads share one.
os.environ.setdefault('MKL_CBWR', 'AUTO')

# How long an example takes says nothing about the code on a machine that does other things too. The same examples on
# every run: what fails for one fails for all. `--hypothesis-profile=search` draws new ones.
settings.register_profile('search', deadline=None)
settings.register_profile('fixed', deadline=None, derandomize=True, database=None)
settings.load_profile('fixed')

CUDA_TESTS = Path(__file__).parent / 'cuda'


def pytest_configure(config):
    """Hide GPUs from tests that compare with what CPUs compute, unless CUDA_VISIBLE_DEVICES shows them some."""
    paths = [(config.invocation_params.dir / arg.partition('::')[0]).resolve() for arg in config.args]
    if not all(path.is_relative_to(CUDA_TESTS) for path in paths):
        os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')


@pytest.fixture(autouse=True)
def _levels_of_loggers():
    """What runs and tools set for their process lasts no longer than the test that they are called in."""
    loggers = [logging.getLogger(), logging.getLogger('lakonlab')]
    before = [(logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (level, propagate) in zip(loggers, before):
        logger.setLevel(level)
        logger.propagate = propagate
