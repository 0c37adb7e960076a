"""What every registered scheduler does, whatever it is."""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.config.signature import arguments_of
from lakonlab.models.diffusions.schedulers import SCHEDULER_MODULES, scheduler_class
from lakonlab.models.diffusions.schedulers.base import VelocityScheduler
from lakonlab.models.diffusions.schedulers.flow_adapter import BASE_SOLVERS
from lakonlab.ops.random_source import SeededSource

# Each registered scheduler with its defaults, and further options of some.
VARIANTS = [(name, {}) for name in SCHEDULER_MODULES] + [
    ('FlowSDE', {'h': 'inf'}),
    ('FlowSDE', {'h': '0.5 + sqrt(sigma)'}),
    ('FlowSDE', {'h': 0.5, 'solver_type': 'euler-maruyama'}),
    ('FlowMapSDE', {'h': 1.0}),
    *[('FlowAdapter', {'base_scheduler': base}) for base in BASE_SOLVERS],
    (
        'FlowAdapter',
        {'base_scheduler': 'DPMSolverMultistep', 'base_scheduler_kwargs': {'algorithm_type': 'sde-dpmsolver++'}},
    ),
]
each_variant = pytest.mark.parametrize(('name', 'options'), VARIANTS, ids=lambda value: str(value).strip('{}') or '-')
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # numpy warns about diffusers' solvers


def build(name, options, **kwargs):
    return scheduler_class(name)(**options, **kwargs)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sample(scheduler, x, velocity, randomness=lambda i, x: {}):
    """Follow a velocity field, solving a segment of a flow map by many Euler steps."""
    unit = scheduler.config.num_train_timesteps
    for i, t in enumerate(scheduler.timesteps):
        output = velocity(x, float(t) / unit)
        if not isinstance(scheduler, VelocityScheduler):
            grid = torch.linspace(scheduler.levels[i], scheduler.destinations[i], 51).tolist()
            output = x
            for sigma, sigma_to in pairwise(grid):
                output = output + velocity(output, sigma) * (sigma_to - sigma)
        x = scheduler.step(output, t, x, return_dict=False, **randomness(i, x))[0]
    return x


def towards(target):
    """Velocity when all data are the same: from any state away from ``target``."""
    return lambda x, sigma: (x - target) / sigma


@each_variant
def test_config_survives_a_round_trip(name, options, tmp_path):
    changed = {'num_train_timesteps': 1, 'shift': 2.5, 'max_raw_t': 0.9, 'use_fp64': True}
    scheduler = build(name, options, **changed)
    scheduler.save_pretrained(tmp_path)
    for again in (type(scheduler).from_config(scheduler.config), type(scheduler).from_pretrained(tmp_path)):
        assert {k: v for k, v in again.config.items() if k[0] != '_'} == {
            k: v for k, v in scheduler.config.items() if k[0] != '_'
        }
        assert all(again.config[key] == value for key, value in {**options, **changed}.items())
        for one in (scheduler, again):
            one.set_timesteps(5)
        assert again.levels == scheduler.levels


@each_variant
def test_arguments_are_known_to_the_config_check(name, options):
    arguments = arguments_of(scheduler_class(name), positional=1)
    assert not arguments.is_open
    assert {'shift', 'use_dynamic_shifting', 'max_raw_t', *options} <= arguments.names
    assert not {'num_train_timesteps', 'kwargs'} & arguments.names


@each_variant
def test_unknown_arguments_are_refused(name, options):
    with pytest.raises(TypeError, match='unexpected keyword argument'):
        build(name, options, shfit=2.0)


@each_variant
@settings(deadline=None, max_examples=10)
@given(
    steps=st.integers(1, 12),
    shift=st.floats(0.2, 8),
    low=st.floats(0, 0.4),
    high=st.floats(0.5, 1),
    seq_len=st.none() | st.integers(16, 65536),
    kind=st.sampled_from(['exp', 'sqrt']),
    terminal=st.none() | st.floats(0.01, 0.05),
)
def test_grids_decrease_to_the_end(name, options, steps, shift, low, high, seq_len, kind, terminal):
    if issubclass(scheduler_class(name), VelocityScheduler):
        options = {**options, 'terminal_sigma': terminal}
    scheduler = build(
        name,
        options,
        shift=shift,
        min_raw_t=low,
        max_raw_t=high,
        use_dynamic_shifting=seq_len is not None,
        dynamic_shifting_type=kind,
    )
    scheduler.set_timesteps(steps, seq_len=seq_len)
    distinct = list(dict.fromkeys(scheduler.levels))
    assert len(distinct) == steps + 1
    assert 0 < distinct[0] <= 1
    assert 0 <= distinct[-1] <= 1e-4
    assert all(a > b for a, b in pairwise(distinct))
    if options.get('terminal_sigma') and steps > 1:
        assert distinct[-2] == pytest.approx(terminal)
    assert len(scheduler.timesteps) == type(scheduler).num_function_evaluations(steps)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


