# SPDX-License-Identifier: Apache-2.0
"""The layout is a promise: imports point one way, and the command line starts at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "chunkgrpo"

# What each part may import of ours, besides itself, and nothing that it does not. The longest key
# that begins a module's name counts, so one file can be given more than its folder. "" is
# `import chunkgrpo` itself. Policies, rewards and algorithms never import one another: only the
# protocol of policies is known to algorithms.
LAYERS: dict[str, set[str]] = {
    "core": set(),
    "plain_text": set(),
    "imported_code": set(),
    "types": {"core.dynamics", "core.precision"},
    "runtime": {"core.finite", "core.names", "core.precision"},
    "report": {"runtime.files"},
    "shapes": {"runtime.attention"},
    "recipes": set(),
    "policies": {"core", "types", "runtime"},
    "rewards": {"core", "types", "imported_code", "plain_text", "runtime.sources"},
    "rewards.clip": {"core", "types", "shapes"},
    "rewards.shapes": {"core", "types", "shapes"},
    "rewards.image_health": {"core", "types", "report.health"},
    "algorithms": {"core", "types", "runtime", "policies.protocol", "imported_code"},
    "prompts": {"types", "runtime.seeds", "runtime.sources", "shapes.grammar"},
    "rollout": {"core", "types", "runtime.seeds", "policies.protocol"},
    "credit": {"core", "types", "rewards.protocol", "rewards.scoring"},
    "evaluate": {"core", "types", "runtime.seeds", "policies.protocol", "report.health"}
    | {"rewards.images", "rewards.protocol", "rewards.scoring", "prompts", "rollout"},
    "train": {"core", "types", "runtime", "policies.protocol", "algorithms.protocol", "rewards"}
    | {"report.metrics", "report.statistics", "prompts", "rollout", "credit", "evaluate"},
    "profile": {"core", "types", "runtime", "policies.protocol", "report.curves", "rollout"},
    "config": {"core", "runtime", "policies", "rewards", "algorithms", "shapes", "recipes"}
    | {"prompts", "rollout", "credit", "train", "plain_text"},
    "cost": {"core", "types", "policies.toy", "rewards.scoring", "algorithms", "rollout", "train"}
    | {"config"},
    "methods": {"config", "cost", "recipes"},
    "estimate": {"config", "cost", "policies"},
    "doctor": {"core", "types", "runtime", "policies", "rewards", "algorithms", "rollout"}
    | {"train", "config", "estimate"},
    "runs": {"types", "runtime.checkpoints", "runtime.files", "runtime.lock", "policies", "rewards"}
    | {"report", "prompts", "evaluate", "train", "config", "doctor"},
    "cli": {"core", "rewards", "report", "shapes", "recipes", "profile", "config", "cost"}
    | {"methods", "estimate", "doctor", "runs", "plain_text", "imported_code"}
    | {"runtime.interrupts", "runtime.lock"},
    "__main__": {"cli"},
    "": set(),
}

MODEL_LIBRARIES = {"diffusers", "transformers", "peft"}
MODEL_LIBRARY_USERS = ("policies", "rewards", "shapes", "runtime.solvers")
CORE_MAY_IMPORT = set(sys.stdlib_module_names) | {"torch"}
LATE = {"diffusers", "transformers", "peft", "matplotlib", "scipy"}
# What importing these may not bring along; `chunkgrpo --help` has to answer at once.
STARTS = {"": LATE | {"torch"}, "cli": LATE | {"torch"}, "core": LATE}

SPDX = "# SPDX-License-Identifier: Apache-2.0"
# Put together from pieces, so that this file does not hold them itself.
TRACES = ["/" + "work/", "METHOD" + ".md", "HOUSE" + ".md"]
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".j2", ".txt", ".json", ".jsonl", ".cfg"}
TEXT_SUFFIXES |= {".ipynb", ".css", ".cff"}
TEXT_PLACES = ("src", "tests", "docs", "benchmarks", "examples", ".ci", ".github")

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """Name below ``chunkgrpo``: ``core.sde``; '' for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    """All nodes; with ``top_level`` only those that run when the module is imported."""
    for child in ast.iter_child_nodes(tree):
        if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if top_level and is_type_checking(child):
            for other in child.orelse:  # type: ignore[attr-defined]
                yield from nodes(other, top_level)
            continue
        yield child
        yield from nodes(child, top_level)


def imports(path: Path, top_level: bool = False) -> list[tuple[str, int]]:
    """Full names of what a file imports, each with its line.

    ``from a import b`` gives ``a.b`` where that is a module of ours, and ``a`` otherwise.
    """
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[tuple[str, int]] = []
    for node in nodes(tree_of(path), top_level):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                here = f"chunkgrpo.{package}".rstrip(".").split(".")
                base = here[: len(here) - node.level + 1]
                source = ".".join([*base, source]).rstrip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if source == "chunkgrpo" and alias.name == "__version__":
                    continue
                if inner.removeprefix("chunkgrpo.") in MODULES and inner.startswith("chunkgrpo"):
                    found.append((inner, node.lineno))
                else:
                    found.append((source, node.lineno))
    return found


