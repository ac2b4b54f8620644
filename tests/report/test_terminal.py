# SPDX-License-Identifier: Apache-2.0
"""Names, prompts and answers of servers are shown as they are, and do nothing to the terminal."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from chunkgrpo.cli.display import Display
from chunkgrpo.cli.terminal import PlainConsole
from chunkgrpo.plain_text import one_line, printable
from chunkgrpo.report.curves import Panel, Series, save_curves

NASTY = ["[/red]", "[bold]x", "[link=http://a]b[/link]", ":smile:", "$x_$", "\x1b[31mred", "\x9b2J",
         "\x1b]0;title\x07", "a\x00b", "a\rb", "\u202eabc", "\ud800"]  # fmt: skip


def console(**options: Any) -> PlainConsole:
    return PlainConsole(file=io.StringIO(), width=80, **options)


def written(of: PlainConsole) -> str:
    file = of.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_texts_are_printed_as_they_stand(text: str) -> None:
    out = console()
    out.print(text, soft_wrap=True)
    out.print(Text(text), soft_wrap=True)
    table = Table("name", title=text)
    table.add_row(text)
    out.print(table)
    shown = written(out)
    assert "\x1b" not in shown
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert shown.count(printable(text)) >= 3 or text in (
        "a\rb",
        NASTY[7],
    )  # a narrow cell may cut it


def test_styles_of_our_own_reach_a_terminal() -> None:
    out = console(force_terminal=True, color_system="standard")
    out.print(Text.assemble(("name", "bold"), ", \x1b[31mred"))
    assert written(out) == "\x1b[1mname\x1b[0m, \\x1b[31mred\n"


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt])
def test_the_cursor_comes_back(end: type[BaseException]) -> None:
    display = Display(3, 4)
    display.console = console(force_terminal=True, color_system="standard")
    with pytest.raises(end), display:
        display.phase("work [/red] \x1b[31m")(1, 2)
        raise end
    shown = written(display.console)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "work [/red] \\x1b" in shown


def test_one_line_is_one_line() -> None:
    assert one_line("a\n b\x1b[1m\t c") == "a b\\x1b[1m c"
    assert one_line("x" * 5000, 100) == "x" * 47 + " ... " + "x" * 47
    assert one_line("\u2028a\u00adb") == "a\\xadb"


@pytest.mark.parametrize("name", ["$x_$", "$", "a$b$c", r"$\frac$"])
def test_dollars_are_no_formulas(name: str, tmp_path: Path) -> None:
    records = [{"iteration": i, name: float(i)} for i in range(1, 4)]
    panel = Panel(name, name, (Series(name, name),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_curves(tmp_path / "curves.png", records, [panel])
    assert (tmp_path / "curves.png").stat().st_size > 1000
