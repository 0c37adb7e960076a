"""Losses and their logs reproduce the recorded vectors."""

import pytest

from lakonlab.registry import MODULES
from tests import golden

CASES = golden.load('losses')


def build(params, loss_type, prefix, data_info=None):
    return MODULES.build(
        {
            'type': loss_type,
            'data_info': data_info,
            'rescale_mode': 'constant',
            'rescale_cfg': {'scale': params['scale']},
            'log_cfgs': {'type': 'quartile', 'prefix_name': prefix, 'total_timesteps': 1000},
        }
    )


def check_logs(log_vars, recorded, prefix):
    expected = {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}
    assert expected
    assert set(log_vars) == set(expected)
    for key, value in expected.items():
        golden.assert_close(log_vars[key], value, 1e-6)


@pytest.mark.parametrize('name', golden.names('losses', 'mse'))
def test_mse(name):
    case = CASES[name]
    loss_module = build(case['params'], 'DiffusionMSELoss', 'loss_mse', {'pred': 'pred', 'target': 'target'})
    golden.assert_close(loss_module(case['in']), case['out']['loss'], 1e-9)
    check_logs(loss_module.log_vars, case['out'], 'log_vars.')


@pytest.mark.parametrize('name', golden.names('losses', 'nll'))
def test_nll(name):
    case = CASES[name]
    data_info = {'pred': 'pred', 'target': 'target', 'logstd': 'logstd'}
    loss_module = build(case['params'], 'DiffusionNLLLoss', 'loss_nll', data_info)
    for i in range(3):
        inputs = {**case['in'], 'pred': case['in']['pred'] + i, 'timesteps': (case['in']['timesteps'] + 200 * i) % 1000}
        golden.assert_close(loss_module(inputs), case['out'][f'call{i}.loss'], 1e-9)
        check_logs(loss_module.log_vars, case['out'], f'call{i}.log_vars.')


@pytest.mark.parametrize('name', golden.names('losses', 'gmnll'))
def test_gmflow_nll(name):
    case = CASES[name]
    loss_module = build(case['params'], 'GMFlowNLLLoss', 'loss_trans')
    for i in range(3):
        inputs = {
            **{key: case['in'][f'gm.{key}'] for key in ('means', 'logstds', 'logweights')},
            'x_t_low': case['in']['target'] + 0.3 * i,
            'timesteps': (case['in']['timesteps'] + 200 * i) % 1000,
        }
        golden.assert_close(loss_module(inputs), case['out'][f'call{i}.loss'], 2e-6)
        check_logs(loss_module.log_vars, case['out'], f'call{i}.log_vars.')


def test_one_bad_sample_does_not_spoil_running_averages():
    case = CASES['nll.a']
    loss_module = build(case['params'], 'DiffusionNLLLoss', 'loss_nll', {'pred': 'pred', 'target': 'target'})
    loss_module.data_info['logstd'] = 'logstd'
    bad = {**case['in'], 'pred': case['in']['pred'].clone()}
    bad['pred'][0, 0, 0, 0] = float('nan')
    assert loss_module(bad).isnan()
    loss_module(case['in'])
    assert all(value.isfinite() for value in loss_module.log_vars.values())
