# SPDX-License-Identifier: Apache-2.0
"""What the pages need beyond Markdown; loaded by mkdocs (hooks) and by griffe (extension).

- Pages of the API reference, one for each public module that there is, so that a new file of
  ``core/`` has its page at once.
- Files of the repository's root as pages (README.md is the first), their links turned.
- Docstrings: ``.. math::`` and the roles of reStructuredText as Markdown.
- Formulas as MathML, which browsers draw themselves: no scripts and no fonts are fetched.
"""

import ast
import html
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
# Each entry is a module, or a package of which every public module has a page.
PUBLIC = [
    "chunkgrpo.core",
    "chunkgrpo.types",
    "chunkgrpo.rollout",
    "chunkgrpo.credit",
    "chunkgrpo.train",
    "chunkgrpo.algorithms",
    "chunkgrpo.policies.protocol",
    "chunkgrpo.rewards.protocol",
]
BORROWED = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
ARITHMATEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DIRECTIVE = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *(?=\n\1 )))*)", re.MULTILINE)
TOGETHER = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
ROLE = re.compile(r":(func|class|meth|mod|data|attr|math):`([^`]+)`")
# What the converter leaves out: bars of equal height, and the space around names and relations.
TYPESETTING = [
    (re.compile(r"<mo[^>]*>(&#x02016;|&#x02225;)</mo>"), r'<mo stretchy="false">\1</mo>'),
    (re.compile(r"(<mi>(?:log|ln|exp|cos)</mi>)(?!<mo)"), r'\1<mspace width="0.17em"/>'),
    (re.compile("<mi>&#x0007E;</mi>"), '<mo lspace="0.28em" rspace="0.28em">&#x0223C;</mo>'),
]

log = logging.getLogger("mkdocs.hooks.gen_api")


def pages() -> dict[str, Path]:
    """Public modules and their files, packages before what they hold."""
    found: dict[str, Path] = {}
    for name in PUBLIC:
        place = SOURCE / Path(*name.split("."))
        if place.with_suffix(".py").is_file():
            found[name] = place.with_suffix(".py")
            continue
        found[name] = place / "__init__.py"
        for file in sorted(place.glob("*.py")):
            if not file.stem.startswith("_"):
                found[f"{name}.{file.stem}"] = file
    return found


def first_line(file: Path) -> str:
    """Summary of a module."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def api_index() -> str:
    """The reference's first page: every module with its summary."""
    lines = ["# API reference", "", "| module | holds |", "|---|---|"]
    for name, file in pages().items():
        lines.append(f"| [`{name}`]({name}.md) | {as_markdown(first_line(file), None)} |")
    return "\n".join(lines) + "\n"


def api_page(name: str, file: Path) -> str:
    """One module's page. A package shows what it says of itself; its members have pages."""
    package = file.name == "__init__.py"
    options = "    options: {members: false}\n" if package else ""
    return f"# `{name}` {{#{name}}}\n\n::: {name}\n{options}"


def on_config(config: Any) -> Any:
    """Put the modules under the entry of the API reference."""
    entries: list[Any] = ["api/index.md", *({name: f"api/{name}.md"} for name in pages())]
    config.nav = [
        {"API reference": entries} if "API reference" in entry else entry for entry in config.nav
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no files of docs/."""
    made = {f"api/{name}.md": api_page(name, file) for name, file in pages().items()}
    made["api/index.md"] = api_index()
    made |= {page: (ROOT / file).read_text(encoding="utf-8") for page, file in BORROWED.items()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    uri = page.file.src_uri
    source = BORROWED.get(uri, f"docs/{uri}")
    as_page = {file: name for name, file in BORROWED.items()}

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        new = as_page.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(new, posixpath.dirname(uri) or '.')}{link[2] or ''})"

    return LINK.sub(turned, markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace what arithmatex marked by MathML."""

    def drawn(found: re.Match[str]) -> str:
        latex = html.unescape(found[2]).strip()
        display = "block" if found[1] == "div" else "inline"
        try:
            math = convert(latex, display=display)
        except Exception as error:  # the converter raises whatever it stumbles over
            log.warning("%s: formula %r: %r", page.file.src_uri, latex, error)
            return f"<code>{html.escape(latex)}</code>"
        for pattern, better in TYPESETTING:
            math = pattern.sub(better, math)
        return f'<{found[1]} class="arithmatex">{math}</{found[1]}>'

    return ARITHMATEX.sub(drawn, content)


def as_markdown(text: str, scope: "griffe.Object | None") -> str:
    """Turn the directives and roles of a docstring into Markdown.

    Names become links where they have a place in the reference, and code elsewhere. Arguments that
    are explained together (``low, high: ...``) get an entry each, as only one name can have a type.
    """

    def displayed(found: re.Match[str]) -> str:
        indent, lines = found[1], [line.strip() for line in found[2].split("\n")]
        body = "\n".join(indent + line for line in lines if line)
        return f"\n{indent}$$\n{body}\n{indent}$$\n"

    def role(found: re.Match[str]) -> str:
        kind, name = found.groups()
        if kind == "math":
            return f"${name}$"
        name = name.removeprefix("~")
        shown = name.rpartition(".")[2] if kind == "mod" else name.lstrip(".")
        target = place_of(name, scope)
        shown = shown if kind == "mod" else shown.rpartition(".")[2] or shown
        return f"[`{shown}`][{target}]" if target else f"`{shown}`"

    def one_by_one(found: re.Match[str]) -> str:
        return "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", "))

    return ROLE.sub(role, TOGETHER.sub(one_by_one, DIRECTIVE.sub(displayed, text)))


def place_of(name: str, scope: "griffe.Object | None") -> str | None:
    """Full path of a name used in a docstring, if the reference shows it."""
    if scope is None:
        return None
    package = scope.package
    module = scope.module
    home = module.path if module.is_init_module else module.path.rpartition(".")[0]
    tries = [name] if name.startswith(package.path + ".") else []
    if name.startswith("."):
        # Relative to the module's package, or to one of the packages around it.
        while home:
            tries.append(home + name)
            home = home.rpartition(".")[0]
    else:
        inside: Any = scope
        while inside is not None:
            tries.append(f"{inside.path}.{name}")
            inside = inside.parent
    shown = pages()
    for path in tries:
        try:
            found: Any = package.modules_collection[path]
            target = found.final_target if found.is_alias else found
        except Exception:  # not there, or an import that leads out of the package
            continue
        if target.module.path in shown and not target.name.startswith("_"):
            if target.module.is_init_module and not target.is_module:
                continue
            return target.path
    return None


class Docstrings(griffe.Extension):
    """Rewrite every docstring once the whole package is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Walk the package."""
        self._rewrite(pkg)

    def _rewrite(self, scope: Any) -> None:
        if scope.docstring is not None:
            scope.docstring.value = as_markdown(scope.docstring.value, scope)
        for member in scope.members.values():
            if not member.is_alias:
                self._rewrite(member)
