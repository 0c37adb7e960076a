"""Reading config files: Python files that are executed, with ``_base_`` inheritance and command-line options.

The result is mmengine's ``Config``. What differs from ``Config.fromfile`` is the merging of bases: several bases may
share a key whose values are dicts, which are merged; only values that contradict each other are refused.

A base is merged under the file that names it: dicts are merged key by key, everything else (lists too) is replaced;
``_delete_=True`` in a dict drops what the base has there. In the text of a file ``{{ fileDirname }}``,
``{{ fileBasename }}``, ``{{ fileBasenameNoExtension }}`` and ``{{ fileExtname }}`` stand for parts of its path, and
``{{ _base_.a.b }}`` (also plain ``_base_.a.b``) for a value of its bases.
"""

from __future__ import annotations

import ast
import copy
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from mmengine.config import Config, ConfigDict

from lakonlab.config.errors import ConfigError, describe_unknown
from lakonlab.config.options import apply_options
from lakonlab.config.schema import TopLevel

BASE_KEY = '_base_'
DELETE_KEY = '_delete_'
RESERVED_NAMES = ('filename', 'text', 'pretty_text', 'env_variables')
PLAIN_TYPES = (type(None), bool, int, float, str)


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config file.

    Args:
        path: The file.
        options: Dotted key -> value, set last; an index selects an item of a list, as in ``evaluation.0.viz_num``.

    Returns:
        The config, unchecked (see :func:`lakonlab.config.check.check_config`). ``name`` is the stem of the file if the
        file does not say otherwise, ``text`` holds the files as read.

    Raises:
        ConfigError: The file or a base does not exist, fails to execute, holds values that are no plain data, or its
            bases contradict each other; or an option does not fit.
    """
    path = Path(path).expanduser()
    values, text = _read(path, ())
    values = _without_markers(values)
    values.setdefault('name', path.stem)
    for dotted in options or ():
        _check_option(dotted, values)
    values = apply_options(values, options or {})
    for key in RESERVED_NAMES:
        if key in values:
            raise ConfigError(f'{path}: the name {key!r} cannot be used at the top level of a config; rename it')
    return Config(values, cfg_text=text, filename=str(path))


def _check_option(dotted: str, values: Mapping[str, Any]) -> None:
    """Refuse to set a helper variable: its value was used when the file was executed."""
    key = dotted.split('.')[0]
    known = [field.name for field in fields(TopLevel)]
    if key in known:
        return
    if key in values:
        raise ConfigError(
            f'--cfg-options {dotted}: {key!r} is a helper variable of the config, and setting it now has no effect; '
            'set the keys that are made from it'
        )
    raise ConfigError(describe_unknown(f'--cfg-options {dotted}', 'section of a config', key, known))


def dump_config(cfg: Config, path: str | Path) -> Path:
    """Write a resolved config, without bases, to a file that :func:`load_config` reads back to an equal config.

    Args:
        cfg: The config.
        path: The file to write.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(resolved_text(cfg), encoding='utf-8')
    return path


def resolved_text(cfg: Config) -> str:
    """A config as the text of an equivalent Python file without bases."""
    lines = [f'{key} = {_literal(value, 0)}' for key, value in cfg.to_dict().items() if key.isidentifier()]
    return '\n'.join(lines) + '\n'


def _literal(value: Any, indent: int) -> str:
    """``repr`` broken into lines; dicts whose keys are identifiers read ``dict(key=value)``."""
    inner, outer = ' ' * (indent + 4), ' ' * indent
    if isinstance(value, float) and repr(value) in ('inf', '-inf', 'nan'):
        return f"float('{value!r}')"
    if isinstance(value, dict) and value:
        as_call = all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in value)
        join = '{}={}' if as_call else '{!r}: {}'
        items = [join.format(key, _literal(item, indent + 4)) for key, item in value.items()]
        opening, closing = ('dict(', ')') if as_call else ('{', '}')
    elif isinstance(value, (list, tuple)) and value:
        items = [_literal(item, indent + 4) for item in value]
        opening, closing = ('[', ']') if isinstance(value, list) else ('(', ',)' if len(value) == 1 else ')')
    else:
        return repr(value)
    one_line = f'{opening}{", ".join(items)}{closing}'
    if '\n' not in one_line and len(one_line) + indent < 100:
        return one_line
    if closing == ',)':
        closing = ')'
    return f'{opening}\n' + ''.join(f'{inner}{item},\n' for item in items) + f'{outer}{closing}'


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], str]:
    """Values of a file merged over those of its bases, and the text of all of them."""
    resolved = path.resolve()
    if resolved in children:
        chain = ' -> '.join(str(child) for child in (*children, resolved))
        raise ConfigError(f'{path}: bases go round in a circle: {chain}')
    if path.suffix != '.py':
        raise ConfigError(f'{path}: configs are Python files, ending in .py')
    try:
        source = path.read_text(encoding='utf-8')
    except OSError as error:
        named = f' (a base of {children[-1]})' if children else ''
        raise ConfigError(f'{path}{named}: cannot read the config file: {error.strerror}') from error
    tree, base_expressions = _parse(source, path)

    bases, texts = [], []
    for name in _base_names(tree, path):
        base_path = path.parent / Path(name).expanduser()
        values, text = _read(base_path, (*children, resolved))
        bases.append((base_path, values))
        texts.append(text)
    base_values: dict[str, Any] = {}
    for number, (_, values) in enumerate(bases):
        _merge_bases(base_values, values, '', bases[: number + 1])

    own = _execute(tree, base_expressions, base_values, path)
    merged = merge(base_values, own)
    return merged, '\n'.join([*texts, f'# {path}', source])


