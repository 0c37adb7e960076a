"""Every backend computes what the plain loop computes, values and gradients, whatever the lengths and shapes."""

import logging
import math
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.ops.mixture import posterior_coefficients, posterior_velocity
from lakonlab.ops.mixture_rollout import (
    RolloutInputs,
    backend_module,
    mixture_rollout,
    native_backend,
    substep_coefficients,
    torch_backend,
)

CPU = torch.device('cpu')
HAS_COMPILER = any(map(shutil.which, ('c++', 'g++', 'clang++')))
BACKENDS = ['torch', 'native'] if HAS_COMPILER else ['torch']
SHAPES = [(3, 5, 3, 37, 9), (2, 8, 16, 50, 12), (1, 1, 1, 1, 1), (2, 32, 4, 70, 6), (4, 3, 5, 8, 4)]


class Problem:
    """A random mixture, a state and substeps of different number for each sample, in double precision."""

    def __init__(self, batch, components, channels, pixels, substeps, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.sigma_src = 0.5 + 0.5 * torch.rand(batch, generator=generator, dtype=torch.float64)
        self.sigmas = self.sigma_src[:, None] * torch.linspace(1, 0, substeps + 1, dtype=torch.float64)
        self.lengths = torch.randint(1, substeps + 1, (batch,), generator=generator)
        self.leaves = {
            'means': normal(batch, components, channels, pixels),
            'logweights': normal(batch, components, 1, pixels).log_softmax(dim=1),
            'x_src': normal(batch, channels, pixels),
            'offset': 0.1 * normal(batch, channels, pixels),
            'variance': (2 * (0.3 * normal(batch) - 1.5)).exp(),
        }
        self.direction = normal(batch, channels, pixels)

    def leaves_as(self, dtype, requires_grad=True):
        wide = {'variance': torch.float64}
        return {key: value.to(wide.get(key, dtype)).requires_grad_(requires_grad) for key, value in self.leaves.items()}

    def rollout(self, backend, leaves):
        coefficients = substep_coefficients(self.sigmas, self.sigma_src, leaves['variance'], eps=1e-6)
        images = (leaves[key] for key in ('means', 'logweights', 'x_src', 'offset'))
        return mixture_rollout(*images, coefficients, self.lengths, backend)

    def plain_loop(self, leaves):
        means, logweights, x_src, offset, variance = leaves.values()
        norms = means.square().sum(dim=2, keepdim=True)

        def images(values):
            return values.reshape(-1, 1, 1)

        for i in range(self.sigmas.shape[1] - 1):
            sigma_t = self.sigmas[:, i].clamp(min=1e-6)
            coefficients = posterior_coefficients(images(self.sigma_src), images(sigma_t), images(variance))
            coefficients = type(coefficients)(*(c.to(means.dtype) for c in coefficients))
            u = posterior_velocity(means, logweights, norms, x_src, offset, coefficients)
            step = (self.sigmas[:, i + 1] - self.sigmas[:, i]) * (self.lengths > i)
            offset = offset + u * images(step).to(means.dtype)
        return offset

    def gradients(self, end, leaves):
        return torch.autograd.grad((end * self.direction.to(end.dtype)).sum() + end.square().mean(), [*leaves.values()])


def relative_error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_the_plain_loop_in_double_precision(backend, shape):
    problem = Problem(*shape)
    leaves, plain_leaves = problem.leaves_as(torch.float64), problem.leaves_as(torch.float64)
    end, expected = problem.rollout(backend, leaves), problem.plain_loop(plain_leaves)
    assert relative_error(end, expected) < 1e-12
    for actual, wanted in zip(problem.gradients(end, leaves), problem.gradients(expected, plain_leaves)):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize('backend', BACKENDS)
def test_single_precision_is_as_accurate_as_the_plain_loop(backend):
    """Over many problems and 64 substeps, the error against double precision is at most twice the plain loop's."""
    ours, plain = [], []
    for seed in range(6):
        problem = Problem(2, 8, 4, 64, 64, seed=seed)
        truth_leaves = problem.leaves_as(torch.float64)
        truth = problem.plain_loop(truth_leaves)
        truths = [truth, *problem.gradients(truth, truth_leaves)]
        for errors, run in ((ours, partial(problem.rollout, backend)), (plain, problem.plain_loop)):
            leaves = problem.leaves_as(torch.float32)
            end = run(leaves)
            results = [end, *problem.gradients(end, leaves)]
            errors.append([float((a.detach().double() - b.detach()).square().mean()) for a, b in zip(results, truths)])
    ours, plain = (torch.tensor(errors).mean(dim=0).sqrt() for errors in (ours, plain))
    assert (ours <= 2 * plain).all(), (ours / plain).tolist()


@pytest.mark.parametrize('backend', BACKENDS)
def test_gradcheck(backend):
    problem = Problem(2, 3, 2, 3, 4)

    def run(*values):
        return problem.rollout(backend, dict(zip(problem.leaves, values)))

    assert torch.autograd.gradcheck(run, tuple(problem.leaves_as(torch.float64).values()))


@pytest.mark.parametrize('backend', BACKENDS)
def test_dropped_components_have_no_say(backend):
    problem = Problem(2, 4, 3, 20, 6)
    problem.leaves['logweights'][0, 1] = -math.inf
    leaves = problem.leaves_as(torch.float32)
    end = problem.rollout(backend, leaves)
    gradients = problem.gradients(end, leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][0, 1] == 0).all()
    assert (gradients[1][0, 1] == 0).all()
    changed = {**leaves, 'means': leaves['means'].detach().clone()}
    changed['means'][0, 1] += 1
    assert torch.equal(problem.rollout(backend, changed), end)


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_nan_is_passed_on(backend):
    problem = Problem(1, 4, 2, 9, 3)
    problem.leaves['means'][0, 2, 1, 4] = math.nan
    assert problem.rollout(backend, problem.leaves_as(torch.float32, requires_grad=False))[0, :, 4].isnan().any()


