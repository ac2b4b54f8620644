# SPDX-License-Identifier: Apache-2.0
"""The embedded world: a miniature of the GenEval benchmark that a laptop can train on.

``scenes`` renders what ``grammar`` asks for, ``verifier`` checks an image against it, and
``pretrain`` trains the pipeline and the CLIP whose weights are included.
"""

from pathlib import Path


def pipeline_path() -> Path:
    """Return the embedded pipeline's folder, for ``DiffusionPipeline.from_pretrained``."""
    return Path(__file__).parent / "weights" / "pipeline"


def clip_path() -> Path:
    """Return the folder of the embedded world's CLIP, for ``CLIPModel.from_pretrained``."""
    return Path(__file__).parent / "weights" / "clip"
