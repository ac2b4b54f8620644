# SPDX-License-Identifier: Apache-2.0
"""What a reward answered, numbers or an exception, in the form in which it is checked and told."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.rewards.protocol import RewardError


def described(error: Exception) -> str:
    """Return an exception's type, place and message, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())}"


def as_scores(answer: Any, name: str) -> Tensor:
    """Turn what a reward returned into float32 on the CPU; None becomes NaN.

    Raises:
        RewardError: If it is neither a tensor nor an array nor a list of numbers.
    """
    if isinstance(answer, list | tuple):
        answer = [float("nan") if value is None else value for value in answer]
    try:
        return torch.as_tensor(answer).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            name, f"returned {answer!r:.80}, which is no list of numbers ({error})"
        ) from error
