# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from chunkgrpo.report.html import write_html

SUMMARY = {
    "title": "A run",
    "subtitle": "two minutes",
    "headline": [
        {"label": "Accuracy", "value": "52 % → 78 %", "note": "600 images"},
        {"label": "Time", "value": "2 min"},
    ],
    "tables": [{"title": "By task", "columns": ["task", "base"], "rows": [["count", "50 %"]]}],
    "command": "chunkgrpo train --seed 1",
    "files": [{"path": "adapter/", "what": "weights"}],
    "notes": ["The verifier is also the reward."],
}


class Page(HTMLParser):
    """Collects text and links, and checks that tags are closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "curve.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_the_page_says_everything(tmp_path: Path, picture: Path) -> None:
    path = write_html(tmp_path, SUMMARY, "seed: 1\n", {"Learning curves": picture})
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for text in ("A run", "52 % → 78 %", "600 images", "By task", "count", "seed: 1", "adapter/"):
        assert text in page.text
    for text in ("chunkgrpo train --seed 1", "Learning curves", "The verifier is also the reward."):
        assert text in page.text


def test_the_page_needs_no_other_file(tmp_path: Path, picture: Path) -> None:
    page = Page(write_html(tmp_path, SUMMARY, "", {"Curve": picture}).read_text(encoding="utf-8"))
    (source,) = page.sources
    kind, data = source.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()
    assert "script" not in page.tags


def test_an_empty_summary_still_makes_a_page(tmp_path: Path) -> None:
    page = Page(write_html(tmp_path, {}, "", {}).read_text(encoding="utf-8"))
    assert f"Run {tmp_path.name}" in page.text
    assert "How to reproduce" not in page.text and "Configuration" not in page.text


def test_text_is_escaped_everywhere(tmp_path: Path, picture: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    summary = {
        "title": evil,
        "subtitle": evil,
        "headline": [{"label": evil, "value": evil, "note": evil}],
        "tables": [{"title": evil, "columns": [evil], "rows": [[evil]], "note": evil}],
        "command": evil,
        "files": [{"path": evil, "what": evil}],
        "notes": [evil],
    }
    page = Page(write_html(tmp_path, summary, evil, {evil: picture}).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(evil) == 16  # the title also names the tab


def test_mistakes_are_refused(tmp_path: Path, picture: Path) -> None:
    with pytest.raises(ValueError, match="unknown keys \\['headlines'\\]"):
        write_html(tmp_path, {"headlines": []}, "", {})
    with pytest.raises(ValueError, match="formats"):
        write_html(tmp_path, {}, "", {"Vector": picture.with_suffix(".svg")})
    with pytest.raises(FileNotFoundError):
        write_html(tmp_path, {}, "", {"None": tmp_path / "none.png"})
    assert not (tmp_path / "report.html").exists()
