# SPDX-License-Identifier: Apache-2.0
"""Whether the image shows the text that the prompt quotes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch

from chunkgrpo.rewards.images import byte_images, check_batch

QUOTES = {
    "\"": "\"", "“": "”", "„": "“”", "‟": "”", "«": "»", "»": "«", "‘": "’", "‚": "‘’", "‹": "›",
    "「": "」", "『": "』", "《": "》", "〈": "〉", "﹁": "﹂", "﹃": "﹄", "＂": "＂", 
    "〝": "〞〟",
}  # fmt: skip
"""An opening quotation mark, and those that close it."""
_ALL = {**QUOTES, "”": "”"}  # Swedish: the same mark opens and closes
_LETTER_LIKE = "'’‘\""
"""Marks that are an apostrophe, a foot or an inch behind a letter or a digit."""


def quoted_texts(prompt: str) -> list[str]:
    """Return all texts of a prompt in quotation marks, in their order.

    Double quotes, straight or typographic, guillemets, single typographic quotes and CJK brackets
    count. A mark behind a digit or letter (``5"``, ``don't``) is an inch or an apostrophe and opens
    nothing; a straight single quote never does. Marks inside a quotation belong to it.

    Returns:
        The texts with something to read in them; maybe none.
    """
    found, start = [], 0
    ends: dict[str, dict[int, int]] = {}
    while start < len(prompt):
        end = None
        if _opens(prompt, start):
            mark = prompt[start]
            if mark not in ends:
                ends[mark] = _ends(prompt, mark)
            end = ends[mark].get(start)
        if end is None:
            start += 1
            continue
        text = prompt[start + 1 : end]
        if plain(text):
            found.append(text)
        start = end + 1
    return found


def _opens(prompt: str, at: int) -> bool:
    """Whether the character opens a quotation."""
    mark = prompt[at]
    if mark not in _ALL:
        return False
    behind_a_word = at > 0 and prompt[at - 1].isalnum() and not _is_cjk(prompt[at - 1])
    return not (behind_a_word and (mark in _LETTER_LIKE or mark == "”"))


def _ends(prompt: str, mark: str) -> dict[int, int]:
    """Return where each quotation that this mark opens ends, by where it begins.

    One pass, however many marks there are: a prompt of nothing else must not take minutes.
    """
    closing, ends, opened = _ALL[mark], {}, []
    for found in re.finditer(f"[{re.escape(mark + closing)}]", prompt):
        at = found.start()
        if prompt[at] in closing:
            inside_a_word = prompt[at + 1 : at + 2].isalnum() and prompt[at - 1].isalnum()
            if prompt[at] == "’" and inside_a_word:
                continue  # an apostrophe
            if opened:
                ends[opened.pop()] = at
        if prompt[at] == mark:
            opened.append(at)
    return ends


def _is_cjk(letter: str) -> bool:
    """Whether a letter is of a script without spaces between words."""
    return unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"))


def quoted_text(prompt: str) -> str:
    """Return what the image shall show: all quoted texts of a prompt, joined by spaces.

    Flow-GRPO's prompts quote one text each; of several, all are asked for, in their order.

    Raises:
        ValueError: If the prompt quotes nothing.
    """
    found = quoted_texts(prompt)
    if not found:
        raise ValueError(
            f"reward 'ocr': the prompt {prompt!r} quotes no text; "
            'put what the image shall show in double quotes, as in: a sign that says "Open"'
        )
    return " ".join(found)


def plain(text: str) -> str:
    """Return a text without white space, without case and with one form for each letter."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of letters that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            kept = diagonal if letter == other else diagonal + 1
            diagonal, row[j] = row[j], min(kept, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def text_score(read: str, target: str) -> float:
    r"""How much of a text was rendered, from what was read.

    .. math:: r = 1 - \min(d(read, target), |target|) / |target|

    with d the edit distance, 0 where the target is part of what was read: further text costs
    nothing once the target is complete. White space and case do not count.

    Args:
        read: What was read, in reading order.
        target: What the prompt asked for; at least one letter.

    Returns:
        A number in [0, 1], 1 where the target is there.

    Reference: Flow-GRPO, arXiv:2505.05470, section 5.1 and its implementation.
    """
    read, target = plain(read), plain(target)
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


class OcrReward:
    """Read the image and compare with the text that the prompt puts in double quotes.

    Scores are those of :func:`text_score`, in [0, 1]. Reading is by RapidOCR with the models that
    its package ships, on the CPU and one image at a time.

    Args:
        limit_side_len: Images whose shorter side is below this many pixels are enlarged to it
            before text is looked for. 160 reads words in images of 64 to 512 pixels several times
            faster than RapidOCR's own 736; raise it if small print matters.
        min_confidence: Lines read with less confidence than this are left out; 0 keeps all. The
            default is the threshold that PaddleOCR, which Flow-GRPO reads with, applies itself.
        threads: Threads of the recogniser; -1 lets it choose.
        name: What metrics are filed under.

    Raises:
        ImportError: If RapidOCR or ONNX Runtime is not installed.
        ValueError: If an option is out of its range.

    Reference: Flow-GRPO, arXiv:2505.05470, section 5.1.
    """

    share = True

    def __init__(
        self,
        limit_side_len: int = 160,
        min_confidence: float = 0.5,
        threads: int = -1,
        name: str = "ocr",
    ) -> None:
        if limit_side_len < 32:
            raise ValueError(f"limit_side_len is {limit_side_len}; expected 32 or more pixels")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence is {min_confidence}; expected a number in [0, 1]")
        try:
            import onnxruntime  # noqa: F401  (RapidOCR reports its absence only at the first image)
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                f"reward {name!r} needs rapidocr and onnxruntime ({error}); "
                "install them with: pip install 'chunkgrpo[ocr]'"
            ) from error
        self.name = name
        self.engine = RapidOCR(
            params={
                "Det.limit_side_len": limit_side_len,
                "Global.text_score": min_confidence,
                "Global.log_level": "critical",
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            }
        )

    def read(self, image: np.ndarray) -> str:
        """Return the text in an image [H, W, 3] of ``uint8``, RGB; lines joined by a space."""
        output = self.engine(np.ascontiguousarray(image[..., ::-1]))  # it expects BGR
        return " ".join(getattr(output, "txts", None) or ())

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that quote no text.

        Raises:
            ValueError: Naming the first one.
        """
        for prompt in prompts:
            quoted_text(prompt)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B].

        Raises:
            ValueError: If a prompt quotes no text.
        """
        check_batch(images, prompts)
        targets = [quoted_text(prompt) for prompt in prompts]
        scores = [
            text_score(self.read(image), target)
            for image, target in zip(byte_images(images), targets)
        ]
        return torch.tensor(scores, dtype=torch.float32)
