"""Reading back the resolved config that every checkpoint holds, without running it."""

from __future__ import annotations

import ast
from typing import Any

from lakonlab.config.errors import ConfigError


def parse_resolved(text: str, where: str) -> dict[str, Any]:
    """Values of a config as :func:`~lakonlab.config.load.resolved_text` writes it; nothing in it is executed.

    Args:
        text: Assignments of literals, in which ``dict(key=value)`` and ``float('inf')`` also count as literals.
        where: What holds the text, for messages.

    Raises:
        ConfigError: It holds anything else.
    """
    try:
        statements = ast.parse(text).body
        return {_target(statement): _value(statement.value) for statement in statements}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f'{where}: its config is damaged or was not written by this framework: {error}') from error


def _target(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    raise ValueError(f'line {statement.lineno} is no assignment')


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == 'dict' and not node.args and all(keyword.arg for keyword in node.keywords):
            return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        if node.func.id == 'float' and len(node.args) == 1 and not node.keywords:
            return float(ast.literal_eval(node.args[0]))
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError(f'line {node.lineno} is no literal')
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(item) for item in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    return ast.literal_eval(node)
