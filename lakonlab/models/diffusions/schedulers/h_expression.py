"""The amount of noise ``h`` of a stochastic solver: a number, ``'inf'``, or an expression in the noise level."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def clip(value: float, low: float, high: float) -> float:
    """``value`` moved into the range from ``low`` to ``high``."""
    return min(max(value, low), high)


FUNCTIONS: dict[str, Callable[..., float]] = {
    'abs': abs,
    'clip': clip,
    'cos': math.cos,
    'exp': math.exp,
    'log': math.log,
    'max': max,
    'min': min,
    'sin': math.sin,
    'sqrt': math.sqrt,
    'tanh': math.tanh,
}
CONSTANTS = {'pi': math.pi, 'inf': math.inf}

# Noise levels at which an expression is tried when it is read.
PROBES = tuple(i / 64 for i in range(1, 64))


def noise_amount(h: float | str) -> Callable[[float], float]:
    """The function ``sigma -> h`` that a config's ``h`` stands for.

    Args:
        h: Non-negative number, ``'inf'``, or arithmetic in ``sigma``, the noise level at which a step begins, with the
            operators ``+ - * / % **``, the functions of :data:`FUNCTIONS` and the constants ``pi`` and ``inf``; for
            instance ``'0.5 + sqrt(sigma)'``.

    Raises:
        ValueError: ``h`` is not understood, or not a non-negative number somewhere in 0 < sigma < 1.
    """
    try:
        tree = ast.parse(str(h).strip(), mode='eval').body
        _check(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(
            f"h={h!r}: expected a non-negative number, 'inf' or an expression such as '0.5 + sqrt(sigma)' ({reason})"
        ) from None

    def amount(sigma: float) -> float:
        try:
            value = _evaluate(tree, sigma)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ValueError(f'h={h!r} has no value at sigma={sigma:g}: {error}') from None
        if isinstance(value, complex) or not value >= 0:
            raise ValueError(f'h={h!r} is {value} at sigma={sigma:g}: expected a non-negative number')
        return value

    for sigma in PROBES:
        amount(sigma)
    return amount


def _check(node: ast.expr) -> None:
    """Refuse everything but arithmetic."""
    match node:
        case ast.Constant(value=bool()):
            raise ValueError(f'{node.value} is not a number')
        case ast.Constant(value=int() | float()):
            return
        case ast.Name(id=name) if name == 'sigma' or name in CONSTANTS:
            return
        case ast.Name(id=name):
            raise ValueError(f'unknown name {name!r}; known are sigma, {", ".join([*CONSTANTS, *FUNCTIONS])}')
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            _check(left)
            _check(right)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            _check(operand)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            for argument in arguments:
                _check(argument)
        case _:
            raise ValueError(f'{ast.unparse(node)!r} is not arithmetic in sigma')


def _evaluate(node: ast.expr, sigma: float) -> float:
    match node:
        case ast.Constant(value=value):
            return float(value)
        case ast.Name(id=name):
            return sigma if name == 'sigma' else CONSTANTS[name]
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_evaluate(left, sigma), _evaluate(right, sigma))
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](_evaluate(operand, sigma))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return FUNCTIONS[name](*(_evaluate(argument, sigma) for argument in arguments))
    raise TypeError(f'{ast.dump(node)} was not refused when it was read')