def _parse(source: str, path: Path) -> tuple[ast.Module, dict[str, str]]:
    """Syntax tree with templates of the file name filled in, and the stand-ins for ``{{ _base_.x }}``."""
    parts = {
        'fileDirname': str(path.resolve().parent),
        'fileBasename': path.name,
        'fileBasenameNoExtension': path.stem,
        'fileExtname': path.suffix,
    }
    for key, value in parts.items():
        source = re.sub(r'\{\{\s*' + key + r'\s*\}\}', lambda _, value=value: value, source)
    expressions: dict[str, str] = {}

    def stand_in(match: re.Match) -> str:
        name = f'__base_value_{len(expressions)}__'
        expressions[name] = match.group(1)
        return name

    source = re.sub(r'\{\{\s*(' + BASE_KEY + r'(?:\.\w+)+)\s*\}\}', stand_in, source)
    try:
        return ast.parse(source, filename=str(path)), expressions
    except SyntaxError as error:
        raise ConfigError(f'{path}, line {error.lineno}: {error.msg}: {(error.text or "").strip()!r}') from error


def _base_names(tree: ast.Module, path: Path) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == BASE_KEY for t in node.targets):
            try:
                names = ast.literal_eval(node.value)
            except ValueError as error:
                raise ConfigError(f'{path}: {BASE_KEY} must be a literal path or list of paths') from error
            return [names] if isinstance(names, str) else list(names)
    return []


def _execute(
    tree: ast.Module, base_expressions: Mapping[str, str], base_values: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Run a file and collect the plain values that it defines."""
    names: dict[str, Any] = {BASE_KEY: ConfigDict(copy.deepcopy(dict(base_values))), '__file__': str(path)}
    for name, expression in base_expressions.items():
        names[name] = _base_value(base_values, expression, path)
    tree = ast.fix_missing_locations(_PrepareTree(names).visit(tree))
    given = set(names)
    try:
        exec(compile(tree, str(path), 'exec'), names)
    except Exception as error:
        line = _line_in(error, str(path))
        raise ConfigError(f'{path}{line}: {type(error).__name__}: {error}') from error
    own = {}
    for key, value in names.items():
        if key.startswith('__') or key in given or isinstance(value, ModuleType) or callable(value):
            continue
        own[key] = _plain(value, f'{path}: {key}')
    return own


def _line_in(error: BaseException, filename: str) -> str:
    trace, line = error.__traceback__, ''
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == filename:
            line = f', line {trace.tb_lineno}'
        trace = trace.tb_next
    return line


class _PrepareTree(ast.NodeTransformer):
    """Removes the assignment of ``_base_`` and fills values of bases into strings that hold their stand-ins."""

    def __init__(self, stand_ins: Mapping[str, Any]):
        self.stand_ins = stand_ins

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        if any(isinstance(target, ast.Name) and target.id == BASE_KEY for target in node.targets):
            return None
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and '__base_value_' in node.value:
            text = re.sub(r'__base_value_\d+__', lambda match: str(self.stand_ins[match.group()]), node.value)
            return ast.copy_location(ast.Constant(text), node)
        return node


def _base_value(base_values: Mapping[str, Any], expression: str, path: Path) -> Any:
    value: Any = base_values
    for key in expression.split('.')[1:]:
        try:
            value = value[int(key)] if isinstance(value, (list, tuple)) else value[key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ConfigError(f'{path}: {{{{ {expression} }}}}: the bases have no {key!r}') from error
    return copy.deepcopy(value)


def _plain(value: Any, where: str) -> Any:
    """A copy made of dicts, lists, tuples and scalars only."""
    if isinstance(value, PLAIN_TYPES):
        return value
    if isinstance(value, dict):
        return {key: _plain(item, f'{where}.{key}') for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f'{where}.{index}') for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, (range, set, frozenset)):
        return list(value) if isinstance(value, range) else sorted(value)
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(
        f'{where}: found a {type(value).__name__}; configs hold plain data only (numbers, strings, lists, dicts). '
        'Name classes by their registered type and data types by their name, such as "bfloat16".'
    )


def _merge_bases(merged: dict, values: Mapping, path: str, bases: Sequence[tuple[Path, Mapping]]) -> None:
    """Merge a base into those before it, in place; values that differ are refused."""
    for key, value in values.items():
        full = f'{path}.{key}' if path else str(key)
        if key not in merged:
            merged[key] = copy.deepcopy(value)
        elif isinstance(merged[key], dict) and isinstance(value, dict):
            _merge_bases(merged[key], value, full, bases)
        elif merged[key] != value or type(merged[key]) is not type(value):
            first = next(file for file, earlier in bases if _holds(earlier, full))
            raise ConfigError(
                f'{full}: the bases contradict each other: {first} has {merged[key]!r}, {bases[-1][0]} has {value!r}. '
                'Set it in only one of them, or let one be the base of the other.'
            )


def _holds(values: Any, path: str) -> bool:
    for key in path.split('.'):
        if not isinstance(values, Mapping):
            return False
        values = {str(name): value for name, value in values.items()}
        if key not in values:
            return False
        values = values[key]
    return True


def merge(base: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """A child's values over a base's.

    Args:
        base: Values of the base.
        child: Dicts are merged into those of the base, unless they hold ``_delete_=True``; other values replace.

    Returns:
        A new dict.
    """
    merged = copy.deepcopy(dict(base))
    for key, value in child.items():
        replaces = not isinstance(value, dict) or value.get(DELETE_KEY, False)
        if not replaces and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = _without_markers(value)
    return merged


def _without_markers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_markers(item) for key, item in value.items() if key != DELETE_KEY}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_markers(item) for item in value)
    return copy.deepcopy(value)
