"""Each room of the examples imports only those below it, and a script few of them."""

import ast
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MAY_IMPORT = {
    "task": set(),
    "data": {"task", "data"},
    "models": {"models"},
    "formats": {"task"},
    "training": {"task", "training"},
    "tasks": {"task", "data", "models", "formats"},
    "running": {"task", "data", "training", "running"},
    "comparing": {"task", "table", "data", "models", "tasks", "training", "comparing"},
    "compiling": {"task", "table", "data", "training", "compiling"},
}


def imported(path):
    """Returns the examples' modules that a module names in imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    files = {EXAMPLES / f"{name.replace('.', '/')}.py" for name in names}
    return {file for file in files if file.exists()}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_down_only(room):
    for path in [EXAMPLES / f"{room}.py", *(EXAMPLES / room).glob("*.py")]:
        if path.exists():
            tops = {file.relative_to(EXAMPLES).parts[0] for file in imported(path)}
            assert {top.removesuffix(".py") for top in tops} <= MAY_IMPORT[room], path


@pytest.mark.parametrize("script", ["pretrain_gpt2", "pretrain_bert", "pretrain_t5"])
def test_a_script_reaches_few_modules(script):
    found, left = set(), {EXAMPLES / f"{script}.py"}
    while left:
        found |= left
        left = set().union(*map(imported, left)) - found
    assert len(found) - 1 <= 16, sorted(found)
    assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) <= 60
