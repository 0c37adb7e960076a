# FLUX.1-dev.
_base_ = ['./_flux_test.py']

name = 'flux_test'

test_cfg = dict(num_timesteps=50)
