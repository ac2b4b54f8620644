# SPDX-License-Identifier: Apache-2.0
"""Code that a configuration names, ``package.module:attribute``, and where it may come from.

A configuration is often someone else's, and a name in it is code that runs. What lies in the
working directory or among the installed packages was put there by whoever starts the command;
anything else needs their word: ``--allow-code``.
"""

from __future__ import annotations

import site
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_ALLOWED: ContextVar[bool] = ContextVar("chunkgrpo_allow_code", default=False)


@contextmanager
def code_allowed(allowed: bool = True) -> Iterator[None]:
    """Inside this context code may be imported from anywhere."""
    token = _ALLOWED.set(allowed)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def import_named(path: str) -> Any:
    """Import what a configuration names.

    Args:
        path: ``package.module:attribute``.

    Returns:
        The attribute.

    Raises:
        ValueError: If the path has another form, or its code lies neither in the working directory
            nor among the installed packages and :func:`code_allowed` does not hold. Nothing of it
            has run then.
        ImportError: If it cannot be imported.
        AttributeError: If the module has no such attribute.
    """
    module, separator, attribute = path.partition(":")
    if not separator or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{path!r} must look like package.module:attribute")
    if not attribute.isidentifier():
        raise ValueError(f"{path!r} names no attribute of {module}")
    if not _ALLOWED.get():
        check_place(module)
    return getattr(import_module(module), attribute)


def check_place(module: str) -> None:
    """Refuse a module that lies neither in the working directory nor among installed packages.

    The module's outermost package is looked for as an import would, and not imported.

    Raises:
        ValueError: With the place and the way to allow it.
        ImportError: If there is no such module.
    """
    outermost = module.partition(".")[0]
    if outermost in sys.stdlib_module_names:
        raise ValueError(
            f"{module} belongs to Python itself, whose functions are not made to be named in "
            "settings; name a function of your own"
        )
    spec, installed = _found(outermost)
    if spec is None:
        if outermost not in sys.modules:
            raise ImportError(f"No module named {outermost!r}")
        spec = sys.modules[outermost].__spec__
        if spec is None:  # made by the program that is running, which needs no permission
            return
    places = [Path(each).resolve() for each in _places(spec)]
    trusted = [Path.cwd().resolve(), *_installed_places()]
    for place in places:
        if not installed and not any(place.is_relative_to(root) for root in trusted):
            raise ValueError(
                f"{module} is code at {place}, outside the working directory and the installed "
                "packages; look at it, then start with --allow-code, or from its own directory"
            )


def _found(outermost: str) -> tuple[ModuleSpec | None, bool]:
    """Return what an import would find, and whether an editable installation is why."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(outermost, None) if find else None
        if spec is not None:
            # pip's editable installations may add a finder of their own, from site-packages.
            named = getattr(finder, "__module__", "") or ""
            return spec, named.startswith("__editable__")
    return None, False


def _places(spec: ModuleSpec) -> list[str]:
    if spec.submodule_search_locations is not None:
        return list(spec.submodule_search_locations)
    return [spec.origin] if spec.has_location and spec.origin else []


def _installed_places() -> list[Path]:
    """Return the folders of installed packages, those of editable installations among them."""
    names = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    names |= set(site.getsitepackages()) | {site.getusersitepackages()}
    found = [Path(name).resolve() for name in names if name]
    # chunkgrpo itself, wherever it is imported from.
    own = Path(__file__).resolve().parent
    editable = [
        Path(line).resolve()
        for folder in found
        if folder.is_dir()
        for file in sorted(folder.glob("*.pth"))
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if line and not line.startswith(("import ", "import\t", "#")) and Path(line).is_dir()
    ]
    return [*found, *editable, own]
