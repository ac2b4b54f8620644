# SPDX-License-Identifier: Apache-2.0
"""The page on the architecture shows the training loop as it is."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from chunkgrpo.train.loop import Trainer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


def test_the_documented_loop_is_the_one_that_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    shown = [block for block in blocks if block.startswith("def train_once")]
    assert len(shown) == 1, "the page shows train_once in one block"
    source = textwrap.dedent(inspect.getsource(Trainer.train_once))
    assert shown[0].splitlines() == source.splitlines(), (
        f"{PAGE.name} shows other lines than Trainer.train_once has; copy them there verbatim"
    )
