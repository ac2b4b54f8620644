# SPDX-License-Identifier: Apache-2.0
"""The GenEval reward: the rules of the benchmark, applied to detections in the images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.rewards.geneval.demands import demands, entries, read_metadata
from chunkgrpo.rewards.geneval.models import ClipColorNamer, Detector, TransformersDetector
from chunkgrpo.rewards.geneval.rules import ColorNamer, Judgement, Rules, judge
from chunkgrpo.rewards.images import check_batch
from chunkgrpo.rewards.loading import check_source


class GenEvalReward:
    """1 where an image holds what its prompt demands by GenEval's rules, else 0.

    The demands come from the prompts' own records: train on GenEval's
    ``evaluation_metadata.jsonl``, or on lines like it. For prompts from elsewhere, ``metadata`` is
    a file that has such a line for every prompt.

    Official scores are Mask2Former's, whose masks also take the background out of what colours are
    named by; with another detector they are not comparable to published ones, and the thresholds
    want adjusting (a zero-shot model is rarely 0.9 sure of anything).

    Args:
        metadata: Path of a file of lines; None takes each prompt's own record.
        detector: Folder or hub id of a detection model (:class:`TransformersDetector`), or a
            :class:`Detector` of your own.
        color_model: Folder or hub id of the CLIP that names colours, or a :class:`ColorNamer` of
            your own; loaded with the first prompt that names a colour.
        confidence: Objects must be found with more confidence than this.
        counting_confidence: The same for prompts of the task ``counting``.
        max_objects: Objects of a class that count, those of highest confidence first.
        max_overlap: Of two objects of a class that overlap by this or more, the one of lower
            confidence is removed; with 1 none is.
        position_margin: Share of the summed sizes that objects must be apart.
        precision: ``"fp32"`` or ``"bf16"``.
        device: Where to compute; None follows the images.
        name: What metrics are filed under.

    Raises:
        FileNotFoundError: If the file or a checkpoint's folder is missing.
        ValueError: If a line of the file or an option is wrong.

    Reference: GenEval, arXiv:2310.11513.
    """

    share = True

    def __init__(
        self,
        metadata: str | Path | None = None,
        detector: str | Detector = "PekingU/rtdetr_r101vd_coco_o365",
        color_model: str | ColorNamer = "openai/clip-vit-large-patch14",
        confidence: float = 0.3,
        counting_confidence: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        position_margin: float = 0.1,
        precision: str = "fp32",
        device: str | None = None,
        name: str = "geneval",
    ) -> None:
        self.name = name
        self.rules = Rules(
            confidence, counting_confidence, max_objects, max_overlap, position_margin
        )
        self.needs_metadata = metadata is None
        self.metadata = {} if metadata is None else read_metadata(metadata)
        if isinstance(detector, str):
            check_source(name, detector)
            floor = min(confidence, counting_confidence)
            detector = TransformersDetector(detector, floor, precision, device)
        self.detector: Detector = detector
        self.color_model, self.precision, self.device = color_model, precision, device
        self.colors: ColorNamer | None = None
        self._load_colors(self.metadata.values())

    def _load_colors(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Load what names colours, if a line names one and nothing is loaded yet."""
        if self.colors is None and any("color" in e for line in lines for e in line["include"]):
            model = self.color_model
            if isinstance(model, str):
                model = ClipColorNamer(model, self.precision, self.device)
            self.colors = model

    def lines(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> list[dict[str, Any]]:
        """Return the demands of each prompt, as lines of GenEval's metadata.

        Args:
            prompts: B texts.
            metadata: Of each prompt; not read where there is a file.

        Raises:
            ValueError: If a prompt has no demands or wrong ones, or the detector cannot find what
                it demands.
        """
        if self.needs_metadata:
            try:
                pairs = zip(prompts, metadata or [{}] * len(prompts), strict=True)
                lines = [demands(prompt, known) for prompt, known in pairs]
            except ValueError as error:
                raise ValueError(f"reward {self.name!r}: {error}") from error
        else:
            lines = []
            for prompt in prompts:
                if prompt not in self.metadata:
                    raise ValueError(
                        f"reward {self.name!r}: the metadata has no line for the prompt "
                        f"{prompt!r}; add one with its tag, include and exclude"
                    )
                lines.append(self.metadata[prompt])
        known = getattr(self.detector, "classes", None)
        if known is not None:
            wanted = dict.fromkeys(entry["class"] for line in lines for entry in entries(line))
            strange = [label for label in wanted if label not in known]
            if strange:
                raise ValueError(
                    f"reward {self.name!r}: prompts ask for {', '.join(map(repr, strange))}, which "
                    f"the detector cannot find: it knows {len(known)} classes, such as "
                    f"{', '.join(sorted(known)[:3])}; leave these prompts out, or name another "
                    "detector as option detector (zero-shot ones, as OWLv2, find any class)"
                )
        return lines

    def check_prompts(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Refuse prompts without demands, or that cannot be judged.

        One text with two demands is two prompts: each is judged by its own.

        Raises:
            ValueError: Naming the first one; see :meth:`lines`.
        """
        self._load_colors(self.lines(prompts, metadata))

    def judgements(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Judgement]:
        """Judge images [B, 3, H, W] in [0, 1], with reasons.

        Raises:
            ValueError: See :meth:`lines`.
        """
        check_batch(images, prompts)
        lines = self.lines(prompts, metadata)
        self._load_colors(lines)
        labels = [list(dict.fromkeys(entry["class"] for entry in entries(line))) for line in lines]
        found = self.detector(images, labels)
        return [
            judge(image, detections, line, self.colors, self.rules)
            for image, detections, line in zip(images.detach(), found, lines)
        ]

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B], 0 or 1.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B texts.
            metadata: Of each prompt, B mappings; needed where no file was given.
        """
        judged = self.judgements(images, prompts, metadata)
        return torch.tensor([float(judgement.correct) for judgement in judged])
