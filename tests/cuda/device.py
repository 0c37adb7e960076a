"""Where the tests of this folder compute, and how."""

import contextlib

import torch

DEVICE = 'cuda'


@contextlib.contextmanager
def tf32(allowed: bool):
    """Whether products of float32 may be computed in less."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


@contextlib.contextmanager
def determinism_restored():
    """What a run with deterministic algorithms sets for the whole process lasts no longer than the block."""
    names = 'deterministic', 'benchmark'
    before = torch.are_deterministic_algorithms_enabled(), [getattr(torch.backends.cudnn, name) for name in names]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        for name, value in zip(names, before[1]):
            setattr(torch.backends.cudnn, name, value)
