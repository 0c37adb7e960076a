import pytest
import torch

from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES
from lakonlab.ops.random_source import SeededSource
from lakonlab.registry import MODULES

SHAPE = (3, 2, 4, 5)
ONES = torch.ones(3)
GENERATOR = torch.Generator().manual_seed(0)
NOISE, VELOCITY = (torch.randn(SHAPE, generator=GENERATOR) for _ in range(2))


def network(policy_type, shape=SHAPE, num_components=4):
    return MODULES.build(
        dict(type='StaticPolicyNetwork', policy_type=policy_type, state_shape=shape, num_components=num_components)
    )


@pytest.mark.parametrize('policy_type', POLICY_CLASSES)
def test_every_policy_begins_at_the_velocity_it_is_given(policy_type):
    net = network(policy_type)
    net.start_from(VELOCITY)
    policy = POLICY_CLASSES[policy_type](net(NOISE, ONES, class_labels=torch.tensor([1, 2, 3])), NOISE, ONES)
    assert torch.allclose(policy.pi(NOISE, ONES), VELOCITY, atol=1e-5)


@pytest.mark.parametrize('policy_type', POLICY_CLASSES)
def test_what_it_is_given_does_not_matter(policy_type):
    net = network(policy_type)
    net.start_from(VELOCITY, spread=0.5)
    outputs = [net(NOISE, ONES), net(10 * NOISE, 0.2 * ONES, class_labels=torch.arange(3))]
    first, second = (output if isinstance(output, dict) else {'output': output} for output in outputs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('policy_type', POLICY_CLASSES)
def test_one_policy_for_many_rows_learns_from_all(policy_type):
    net = network(policy_type, (1, *SHAPE[1:]))
    net.start_from(VELOCITY[:1], spread=0.5, source=SeededSource(0))
    policy = POLICY_CLASSES[policy_type](net(NOISE, ONES), NOISE, ONES)
    policy.pi(NOISE, ONES).square().sum().backward()
    # the same policy three times is three times one policy
    each = []
    for row in range(3):
        copy = network(policy_type, (1, *SHAPE[1:]))
        copy.load_state_dict(net.state_dict())
        x = NOISE[row : row + 1]
        POLICY_CLASSES[policy_type](copy(x, ONES[:1]), x, ONES[:1]).pi(x, ONES[:1]).square().sum().backward()
        each.append({name: p.grad for name, p in copy.named_parameters()})
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, sum(grads[name] for grads in each), atol=1e-4), name


def test_components_differ_by_the_spread():
    net = network('GMFlow', (1, 4, 32, 32), 32)
    velocity = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    net.start_from(velocity, spread=0.5, source=SeededSource(3))
    offsets = net.values['means'] - velocity.unsqueeze(1)
    assert offsets.std().item() == pytest.approx(0.5, abs=0.01)
    assert offsets.mean().item() == pytest.approx(0, abs=0.01)
    assert net.values['logstds'].exp().item() == pytest.approx(0.05)
    assert not net.values['logweights'].any()


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: network('Spline'), "policy_type='Spline': expected one of GMFlow, DX"),
        (lambda: network('DX', num_components=0), 'num_components=0'),
        (lambda: network('DX')(NOISE[:2], ONES[:2]), r'\(2, 2, 4, 5\), but the 3 static policies'),
        (lambda: network('DX')(NOISE[..., :4], ONES), r'\(3, 2, 4, 4\)'),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