@pytest.mark.parametrize('backend', BACKENDS)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 40), st.integers(1, 7)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    video=st.booleans(),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_any_shape_layout_and_dtype(backend, shape, dtype, video, strided):
    problem = Problem(*shape, seed=sum(shape))
    leaves = problem.leaves_as(dtype, requires_grad=False)
    expected = problem.plain_loop({key: value.double() for key, value in leaves.items()})
    images = {key: value for key, value in leaves.items() if key != 'variance'}
    for key, value in images.items():
        size = (1, value.shape[-1], 1) if video else (value.shape[-1], 1)
        value = value.reshape(*value.shape[:-1], *size)
        images[key] = value.transpose(0, -2).contiguous().transpose(0, -2) if strided else value
    coefficients = substep_coefficients(problem.sigmas, problem.sigma_src, leaves['variance'], eps=1e-6)
    end = mixture_rollout(*images.values(), coefficients, problem.lengths, backend)
    assert end.dtype == dtype
    assert end.shape == images['x_src'].shape
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(end.double().reshape(expected.shape), expected, rtol=0, atol=tolerance * scale)


def test_accelerators_take_all_samples_in_one_tile(monkeypatch):
    """What runs elsewhere than on the CPU, run on the CPU: the longest sample first, finished ones dropped."""
    problem = Problem(5, 6, 3, 21, 8)
    inputs = _inputs(problem)
    lengths = tuple(problem.lengths.tolist())
    order = sorted(range(5), key=lambda row: -lengths[row])
    assert order != list(range(5))
    rows = torch.tensor(order)
    tile = RolloutInputs(*(tensor[rows] for tensor in inputs))
    tile_lengths = [lengths[row] for row in order]
    expected = torch_backend.forward(inputs, lengths)[rows]
    for advance in (torch_backend._advance, torch_backend._advance_gram):
        torch.testing.assert_close(advance(tile, tile_lengths), expected, rtol=1e-12, atol=1e-12)
    grads = torch_backend.backward(inputs, lengths, problem.direction)
    for whole, part in zip(grads, torch_backend._gradient(tile, tile_lengths, problem.direction[rows])):
        torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=1e-12)


def test_torch_backend_compiles_into_one_graph():
    problem = Problem(2, 3, 2, 5, 3)
    inputs, lengths = _inputs(problem), tuple(problem.lengths.tolist())
    compiled = torch.compile(torch_backend.forward, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(inputs, lengths), torch_backend.forward(inputs, lengths))


def _inputs(problem: Problem) -> RolloutInputs:
    leaves = problem.leaves
    coefficients = substep_coefficients(problem.sigmas, problem.sigma_src, leaves['variance'], eps=1e-6)
    return RolloutInputs(
        leaves['means'], leaves['logweights'].squeeze(2), leaves['x_src'], leaves['offset'], coefficients
    )


@pytest.mark.skipif(not HAS_COMPILER, reason='there is no C++ compiler')
def test_where_there_is_a_compiler_the_native_backend_runs():
    assert native_backend.unavailable(CPU) is None
    assert backend_module('auto', CPU) is native_backend


@pytest.mark.skipif(not HAS_COMPILER, reason='there is no C++ compiler')
def test_result_does_not_depend_on_the_number_of_threads():
    problem = Problem(3, 6, 4, 500, 5)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = problem.leaves_as(torch.float32)
            end = problem.rollout('native', leaves)
            results.append([end, *problem.gradients(end, leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


NOTICE = """
import logging, torch
logging.basicConfig()
from lakonlab.ops.mixture_rollout import backend_module
for _ in range(2):
    print(backend_module('auto', torch.device('cpu')).__name__)
try:
    backend_module('native', torch.device('cpu'))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize('compiler', ['/nonexistent/c++', 'false'])
def test_without_a_working_compiler_a_notice_and_plain_torch(tmp_path, compiler):
    environment = {**os.environ, 'CXX': compiler, 'LAKONLAB_CACHE_DIR': str(tmp_path)}
    result = subprocess.run([sys.executable, '-c', NOTICE], env=environment, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert [line.rsplit('.', 1)[-1] for line in lines[:2]] == ['torch_backend', 'torch_backend'], result.stderr
    assert "rollout_backend='native' is not available on cpu" in lines[2]
    assert result.stderr.count('run in plain torch') == 1
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


@pytest.mark.skipif(not HAS_COMPILER, reason='there is no C++ compiler')
def test_a_fresh_cache_is_filled_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path))
    caplog.set_level(logging.INFO)
    first = native_backend.library_path()
    assert native_backend.library_path() == first
    assert [path for path in tmp_path.rglob('*') if path.is_file()] == [first]
    assert caplog.text.count('Compiling the rollout kernel') == 1


def test_unknown_backend_is_refused():
    problem = Problem(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"rollout_backend='fortran'.*auto.*torch.*native.*triton"):
        problem.rollout('fortran', problem.leaves_as(torch.float64))
