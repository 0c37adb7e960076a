"""Settings of all tests."""

import os

from hypothesis import settings

pytest_plugins = ['tests.object_store', 'tests.s3_server', 'tests.web_server']

# As the tools do: MKL's products are otherwise not the same bits from call to call when several threads share one.
os.environ.setdefault('MKL_CBWR', 'AUTO')

# How long an example takes says nothing about the code on a machine that does other things too. The same examples on
# every run: what fails for one fails for all. `--hypothesis-profile=search` draws new ones.
settings.register_profile('search', deadline=None)
settings.register_profile('fixed', deadline=None, derandomize=True, database=None)
settings.load_profile('fixed')
