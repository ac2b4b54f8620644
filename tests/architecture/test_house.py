# SPDX-License-Identifier: Apache-2.0
"""Files and functions stay small enough to be read at once, and every vocabulary is said once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))
TRAIN = SOURCE / "chunkgrpo" / "train"

MAX_FILE = 450  # lines
MAX_FUNCTION = 60  # lines of code, without the docstring
MAX_PARAMETERS = 8  # without self and cls
MAX_TRAIN_ONCE = 45
MAX_EXCEPTIONS = 5
ASKS_FOR_TYPES = {"isinstance", "hasattr", "getattr"}

# What may be larger, and why it is one thing that would not be clearer in pieces:
# "chunkgrpo/x.py" for a file, "chunkgrpo/x.py: Class.method" for a function.
EXCEPTIONS: dict[str, str] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function below a node, inner ones too, with its qualified name."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, Function | ast.ClassDef):
            name = f"{prefix}.{child.name}" if prefix else child.name
        if isinstance(child, Function):
            yield name, child
        yield from functions(child, name)


ALL_FUNCTIONS = [
    (f"{name_of(path)}: {name}", path, function)
    for path in FILES
    for name, function in functions(tree_of(path))
]


def lines_of(function: Function) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def parameters_of(function: Function) -> int:
    a = function.args
    names = [each.arg for each in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return sum(name not in ("self", "cls") for name in names)


def is_command(function: Function) -> bool:
    """Whether Typer reads the parameters as the command's options."""
    return any(
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr in ("command", "callback")
        for decorator in function.decorator_list
    )


def is_reward_constructor(path: Path, function: Function) -> bool:
    """Whether the parameters are a reward's options, which its users name."""
    return function.name == "__init__" and (SOURCE / "chunkgrpo" / "rewards") in path.parents


def oversized() -> dict[str, list[str]]:
    """Name of each file or function beyond a limit -> what it exceeds."""
    found: dict[str, list[str]] = {}
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            found.setdefault(name_of(path), []).append(f"{lines} lines")
    for name, path, function in ALL_FUNCTIONS:
        if lines_of(function) > MAX_FUNCTION:
            found.setdefault(name, []).append(f"{lines_of(function)} lines of code")
        options = is_command(function) or is_reward_constructor(path, function)
        if not options and parameters_of(function) > MAX_PARAMETERS:
            found.setdefault(name, []).append(f"{parameters_of(function)} parameters")
    return found


def test_files_and_functions_are_small() -> None:
    wrong = [
        f"{name}: {', '.join(excess)}"
        for name, excess in oversized().items()
        if name not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


def test_exceptions_are_few_explained_and_needed() -> None:
    assert len(EXCEPTIONS) <= MAX_EXCEPTIONS
    assert all(reason.strip() for reason in EXCEPTIONS.values())
    idle = sorted(set(EXCEPTIONS) - set(oversized()))
    assert not idle, f"no longer exceptions: {idle}"


def test_the_trainer_asks_no_part_for_its_type() -> None:
    """What differs between algorithms, policies or rewards is a method of theirs."""
    wrong = [
        f"{name_of(path)}:{node.lineno} {node.id}"
        for path in sorted(TRAIN.rglob("*.py"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Name) and node.id in ASKS_FOR_TYPES
    ]
    assert not wrong, "\n".join(wrong)


def test_an_iteration_is_read_at_once() -> None:
    found = {
        name: lines_of(function)
        for name, _, function in ALL_FUNCTIONS
        if function.name == "train_once"
    }
    assert found, "where is train_once?"
    assert all(lines <= MAX_TRAIN_ONCE for lines in found.values()), found


def strings(nodes: list[ast.expr] | list[ast.expr | None]) -> frozenset[str] | None:
    """The values of string constants; None where anything else is among them."""
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    if len(values) != len(nodes) or not all(isinstance(value, str) for value in values):
        return None
    return frozenset(values)  # type: ignore[arg-type]


def literals(tree: ast.AST) -> Iterator[tuple[int, frozenset[str]]]:
    """Line and strings of every ``Literal[...]`` of two strings or more."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
            continue
        if ast.unparse(node.value).rpartition(".")[2] == "Literal":
            found = strings(node.slice.elts)
            if found and len(found) > 1:
                yield node.lineno, found


def vocabularies(tree: ast.Module) -> Iterator[tuple[int, frozenset[str]]]:
    """Line and strings of every module-level tuple, list, set or dict (its keys) of strings."""
    for statement in tree.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        for node in ast.walk(statement.value):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                found = strings(node.elts)
            elif isinstance(node, ast.Dict):
                found = strings(node.keys)
            else:
                continue
            if found:
                yield node.lineno, found


def test_no_vocabulary_stands_twice() -> None:
    """A set of names that a ``Literal`` lists is read from it, not written down again."""
    known: dict[frozenset[str], list[str]] = {}
    for path in FILES:
        for line, names in vocabularies(tree_of(path)):
            known.setdefault(names, []).append(f"{name_of(path)}:{line}")
    wrong = [
        f"{name_of(path)}:{line} Literal{sorted(names)} is also in {', '.join(known[names])}"
        for path in FILES
        for line, names in literals(tree_of(path))
        if names in known
    ]
    assert not wrong, "\n".join(wrong)
