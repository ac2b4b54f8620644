# SPDX-License-Identifier: Apache-2.0
"""Live progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self


def shown(value: float | None, form: str) -> str:
    """Return a number as text; a dash where it is missing or not finite."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


class Display:
    """Shows the progress of a run."""

    def __init__(self, iterations: int, images: int) -> None:
        from chunkgrpo.cli.terminal import PlainConsole

        self.console = PlainConsole()
        self.iterations, self.images = iterations, images
        self.progress: Any = None
        self.training: Any = None
        self.accuracy, self.share = "", True

    def __enter__(self) -> Self:
        """Begin; the live display ends with the block, whatever happens in it."""
        return self

    def __exit__(self, *details: object) -> None:
        """Give the cursor back."""
        self.close()

    def say(self, *pieces: str | tuple[str, str]) -> None:
        """Print a line, of texts and of pairs of a text and its style."""
        from rich.text import Text

        self.close()
        self.console.print(Text.assemble(*pieces), soft_wrap=True)

    def close(self) -> None:
        """Stop the live display."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = self.training = None

    def _start(self, text: str, total: int) -> Any:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.close()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.progress.start()
        return self.progress.add_task(text, total=total)

    def phase(self, text: str) -> Callable[[int, int], None]:
        """Show a phase; return its progress hook."""
        if not self.console.is_terminal:
            self.say(text)
            return lambda done, total: None
        task = self._start(text, 1)

        def hook(done: int, total: int) -> None:
            self.progress.update(task, completed=done, total=total)

        return hook

    def iteration(self, record: Mapping[str, Any]) -> None:
        """Show one iteration."""
        number = record["iteration"]
        if "accuracy" in record:
            value = record["accuracy"]
            scale, form, unit = (100, ".0f", " %") if self.share else (1, ".4g", "")
            held_out = shown(value if value is None else scale * value, form)
            self.accuracy = f"  held out {held_out}{unit}"
        text = (
            f"reward {shown(record.get('reward_mean'), '.3f')}{self.accuracy}  "
            f"{shown(record.get('images_per_second'), '.0f')} images/s"
        )
        skipped = record.get("skipped_updates", 0)
        if skipped:
            text += f"  {skipped} update{'s' * (skipped > 1)} skipped"
        if self.console.is_terminal:
            if self.training is None:
                self.training = self._start(text, self.iterations)
            self.progress.update(self.training, completed=number, description=text)
            return
        left = record["seconds"] / number * (self.iterations - number) / 60
        self.console.print(
            f"{number:4}/{self.iterations}  {text}  "
            f"clip {shown(record.get('clip_fraction', 0), '.2f')}  "
            f"grad {shown(record.get('grad_norm'), '.3f')}  {left:.1f} min left",
            soft_wrap=True,
        )
