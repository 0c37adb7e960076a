"""Random policies of every registered kind, for tests of what all policies must do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES, Policy
from lakonlab.ops.rollout_schedule import RolloutSchedule, rollout_schedule
from lakonlab.ops.time_shift import unwarp

KINDS = [(name, variant) for name, policy_class in POLICY_CLASSES.items() for variant in policy_class.variants]
"""Name and variant of every policy of the table."""


class Case(NamedTuple):
    """Where a policy is tested: sizes, times and the seed of its numbers."""

    state_shape: tuple[int, ...]
    num_components: int
    sigma_src: tuple[float, ...]
    start: tuple[float, ...]
    """Start of the rollout as a fraction of the way from the source to noise level 0."""
    end: tuple[float, ...]
    total_substeps: int
    shift: float
    drops: bool
    """Whether some log-weights are ``-inf``."""
    seed: int

    @property
    def sigmas(self) -> Tensor:
        return torch.tensor(self.sigma_src, dtype=torch.float64)

    def raw(self, fraction: tuple[float, ...]) -> Tensor:
        """Schedule times at fractions of the way from the source to 0."""
        return unwarp(self.sigmas, self.shift) * (1 - torch.tensor(fraction, dtype=torch.float64))

    def schedule(self) -> RolloutSchedule:
        return rollout_schedule(self.raw(self.start), self.raw(self.end), self.total_substeps, self.shift)


@st.composite
def cases(draw, max_substeps: int = 12) -> Case:
    """Cases of 4-D and 5-D states down to single pixels, samples and components, with noise levels from 1 to 0."""
    batch_size = draw(st.integers(1, 3))
    size = draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))

    def per_sample(values):
        return draw(st.tuples(*[values] * batch_size))

    start = per_sample(st.sampled_from([0.0, 0.0, 0.25, 0.9, 1.0]))
    share = per_sample(st.sampled_from([0.0, 0.01, 0.4, 1.0, 1.0]))
    return Case(
        state_shape=(batch_size, draw(st.integers(1, 3)), *size),
        num_components=draw(st.sampled_from([1, 1, 2, 3, 5])),
        sigma_src=per_sample(st.sampled_from([1.0, 1.0, 0.7, 0.3, 0.01])),
        start=start,
        end=tuple(a + (1 - a) * b for a, b in zip(start, share)),
        total_substeps=draw(st.integers(1, max_substeps)),
        shift=draw(st.sampled_from([1.0, 3.2])),
        drops=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


class Ingredients(NamedTuple):
    """What a policy is built from and followed with, in float64."""

    output: dict[str, Tensor]
    """Tensors of the network output; one called ``output`` where it is no dict."""
    x_src: Tensor
    x_t: Tensor
    """A state that is not the source's."""


def ingredients(kind: tuple[str, str], case: Case) -> Ingredients:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = POLICY_CLASSES[kind[0]].output_shapes(case.state_shape, case.num_components)
    output = {
        name: normal(shape) for name, shape in (shapes if isinstance(shapes, dict) else {'output': shapes}).items()
    }
    if case.drops and 'logweights' in output:
        dropped = torch.rand(output['logweights'].shape, generator=generator) < 0.4
        dropped[:, 0] = False
        output['logweights'].masked_fill_(dropped, -torch.inf)
    return Ingredients(output, normal(case.state_shape), normal(case.state_shape))


def build(kind: tuple[str, str], case: Case, output: dict[str, Tensor], x_src: Tensor) -> Policy:
    name, variant = kind
    policy_class = POLICY_CLASSES[name]
    is_dict = isinstance(policy_class.output_shapes(case.state_shape, case.num_components), dict)
    kwargs = policy_class.variants[variant]
    return policy_class(output if is_dict else output['output'], x_src, case.sigmas, **kwargs)


def random_policy(kind: tuple[str, str], case: Case) -> tuple[Policy, Tensor]:
    """A policy in float64 and a state to evaluate it at."""
    parts = ingredients(kind, case)
    return build(kind, case, parts.output, parts.x_src), parts.x_t


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value, at least 1."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1))
