"""How far rollouts in float32 and bfloat16 are from float64, and the velocity of a mixture at low noise.

Prints the tables of docs/numerics.md as Markdown. Errors are the largest difference to the result in float64 from the
very same (rounded) inputs, relative to the largest value of that result; the worst of several random cases.

    python benchmarks/rollout_accuracy.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
from published_rollout import PublishedGrid, PublishedMixture
from published_rollout import rollout as published_rollout
from torch import Tensor

from lakonlab.models.diffusions.piflow_policies import POLICY_CLASSES, GMFlowPolicy
from lakonlab.ops.rollout_schedule import rollout_schedule

SUBSTEPS = (8, 16, 32, 64, 128)
PUBLISHED = {'GMFlow': PublishedMixture, 'DX': PublishedGrid}
LOGSTDS = (1, 0, -1, -2, -3, -4, -5)
LOW_NOISE = 1e-3
STATE = (2, 4, 8, 8)
NUM_COMPONENTS = 8


def normal(shape: Iterable[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def random_output(name: str, generator: torch.Generator, logstd: float = -1.0) -> dict[str, Tensor]:
    """A network output as numbers of float64; one tensor called ``output`` where the policy takes no dict."""
    shapes = POLICY_CLASSES[name].output_shapes(STATE, NUM_COMPONENTS)
    output = {
        key: normal(shape, generator)
        for key, shape in (shapes if isinstance(shapes, dict) else {'output': shapes}).items()
    }
    if 'logstds' in output:
        output['logstds'].fill_(logstd)
    return output


def converted(output: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor] | Tensor:
    output = {key: value.to(dtype) for key, value in output.items()}
    return output.get('output', output)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def worst(error_of: Callable[[torch.Generator], float], num_cases: int) -> float:
    return max(error_of(torch.Generator().manual_seed(seed)) for seed in range(num_cases))


def rollout_error(name: str, num_substeps: int, output_dtype, state_dtype, published: bool) -> Callable:
    """Error of a rollout over the whole schedule, from pure noise to clean latents."""
    ones, zeros = torch.ones(STATE[0], dtype=torch.float64), torch.zeros(STATE[0], dtype=torch.float64)
    schedule = rollout_schedule(ones, zeros, num_substeps, 1.0)
    make = POLICY_CLASSES[name]

    def error_of(generator: torch.Generator) -> float:
        output = {key: value.to(output_dtype).double() for key, value in random_output(name, generator).items()}
        noise = normal(STATE, generator).to(state_dtype).double()
        exact = make(converted(output, torch.float64), noise, ones).rollout(noise, schedule)
        narrow, x_src = converted(output, output_dtype), noise.to(state_dtype)
        if published:
            policy = PUBLISHED[name](narrow, x_src, ones.to(state_dtype))
            return relative_error(published_rollout(policy, x_src, 1.0, 0.0, schedule.counts, False), exact)
        return relative_error(make(narrow, x_src, ones).rollout(x_src, schedule), exact)

    return error_of


def velocity_error(logstd: float, published: bool) -> Callable:
    """Error of a mixture's velocity in float32 at noise level 1e-3, on the way to the clean latents of a component."""
    time = torch.full((STATE[0],), LOW_NOISE)

    def error_of(generator: torch.Generator) -> float:
        sigma_src = float(torch.empty(()).uniform_(0.1, 1, generator=generator))
        source = torch.full((STATE[0],), sigma_src)
        output = {key: value.float() for key, value in random_output('GMFlow', generator, logstd).items()}
        x_src = normal(STATE, generator).float()
        x_0 = x_src - sigma_src * output['means'][:, 0]
        x_t = x_0 + LOW_NOISE / sigma_src * (x_src - x_0)
        exact = GMFlowPolicy(converted(output, torch.float64), x_src.double(), source).pi(x_t.double(), time)
        if published:
            return relative_error(
                PublishedMixture(output, x_src, source).velocity(x_t, time.reshape(-1, 1, 1, 1)), exact
            )
        return relative_error(GMFlowPolicy(output, x_src, source).pi(x_t, time), exact)

    return error_of


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def rollout_rows(num_cases: int) -> Iterable[list[str]]:
    narrow, single = torch.bfloat16, torch.float32
    ways = [
        (name, description, *dtypes)
        for name in POLICY_CLASSES
        for description, dtypes in {
            'float32': (single, single, False),
            'float32, published loop': (single, single, True),
            'bfloat16 output, float32 state': (narrow, single, False),
            'bfloat16 output and state': (narrow, narrow, False),
        }.items()
        if not (dtypes[2] and name not in PUBLISHED)
    ]
    for name, description, *settings in ways:
        errors = [worst(rollout_error(name, n, *settings), num_cases) for n in SUBSTEPS]
        yield [name, description, *(f'{error:.0e}' for error in errors)]


def velocity_rows(num_cases: int) -> Iterable[list[str]]:
    for logstd in LOGSTDS:
        yield [
            str(logstd),
            *(f'{worst(velocity_error(logstd, published), num_cases):.0e}' for published in (False, True)),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, default=50, help='random cases of which the worst is printed')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(['policy', 'precision', *(f'{n} substeps' for n in SUBSTEPS)], rollout_rows(arguments.cases)))
    print()
    print(table(['logstd', 'velocity space', 'published form'], velocity_rows(arguments.cases)))


if __name__ == '__main__':
    main()
