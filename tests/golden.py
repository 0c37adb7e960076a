"""Reads the recorded vectors of the published numerics in ``tests/data/golden``.

A file holds many cases; a tensor is named ``<case>/<group>/<name>`` and the file's metadata gives the parameters of
every case. Groups: ``in`` inputs, ``draw`` random numbers in the order they were drawn, ``out`` results, ``net`` and
``teacher`` weights.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open

DATA = Path(__file__).parent / 'data' / 'golden'


@cache
def load(name: str) -> dict[str, dict]:
    """Case -> dict(params, and per group a dict of tensors) of one file."""
    cases: dict[str, dict] = {}
    with safe_open(DATA / f'{name}.safetensors', framework='pt') as file:
        for case, params in json.loads(file.metadata()['cases']).items():
            cases[case] = {'params': params}
        for key in file.keys():  # noqa: SIM118 - not a dict
            case, group, tensor = key.split('/', 2)
            cases[case].setdefault(group, {})[tensor] = file.get_tensor(key)
    return cases


def names(name: str, prefix: str = '') -> list[str]:
    """The cases of a file whose name begins with ``prefix``, for parametrising tests."""
    return [case for case in load(name) if case.startswith(prefix)]


def draws(case: dict, *draw_names: str) -> dict[str, list[torch.Tensor]]:
    """The recorded draws of a case by name, ``draw_names`` being their names in the order they were drawn.

    A shorter list of names is cycled through, as for the micro-batches of one step.
    """
    tensors = [tensor for _, tensor in sorted(case.get('draw', {}).items())]
    result: dict[str, list[torch.Tensor]] = {}
    for i, tensor in enumerate(tensors):
        result.setdefault(draw_names[i % len(draw_names)], []).append(tensor)
    return result


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert that the largest error is at most ``tolerance`` times the scale of the expected tensor."""
    assert actual.shape == expected.shape, f'shape {tuple(actual.shape)}, expected {tuple(expected.shape)}'
    scale = expected.double().abs().max().clamp(min=1e-30)
    error = (actual.double() - expected.double()).abs().max() / scale
    assert error <= tolerance, f'relative error {error:.2e} exceeds {tolerance:.0e}'
