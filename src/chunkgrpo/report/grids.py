# SPDX-License-Identifier: Apache-2.0
"""Images side by side in one PNG.

Axes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from chunkgrpo.report.palette import CORRECT, EDGE, FAINT, INK, WRONG
from chunkgrpo.runtime.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

__all__ = ["save_image_grid", "save_comparison"]

_MARGIN = 16  # pixels around the whole picture
_GAP = 10  # between cells
_FRAME = 3  # thickness of a frame, drawn outside the image
_LINE = 1.3  # line height over font size
_CAPTION_WIDTH = 220  # of the captions at the left of a comparison
_MIN_CELL = 112  # below this, captions under an image would break at every word


def save_image_grid(
    path: str | os.PathLike[str],
    images_BCHW: Tensor,
    columns: int,
    captions: Sequence[str] | None = None,
    scale: int = 2,
) -> Path:
    """Write a PNG of images in rows, each with its caption below.

    Args:
        path: The PNG to write.
        images_BCHW: [B, 3, H, W] in [0, 1]; values outside are clamped.
        columns: Images per row, at least 1.
        captions: B texts, wrapped to the width of a cell.
        scale: Each pixel becomes scale x scale pixels, without smoothing.

    Returns:
        The path written.

    Raises:
        ValueError: A shape, count or length does not fit.
    """
    pictures = _pictures(images_BCHW, scale)
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} images")
    columns = min(columns, len(pictures))
    width, height = pictures[0].size
    cell = max(width, _MIN_CELL) if captions is not None else width
    font = _font(12)
    texts = [_wrapped(c, font, cell) for c in captions] if captions else [[] for _ in pictures]
    line = round(12 * _LINE)

    starts = range(0, len(pictures), columns)
    text_heights = [max(len(t) for t in texts[s : s + columns]) * line for s in starts]
    row_heights = [height + (4 + t if t else 0) for t in text_heights]
    canvas, draw = _canvas(
        columns * cell + (columns - 1) * _GAP, sum(row_heights) + (len(row_heights) - 1) * _GAP
    )
    top = _MARGIN
    for start, row_height in zip(starts, row_heights):
        for column, index in enumerate(range(start, min(start + columns, len(pictures)))):
            left = _MARGIN + column * (cell + _GAP)
            _place(canvas, draw, pictures[index], left + (cell - width) // 2, top)
            for row, text in enumerate(texts[index]):
                place = (left + cell // 2, top + height + 4 + row * line)
                draw.text(place, text, font=font, fill=INK, anchor="ma")
        top += row_height + _GAP
    return _save(canvas, path)


def save_comparison(
    path: str | os.PathLike[str],
    columns: Mapping[str, Tensor],
    captions: Sequence[str],
    scale: int = 2,
    marks: Mapping[str, Sequence[bool | None]] | None = None,
) -> Path:
    """Write a PNG with one row per prompt and one column per model, for example base and tuned.

    Args:
        path: The PNG to write.
        columns: Heading to images [B, 3, H, W] in [0, 1], all of one shape; row b of each is the
            same prompt and seed.
        captions: B prompts, at the left of their rows.
        scale: Each pixel becomes scale x scale pixels, without smoothing.
        marks: Heading to B verdicts: True gives a blue frame and a tick, False a vermillion frame
            and a cross, None nothing. Columns without verdicts may be missing.

    Returns:
        The path written.

    Raises:
        ValueError: There is no column, or a shape, length or heading does not fit.
    """
    if not columns:
        raise ValueError("columns is empty; give at least one heading with its images")
    shapes = {heading: tuple(images.shape) for heading, images in columns.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"columns must have one shape; found {shapes}")
    pictures = {heading: _pictures(images, scale) for heading, images in columns.items()}
    num_rows = len(next(iter(pictures.values())))
    if len(captions) != num_rows:
        raise ValueError(f"{len(captions)} captions for {num_rows} rows of images")
    for heading, verdicts in (marks or {}).items():
        if heading not in columns or len(verdicts) != num_rows:
            raise ValueError(
                f"marks[{heading!r}] has {len(verdicts)} verdicts; expected {num_rows} for one of "
                f"the columns {list(columns)}"
            )

    width, height = next(iter(pictures.values()))[0].size
    font, bold, glyphs = _font(13), _font(14, bold=True), _font(16, bold=True)
    line = round(13 * _LINE)
    texts = [_wrapped(caption, font, _CAPTION_WIDTH) for caption in captions]
    headings = {heading: _wrapped(heading, bold, max(width, 72)) for heading in pictures}
    glyph_width = 20 if marks else 0
    cell = max(width + 2 * _FRAME, 72) + glyph_width
    header = max(len(rows) for rows in headings.values()) * round(14 * _LINE) + 6
    row_heights = [max(height + 2 * _FRAME, len(text) * line) for text in texts]
    canvas, draw = _canvas(
        _CAPTION_WIDTH + len(pictures) * (cell + _GAP), header + sum(row_heights) + num_rows * _GAP
    )
    lefts = [
        _MARGIN + _CAPTION_WIDTH + _GAP + column * (cell + _GAP) for column in range(len(pictures))
    ]
    for left, rows in zip(lefts, headings.values()):
        for row, text in enumerate(rows):
            draw.text((left + _FRAME, _MARGIN + row * round(14 * _LINE)), text, INK, bold)
    top = _MARGIN + header
    draw.line([(_MARGIN, top), (canvas.width - _MARGIN, top)], fill=FAINT, width=1)
    for index, (text, row_height) in enumerate(zip(texts, row_heights)):
        top += _GAP
        first = top + (row_height - len(text) * line) // 2
        for row, piece in enumerate(text):
            draw.text((_MARGIN, first + row * line), piece, font=font, fill=INK)
        above = top + (row_height - height - 2 * _FRAME) // 2
        for left, (heading, column) in zip(lefts, pictures.items()):
            verdict = (marks or {}).get(heading, [None] * num_rows)[index]
            _place(canvas, draw, column[index], left + _FRAME, above + _FRAME)
            if verdict is not None:
                colour = CORRECT if verdict else WRONG
                box = [left, above, left + width + 2 * _FRAME - 1, above + height + 2 * _FRAME - 1]
                draw.rectangle(box, outline=colour, width=_FRAME)
                place = (left + width + 2 * _FRAME + 4, above + height // 2 + _FRAME)
                draw.text(place, "✓" if verdict else "✗", colour, glyphs, anchor="lm")
        top += row_height
    return _save(canvas, path)


def _pictures(images_BCHW: Tensor, scale: int) -> list[Image]:
    from PIL import Image

    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or len(images_BCHW) == 0:
        raise ValueError(f"images have shape {tuple(images_BCHW.shape)}; expected [B, 3, H, W]")
    if scale < 1:
        raise ValueError(f"scale is {scale}; it must be at least 1")
    values = images_BCHW.detach().to("cpu").float().nan_to_num(0.0).clamp(0, 1)
    values = (values * 255).round().byte().permute(0, 2, 3, 1)
    pictures = [Image.fromarray(value.numpy()) for value in values.contiguous()]
    size = (pictures[0].width * scale, pictures[0].height * scale)
    return [picture.resize(size, Image.Resampling.NEAREST) for picture in pictures]


def _canvas(inner_width: int, inner_height: int) -> tuple[Image, ImageDraw]:
    from PIL import Image, ImageDraw

    size = (inner_width + 2 * _MARGIN, inner_height + 2 * _MARGIN)
    canvas = Image.new("RGB", size, "white")
    return canvas, ImageDraw.Draw(canvas)


def _place(canvas: Image, draw: ImageDraw, picture: Image, left: int, top: int) -> None:
    """Paste a picture with a hairline around it, for pictures as white as the canvas."""
    draw.rectangle(
        [left - 1, top - 1, left + picture.width, top + picture.height], outline=EDGE, width=1
    )
    canvas.paste(picture, (left, top))


@cache
def _font(size: int, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans from matplotlib, which brings the same file everywhere."""
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _wrapped(text: str, font: FreeTypeFont, width: int) -> list[str]:
    """The text in lines no wider than ``width`` pixels; a word too long is cut."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines if lines != [""] else []


def _save(canvas: Image, path: str | os.PathLike[str]) -> Path:
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return atomic_write(path, buffer.getvalue())