@each_variant
@pytest.mark.parametrize('num_train_timesteps', [1, 1000])
def test_a_single_data_point_is_reached(name, options, num_train_timesteps):
    scheduler = build(name, options, num_train_timesteps=num_train_timesteps, shift=2.0)
    approximate = 'euler-maruyama' in options.values()
    scheduler.set_timesteps(100 if approximate else 6)
    target = noise(2, 3, 4, seed=1)
    generator = torch.Generator().manual_seed(0)
    x_0 = sample(scheduler, noise(2, 3, 4), towards(target), lambda i, x: {'generator': generator})
    torch.testing.assert_close(x_0, target, atol=0.05 if approximate else 1e-3, rtol=0)


@each_variant
def test_a_constant_velocity_is_followed_exactly(name, options):
    scheduler = build(name, options, max_raw_t=0.9)
    scheduler.set_timesteps(6)
    x, u = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    if any(scheduler.random_arguments(i, SeededSource(0), x) for i in range(6)):
        pytest.skip('a stochastic solver leaves the straight line')
    x_0 = sample(scheduler, x, lambda x, sigma: u)
    torch.testing.assert_close(x_0, x - 0.9 * u, atol=1e-5 + 4 * scheduler.levels[-1], rtol=1e-5)


@each_variant
def test_sampling_is_reproducible_and_leaves_the_global_generator_alone(name, options):
    def run(randomness):
        scheduler = build(name, options)
        scheduler.set_timesteps(5)
        return sample(scheduler, noise(3, 2, 4), towards(noise(3, 2, 4, seed=1) * 0.5), randomness(scheduler))

    def by_generator(seed):
        generator = torch.Generator().manual_seed(seed)
        return lambda scheduler: lambda i, x: {'generator': generator}

    def by_source(seed, rows=3):
        source = SeededSource(seed)
        return lambda scheduler: lambda i, x: scheduler.random_arguments(i, source, x)

    before = torch.get_rng_state()
    for randomness in (by_generator, by_source):
        torch.testing.assert_close(run(randomness(7)), run(randomness(7)), rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


@each_variant
def test_a_sample_does_not_depend_on_its_neighbours(name, options):
    def run(x, first_row):
        scheduler, source = build(name, options), SeededSource(3, first_row=first_row)
        scheduler.set_timesteps(4)
        velocity = lambda x, sigma: torch.sin(x + sigma)  # noqa: E731
        return sample(scheduler, x, velocity, lambda i, x: scheduler.random_arguments(i, source, x))

    x = noise(4, 2, 3)
    torch.testing.assert_close(run(x, 0)[2:], run(x[2:], 2))


@each_variant
def test_half_precision_keeps_its_dtype_and_loses_no_more_than_rounding(name, options):
    def run(dtype):
        scheduler = build(name, options)
        scheduler.set_timesteps(3)
        output = noise(2, 3, 4, seed=1).bfloat16()
        generator = torch.Generator().manual_seed(0)
        x = noise(2, 3, 4).bfloat16().to(dtype)
        return scheduler.step(output.to(dtype), scheduler.timesteps[0], x, generator=generator).prev_sample

    half, single = run(torch.bfloat16), run(torch.float32)
    assert half.dtype == torch.bfloat16
    assert single.dtype == torch.float32
    if not any(word in str(options) for word in ('SASolver', 'Ancestral', 'sde-')):  # they draw in the given dtype
        torch.testing.assert_close(half.float(), single, atol=1e-2, rtol=1e-2)


@each_variant
def test_in_the_place_of_the_scheduler_of_a_diffusers_pipeline(name, options):
    published = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler = scheduler_class(name).from_config(published.config, shift=3.2, use_dynamic_shifting=False, **options)
    assert scheduler.config.shift == 3.2
    for one in (scheduler, scheduler_class(name).from_config(published.config, **options)):
        timesteps, n = retrieve_timesteps(one, 4, 'cpu', sigmas=np.linspace(1.0, 0.25, 4), mu=0.8)
        assert n == len(timesteps) == type(one).num_function_evaluations(4)
        assert max(len(timesteps) - n * one.order, 0) == 0
        one.set_begin_index(0)
        latents = noise(1, 6, 4) * one.init_noise_sigma
        generator = torch.Generator().manual_seed(0)
        for t in timesteps:
            latents = one.scale_model_input(latents, t)
            latents = one.step(torch.zeros_like(latents), t, latents, generator=generator, return_dict=False)[0]
        assert latents.isfinite().all()
        assert one.step_index == len(timesteps)
    published.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), mu=0.8)
    torch.testing.assert_close(
        torch.tensor(list(dict.fromkeys(one.sigmas.tolist()))), published.sigmas, atol=1e-4, rtol=0
    )


