"""What the amount of noise of a stochastic solver may be, and what is refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.models.diffusions.schedulers import FlowMapSDEScheduler, FlowSDEScheduler
from lakonlab.models.diffusions.schedulers.h_expression import noise_amount


@settings(deadline=None, max_examples=25)
@given(sigma=st.floats(0.01, 0.99), h=st.floats(0, 100))
def test_values(sigma, h):
    assert noise_amount(h)(sigma) == noise_amount(str(h))(sigma) == h
    for expression, value in {
        '0.5 + sqrt(sigma)': 0.5 + math.sqrt(sigma),
        '-(2 - 3) * sigma ** 2 / 4 % 3': sigma**2 / 4 % 3,
        'clip(2 * sigma, 0.5, 1)': min(max(2 * sigma, 0.5), 1),
        'max(0, abs(sin(pi * sigma)) - exp(-1))': max(0, abs(math.sin(math.pi * sigma)) - math.exp(-1)),
        'inf': math.inf,
        ' sigma ': sigma,
    }.items():
        assert noise_amount(expression)(sigma) == pytest.approx(value)


@pytest.mark.parametrize(
    ('h', 'message'),
    [
        (-1, r'h=-1 is -1\.0 at sigma=\S+: expected a non-negative number'),
        ('nan', r"unknown name 'nan'"),
        ('', r"h='': expected a non-negative number, 'inf' or an expression such as"),
        ('sigma +', r'invalid syntax'),
        ('sigma - 0.5', r'is -0\.\d+ at sigma=0\.\d+: expected a non-negative number'),
        ('(sigma - 0.5) ** 0.5', r'expected a non-negative number'),
        ('1 / (sigma - 0.5)', r'sigma=0\.'),
        ('1 / (sigma - sigma)', r'has no value at sigma=0\.\d+: .*division'),
        ('sqrt(sigma, 2)', r'has no value at'),
        ('9 ** 9 ** 9 ** 9', r'has no value at'),
        ('x + 1', r"unknown name 'x'; known are sigma, pi, inf, abs"),
        ('__import__("os")', r'is not arithmetic in sigma'),
        ('sigma.real', r"'sigma\.real' is not arithmetic in sigma"),
        ('sigma if sigma else 1', r'is not arithmetic in sigma'),
        ('[sigma][0]', r'is not arithmetic in sigma'),
        ('max(*[1, 2])', r'is not arithmetic in sigma'),
        ('lambda: 1', r'is not arithmetic in sigma'),
        ('True', r'True is not a number'),
        ('2j', r'is not arithmetic in sigma'),
        ('(' * 500 + 'sigma' + ')' * 500, r'expected a non-negative number'),
        ('sigma' + ' + sigma' * 20000, r'h='),
    ],
)
@pytest.mark.parametrize('kind', [FlowSDEScheduler, FlowMapSDEScheduler])
def test_what_is_no_amount_of_noise_is_refused_at_construction(kind, h, message):
    with pytest.raises(ValueError, match=message):
        kind(h=h)


def test_euler_maruyama_needs_a_finite_amount():
    with pytest.raises(ValueError, match=r"h='inf': solver_type='euler-maruyama' needs a finite"):
        FlowSDEScheduler(h='inf', solver_type='euler-maruyama')
    with pytest.raises(ValueError, match=r"solver_type='heun': expected 'canonical' or 'euler-maruyama'"):
        FlowSDEScheduler(solver_type='heun')