def ours(name: str) -> str | None:
    """``chunkgrpo.core.sde`` as ``core.sde``; None for other people's modules."""
    if name == "chunkgrpo":
        return ""
    return name.removeprefix("chunkgrpo.") if name.startswith("chunkgrpo.") else None


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def layer_of(module: str) -> str | None:
    return max((k for k in LAYERS if k and within(module, k)), key=len, default=None)


def test_every_module_has_a_layer() -> None:
    homeless = [module for module in MODULES if module and layer_of(module) is None]
    assert not homeless, f"give these a line in LAYERS: {homeless}"


def test_imports_point_one_way() -> None:
    wrong = []
    for module, path in MODULES.items():
        layer = layer_of(module) or ""
        own = layer.split(".")[0]
        for name, line in imports(path):
            target = ours(name)
            if target is None or (own and within(target, own)):
                continue
            if not target or not any(within(target, part) for part in LAYERS[layer]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports chunkgrpo.{target}")
    assert not wrong, "\n".join(wrong)


def test_layers_allow_nothing_that_is_not_used() -> None:
    used: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for module, path in MODULES.items():
        layer = layer_of(module) or ""
        used[layer] |= {target for name, _ in imports(path) if (target := ours(name)) is not None}
    unused = [
        f"{layer}: {part}"
        for layer, parts in LAYERS.items()
        if "." not in layer  # a file that is given more than its folder keeps the folder's
        for part in sorted(parts)
        if not any(within(target, part) for target in used[layer])
    ]
    assert not unused, "\n".join(unused)


def test_layers_have_no_cycle() -> None:
    def below(layer: str, seen: tuple[str, ...]) -> None:
        assert layer not in seen, " <- ".join([*seen, layer])
        for part in {layer_of(part) for part in LAYERS[layer]}:
            assert part is not None
            below(part, (*seen, layer))

    for layer in LAYERS:
        below(layer, ())


def test_core_imports_torch_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        if within(module, "core")
        for name, line in imports(path)
        if ours(name) is None and name.split(".")[0] not in CORE_MAY_IMPORT
    ]
    assert not wrong, "\n".join(wrong)


def heavy(path: Path, top_level: bool) -> list[tuple[str, int]]:
    return [(n, i) for n, i in imports(path, top_level) if n.split(".")[0] in MODEL_LIBRARIES]


def test_model_libraries_stay_in_their_places() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        if not any(within(module, place) for place in MODEL_LIBRARY_USERS)
        for name, line in heavy(path, top_level=False)
    ]
    assert not wrong, "\n".join(wrong)


def test_model_libraries_are_imported_late() -> None:
    """A module that needs one at import may be imported only from inside functions."""
    heavy_modules = {module for module, path in MODULES.items() if heavy(path, top_level=True)}
    wrong = [
        f"{MODULES[module].relative_to(ROOT)} is a package and imports a model library at once"
        for module in heavy_modules
        if MODULES[module].name == "__init__.py"
    ]
    for module, path in MODULES.items():
        if module in heavy_modules:
            continue
        for name, line in imports(path, top_level=True):
            if ours(name) in heavy_modules:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name} at once")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [m for m in STARTS if m in MODULES])
def test_starting_loads_no_model_library(module: str) -> None:
    name = f"chunkgrpo.{module}".rstrip(".")
    script = f"import {name}, sys; print(*sorted(set(sys.modules) & {STARTS[module]!r}))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert run.stdout.split() == []


def test_no_module_is_a_drawer() -> None:
    drawers = [str(path.relative_to(ROOT)) for path in SOURCES if path.name == "utils.py"]
    assert not drawers, "name a module after what it is about"


def python_files() -> list[Path]:
    return [
        path
        for place in ("src", "tests", "benchmarks", "examples", "docs")
        for path in sorted((ROOT / place).rglob("*.py"))
    ]


def test_every_source_file_names_its_licence() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if SPDX not in path.read_text(encoding="utf-8").split("\n", 2)[:2]
    ]
    assert not without, f"begin with {SPDX!r}"


def test_text_speaks_of_the_project_alone() -> None:
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for place in TEXT_PLACES:
        files += [path for path in (ROOT / place).rglob("*") if path.is_file()]
    found = []
    for path in files:
        if path.suffix not in TEXT_SUFFIXES and path.name not in ("Makefile", "run", "NOTICE"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {trace}" for trace in TRACES if trace in text]
    assert not found, "\n".join(found)
