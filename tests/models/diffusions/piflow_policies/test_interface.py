"""What every policy of the table must do, whatever its kind."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES, Policy, euler_rollout
from lakonlab.ops.random_source import TorchSource
from lakonlab.ops.rollout_schedule import RolloutSchedule, rollout_schedule
from lakonlab.ops.shapes import expand_like
from tests.policy_cases import KINDS, Case, build, cases, distance, ingredients, random_policy

every_kind = pytest.mark.parametrize('kind', KINDS, ids=['-'.join(kind) for kind in KINDS])
quick = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])


def test_every_policy_of_the_table_is_tested():
    assert {name for name, _ in KINDS} == set(POLICY_CLASSES)
    assert {'GMFlow', 'DX', 'Momentum'} <= set(POLICY_CLASSES)


@every_kind
@quick
@given(case=cases())
def test_rollout_equals_the_plain_loop(kind, case):
    policy, x_t = random_policy(kind, case)
    schedule = case.schedule()
    assert distance(policy.rollout(x_t, schedule), euler_rollout(policy, x_t, schedule)) < 1e-12


@every_kind
@quick
@given(case=cases())
def test_velocity_is_finite_from_the_source_down_to_no_noise(kind, case):
    policy, x_t = random_policy(kind, case)
    for sigma_t in (case.sigmas, case.sigmas / 2, 1e-3 * case.sigmas, torch.zeros_like(case.sigmas)):
        for state in (policy.x_t_src, x_t):
            u = policy.pi(state, sigma_t)
            assert u.isfinite().all()
            assert u.shape == case.state_shape
            assert torch.equal(u, policy.pi(state, sigma_t.reshape(-1, *[1] * (state.dim() - 1))))


@every_kind
@quick
@given(case=cases())
def test_rollouts_compose(kind, case):
    """Two schedules that together have the substeps of one lead to the same end."""
    policy, x_t = random_policy(kind, case)
    sigmas, counts = case.schedule()
    cut = (sigmas.shape[1] - 1) // 2
    if cut == 0:
        return
    first = RolloutSchedule(sigmas[:, : cut + 1], counts.clamp(max=cut))
    second = RolloutSchedule(sigmas[:, cut:], (counts - cut).clamp(min=0))
    x_end = policy.rollout(policy.rollout(x_t, first), second)
    assert distance(x_end, policy.rollout(x_t, RolloutSchedule(sigmas, counts))) < 1e-12


@every_kind
@quick
@given(case=cases(), window=st.sampled_from([1, 5, 30]))
def test_averaged_velocity_is_displacement_by_interval(kind, case, window):
    policy, x_t = random_policy(kind, case)
    raw_start, raw_end = case.raw(case.start), case.raw(case.end)
    schedule = rollout_schedule(raw_start, raw_end, window, case.shift)
    average = policy.average_velocity(x_t, raw_start, raw_end, window, case.shift)
    local = policy.pi(x_t, schedule.sigmas[:, 0])
    interval = schedule.sigmas[:, 0] - schedule.sigmas[:, -1]
    displacement = x_t - euler_rollout(policy, x_t, schedule)
    for sample, count in enumerate(schedule.counts.tolist()):
        if count < 2:
            assert distance(average[sample], local[sample]) < 1e-12
        else:
            floor = interval[sample].clamp(min=1e-4)
            assert distance(average[sample] * floor, displacement[sample]) < 1e-12


@every_kind
@quick
@given(case=cases())
def test_samples_do_not_depend_on_their_neighbours(kind, case):
    parts = ingredients(kind, case)
    schedule = case.schedule()
    together = build(kind, case, parts.output, parts.x_src).rollout(parts.x_t, schedule)
    for sample in range(case.state_shape[0]):
        row = slice(sample, sample + 1)
        alone = case._replace(
            state_shape=(1, *case.state_shape[1:]),
            **{name: getattr(case, name)[row] for name in ('sigma_src', 'start', 'end')},
        )
        policy = build(kind, alone, {name: value[row] for name, value in parts.output.items()}, parts.x_src[row])
        assert distance(policy.rollout(parts.x_t[row], alone.schedule()), together[row]) < 1e-12


@every_kind
@few
@given(case=cases(), layout=st.sampled_from(['channels last', 'strided', 'expanded']))
def test_memory_layout_does_not_matter(kind, case, layout):
    def lay_out(tensor):
        if layout == 'channels last':
            return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        if layout == 'strided':
            wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
            wide[..., ::2] = tensor
            return wide[..., ::2]
        return tensor[:1].expand_as(tensor)

    parts = ingredients(kind, case)
    output = {name: lay_out(value) for name, value in parts.output.items()}
    x_src, x_t = lay_out(parts.x_src), lay_out(parts.x_t)
    schedule = case.schedule()
    strided = build(kind, case, output, x_src)
    plain = build(kind, case, {name: value.contiguous() for name, value in output.items()}, x_src.contiguous())
    assert distance(strided.rollout(x_t, schedule), plain.rollout(x_t.contiguous(), schedule)) < 1e-12
    assert distance(strided.pi(x_t, case.sigmas / 2), plain.pi(x_t.contiguous(), case.sigmas / 2)) < 1e-12


def _everything(policy, x_t, case):
    """What can be asked of a policy."""
    return [
        policy.pi(x_t, case.sigmas / 2),
        policy.rollout(x_t, case.schedule()),
        policy.average_velocity(x_t, case.raw(case.start), case.raw(case.end), case.total_substeps, case.shift),
    ]


@every_kind
@quick
@given(case=cases())
def test_a_policy_is_a_value(kind, case):
    """Nothing that is done to it, or to what is made from it, changes it or the tensors it was made from."""
    parts = ingredients(kind, case)
    tensors = [*parts.output.values(), parts.x_src, parts.x_t]
    copies = [tensor.clone() for tensor in tensors]
    policy = build(kind, case, parts.output, parts.x_src)
    before = _everything(policy, parts.x_t, case)
    derived = [policy.detach()]
    if type(policy).temperature is not Policy.temperature:
        derived.append(policy.temperature(0.5))
    if type(policy).dropout is not Policy.dropout and not case.drops:  # else nothing might be left of a pixel
        derived.append(policy.dropout(0.5, TorchSource(torch.Generator().manual_seed(case.seed))))
    for other in derived:
        assert other is not policy
        assert type(other) is type(policy)
        assert all(value.isfinite().all() for value in _everything(other, parts.x_t, case))
    after = _everything(policy, parts.x_t, case)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies))


@every_kind
def test_what_a_kind_cannot_do_is_refused_by_name(kind):
    policy, _ = random_policy(kind, Case((1, 1, 1, 1), 1, (1.0,), (0.0,), (1.0,), 2, 1.0, False, 0))
    if type(policy).temperature is Policy.temperature:
        with pytest.raises(TypeError, match=f'{type(policy).__name__} .*temperature'):
            policy.temperature(0.5)
    if type(policy).dropout is Policy.dropout:
        with pytest.raises(TypeError, match=f'{type(policy).__name__} .*policy_dropout'):
            policy.dropout(0.5, TorchSource())


def _leaves(parts):
    """The tensors that gradients are wanted of."""
    output = {name: value.clone().requires_grad_() for name, value in parts.output.items()}
    x_src, x_t = parts.x_src.clone().requires_grad_(), parts.x_t.clone().requires_grad_()
    return output, x_src, x_t


@every_kind
@quick
@given(case=cases())
def test_values_do_not_depend_on_gradients_and_detaching_ends_them(kind, case):
    output, x_src, x_t = _leaves(ingredients(kind, case))
    policy = build(kind, case, output, x_src)
    live = _everything(policy, x_t, case)
    detached = _everything(policy.detach(), x_t.detach(), case)
    with torch.no_grad():
        silent = _everything(build(kind, case, output, x_src), x_t, case)
    for a, b, c in zip(live, detached, silent):
        assert a.requires_grad
        assert not b.requires_grad
        assert distance(b, a.detach()) < 1e-13
        assert distance(c, a.detach()) < 1e-13


@every_kind
@quick
@given(case=cases())
def test_gradients_equal_those_of_the_plain_loop(kind, case):
    parts, schedule = ingredients(kind, case), case.schedule()
    direction = torch.linspace(-1, 1, parts.x_t.numel(), dtype=torch.float64).reshape(case.state_shape)
    gradients = []
    for follow in (lambda policy, x: policy.rollout(x, schedule), lambda policy, x: euler_rollout(policy, x, schedule)):
        output, x_src, x_t = _leaves(parts)
        x_end = follow(build(kind, case, output, x_src), x_t)
        leaves = [*output.values(), x_src, x_t]
        found = torch.autograd.grad((x_end * direction).sum(), leaves, allow_unused=True)
        gradients.append([torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)])
    for own, loop in zip(*gradients):
        assert distance(own, loop) < 1e-11


@every_kind
@pytest.mark.parametrize('asked', ['pi', 'rollout', 'average_velocity'])
@pytest.mark.parametrize('num_components', [1, 3])
def test_gradcheck(kind, asked, num_components):
    case = Case((2, 2, 1, 2), num_components, (1.0, 0.6), (0.0, 0.1), (1.0, 0.5), 6, 3.2, False, 0)
    output, x_src, x_t = _leaves(ingredients(kind, case))
    index = ['pi', 'rollout', 'average_velocity'].index(asked)

    def function(x_src, x_t, *values):
        return _everything(build(kind, case, dict(zip(output, values)), x_src), x_t, case)[index]

    assert torch.autograd.gradcheck(function, (x_src, x_t, *output.values()), atol=1e-6, rtol=1e-4)


def _rounded_to(dtype, parts, state_dtype):
    """Ingredients that are exact in ``dtype``, in the dtypes asked for, and the same numbers in float64."""
    narrow = [value.to(dtype) for value in (*parts.output.values(), parts.x_src, parts.x_t)]
    *output, x_src, x_t = narrow
    found = dict(zip(parts.output, output)), x_src.to(state_dtype), x_t.to(state_dtype)
    exact = dict(zip(parts.output, [value.double() for value in output])), x_src.double(), x_t.double()
    return found, exact


@every_kind
@pytest.mark.parametrize(
    ('output_dtype', 'state_dtype', 'tolerance'),
    [
        (torch.float32, torch.float32, 2e-5),
        (torch.bfloat16, torch.float32, 2e-5),
        (torch.float16, torch.float32, 2e-5),
        (torch.bfloat16, torch.bfloat16, 0.1),
        (torch.float16, torch.float16, 0.02),
    ],
    ids=str,
)
@few
@example(case=Case((3, 2, 2, 2), 1, (0.01, 1.0, 1.0), (0.0,) * 3, (0.0,) * 3, 1, 1.0, False, 30382))  # factor of 68111
@given(case=cases())
def test_narrow_precision_is_close_to_double(kind, output_dtype, state_dtype, tolerance, case):
    """A half-precision output costs nothing where the state is float32; half-precision states only their own digits."""
    (output, x_src, x_t), (exact_output, exact_x_src, exact_x_t) = _rounded_to(
        output_dtype, ingredients(kind, case), state_dtype
    )
    schedule = case.schedule()
    policy, exact = build(kind, case, output, x_src), build(kind, case, exact_output, exact_x_src)
    x_end = policy.rollout(x_t, schedule)
    assert x_end.dtype == state_dtype
    assert distance(x_end, exact.rollout(exact_x_t, schedule)) < tolerance
    u, expected = policy.pi(x_src, case.sigmas), exact.pi(exact_x_src, case.sigmas)
    assert u.dtype == state_dtype
    # what enters the state is sigma * u; where u itself is a difference divided by sigma, so is its rounding
    assert distance(u * expand_like(case.sigmas, u), expected * expand_like(case.sigmas, expected)) < tolerance
