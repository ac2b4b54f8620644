# SPDX-License-Identifier: Apache-2.0
"""GenEval: whether the objects, their numbers, colours and places are those of the prompt.

``rules`` judges detections, ``demands`` reads what a prompt asks for, ``models`` finds objects and
names colours, ``reward`` puts them together.
"""

from chunkgrpo.rewards.geneval.demands import demands, read_metadata
from chunkgrpo.rewards.geneval.models import ClipColorNamer, Detector, TransformersDetector
from chunkgrpo.rewards.geneval.reward import GenEvalReward
from chunkgrpo.rewards.geneval.rules import (
    COLORS,
    RELATIONS,
    ColorNamer,
    Detection,
    Judgement,
    Rules,
    judge,
    overlap,
    relations,
)

__all__ = [
    "COLORS",
    "RELATIONS",
    "ClipColorNamer",
    "ColorNamer",
    "Detection",
    "Detector",
    "GenEvalReward",
    "Judgement",
    "Rules",
    "TransformersDetector",
    "demands",
    "judge",
    "overlap",
    "read_metadata",
    "relations",
]