@each_variant
def test_beginning_in_the_middle(name, options):
    scheduler = build(name, options)
    scheduler.set_timesteps(6)
    begin = 2 * scheduler.order
    x_0, t = noise(2, 3, 4, seed=1), scheduler.timesteps[begin]
    x = scheduler.scale_noise(x_0, t, noise(2, 3, 4))
    generator = torch.Generator().manual_seed(0)
    if isinstance(scheduler, VelocityScheduler) and 'euler-maruyama' not in options.values():
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(towards(x_0)(x, float(t) / 1000), t, x, generator=generator).prev_sample
        torch.testing.assert_close(x, x_0, atol=1e-3, rtol=0)
    else:
        scheduler.step(x, t, x, generator=generator)
        assert scheduler.step_index == begin + 1


@each_variant
def test_one_step_too_many_is_refused(name, options):
    scheduler = build(name, options)
    scheduler.set_timesteps(1)
    x, t = noise(1, 2, 2), scheduler.timesteps[0]
    generator = torch.Generator().manual_seed(0)
    scheduler.step(x, t, x, generator=generator)
    with pytest.raises(ValueError, match='all 1 steps were taken'):
        scheduler.step(x, t, x, generator=generator)


@each_variant
def test_nothing_is_drawn_where_no_noise_is_needed(name, options):
    scheduler = build(name, options)
    scheduler.set_timesteps(3)
    x = noise(1, 2, 2)
    with mock.patch('torch.randn', side_effect=AssertionError('drawn')):
        for i in range(len(scheduler.timesteps)):
            if not scheduler.random_arguments(i, SeededSource(0), x):
                scheduler.set_begin_index(i)
                if name != 'FlowHeunODE' or i % 2 == 0:
                    scheduler.step(x, scheduler.timesteps[i], x)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'shift': 0}, r'shift=0: expected a positive'),
        ({'num_train_timesteps': 0}, r'num_train_timesteps=0: expected a positive'),
        ({'dynamic_shifting_type': 'linear'}, r"dynamic_shifting_type='linear': expected 'exp' or 'sqrt'"),
        ({'min_raw_t': 0.5, 'max_raw_t': 0.5}, r'expected 0 <= min_raw_t < max_raw_t <= 1'),
    ],
)
@pytest.mark.parametrize('name', SCHEDULER_MODULES)
def test_values_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, options)


@each_variant
def test_rounding_of_the_shift_does_not_exceed_pure_noise(name, options):
    scheduler = build(name, options, shift=0.39999999999999997)
    scheduler.set_timesteps(2)
    assert scheduler.levels[0] == 1
    x, generator = noise(1, 2, 2), torch.Generator().manual_seed(0)
    assert scheduler.step(x, scheduler.timesteps[0], x, generator=generator).prev_sample.isfinite().all()


@pytest.mark.parametrize('name', SCHEDULER_MODULES)
def test_bad_grids_are_refused(name):
    scheduler = build(name, {})
    for kwargs in ({}, {'num_inference_steps': 0}):
        with pytest.raises(ValueError, match=r'num_inference_steps=\S+: expected a positive number, or sigmas'):
            scheduler.set_timesteps(**kwargs)
    with pytest.raises(ValueError, match='2 sigmas were given for num_inference_steps=3'):
        scheduler.set_timesteps(3, sigmas=[1.0, 0.5])
    for sigmas in ([0.5, 1.0], [1.2, 0.5], [1.0, 0.0], []):
        with pytest.raises(ValueError, match='expected decreasing schedule times'):
            scheduler.set_timesteps(sigmas=sigmas)
    dynamic = build(name, {'use_dynamic_shifting': True})
    with pytest.raises(ValueError, match='needs seq_len'):
        dynamic.set_timesteps(3)
