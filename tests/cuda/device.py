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
