"""Kinds of command-line arguments that the toy demos share; what is wrong with a value is said as argparse says it."""

from __future__ import annotations

import argparse
import math

import torch


def positive(text: str) -> int:
    """A positive whole number."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text}: expected a positive number')
    return value


def not_negative(text: str) -> int:
    """A whole number that is not negative."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'{text}: expected 0 or a positive number')
    return value


def positive_float(text: str) -> float:
    """A positive finite number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{text}: expected a positive number')
    return value


def device(text: str) -> torch.device:
    """A device on which tensors can be made."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f'{text}: cannot be used: {str(error).splitlines()[0]}') from error


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')
