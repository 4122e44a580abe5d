"""Reads the repr of nested objects without evaluating it."""

import ast
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def parse_repr(text: str, classes: Mapping[str, Callable[..., Any]], name: str) -> Any:
    """Returns the object that ``text`` spells, as ``repr`` writes it.

    Args:
      text: calls of ``classes`` on each other, whole numbers, strings, tuples and
        dicts, such as ``"Stacked(LastTwoAxes(), axis=1)"``.
      classes: what may be called, by name.
      name: the argument that ``text`` was passed for, for errors.

    Raises:
      ValueError: ``text`` holds anything else, or a class refuses its arguments. The
        error says at which column.
    """
    line = re.sub(r"\s*\n\s*", " ", text).strip()

    def error(column: int, message: str) -> ValueError:
        return ValueError(f"{name}: column {column} of {line!r}: {message}")

    try:
        with warnings.catch_warnings():
            # An unknown escape as in '\d', which Python itself warns of.
            warnings.simplefilter("error")
            tree = ast.parse(line, mode="eval").body
    except SyntaxError as syntax:
        raise error(syntax.offset or 1, syntax.msg) from syntax
    except (ValueError, RecursionError, MemoryError) as cause:
        raise error(1, str(cause) or "nested too deeply") from cause

    def column_of(node: ast.AST) -> int:
        # Offsets of nodes, unlike those of a SyntaxError, count bytes.
        return 1 + len(line.encode()[: getattr(node, "col_offset", 0)].decode())

    def call(node: ast.Call) -> Any:
        function = node.func
        if not isinstance(function, ast.Name) or function.id not in classes:
            allowed = ", ".join(sorted(classes))
            given = ast.unparse(function)
            raise error(column_of(node), f"allowed are {allowed}, got {given!r}")
        arguments = [read(argument) for argument in node.args]
        named = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise error(column_of(keyword), "** is not allowed")
            named[keyword.arg] = read(keyword.value)
        try:
            return classes[function.id](*arguments, **named)
        except (TypeError, ValueError) as cause:
            raise error(column_of(node), str(cause)) from cause

    def read(node: ast.expr) -> Any:
        match node:
            case ast.Call():
                return call(node)
            case ast.Constant(value=bool() | int() | str() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
                return -value
            case ast.Tuple(elts=elements):
                return tuple(map(read, elements))
            case ast.Dict(keys=keys, values=values):
                return dict(zip(map(read_key, keys), map(read, values), strict=True))
        given = ast.unparse(node)
        hint = f"; did you mean '{given}()'?" if given in classes else ""
        raise error(column_of(node), f"{given!r} is not allowed{hint}")

    def read_key(node: ast.expr | None) -> str:
        match node:
            case ast.Constant(value=str() as key):
                return key
        raise error(column_of(node or tree), "the keys of a dict must be strings")

    return read(tree)
