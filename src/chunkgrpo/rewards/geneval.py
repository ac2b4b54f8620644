# SPDX-License-Identifier: Apache-2.0
"""GenEval: are the objects there, as many, in those colours and places as the prompt says?

Three parts: the rules (:func:`judge`), which see detections only; what finds objects (a
:class:`Detector`); and what names colours (a :class:`ColorNamer`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkgrpo.rewards.images import check_batch, rounded
from chunkgrpo.rewards.loading import (
    check_source,
    dtype_of,
    fix_attention,
    freeze,
    load,
    load_model,
    place,
)

COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# GenEval's names for classes that detectors trained on COCO call otherwise.
COCO_TO_GENEVAL = {
    "remote": "tv remote",
    "mouse": "computer mouse",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
CROP_BACKGROUND = 0x99 / 255  # what surrounds an object whose mask is known

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """One object found in an image.

    Attributes:
        label: GenEval's name of its class.
        score: Confidence in [0, 1].
        box: (left, top, right, bottom) in pixels.
        mask: Which pixels are the object's, bool [H, W]; None where unknown.
    """

    label: str
    score: float
    box: Box
    mask: Tensor | None = None


class Detector(Protocol):
    """Finds objects in images.

    A detector that can find certain classes only may say which, by GenEval's names, in an attribute
    ``classes``; prompts that demand others are then refused. Without it, or where it is None, the
    detector is taken to find whatever it is asked for.
    """

    def __call__(
        self, images: Tensor, labels: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[Detection]]:
        """Return what is in images [B, 3, H, W] in [0, 1], at any confidence.

        Args:
            images: [B, 3, H, W] in [0, 1].
            labels: For each image, the classes that matter; others may be left out.
        """
        ...


class ColorNamer(Protocol):
    """Names the colours of objects."""

    def __call__(self, image: Tensor, detections: Sequence[Detection]) -> Sequence[str]:
        """Return one of :data:`COLORS` for each detection in an image [3, H, W] in [0, 1]."""
        ...


@dataclass(frozen=True)
class Rules:
    """Thresholds of GenEval. The defaults are the benchmark's, for its Mask2Former.

    Attributes:
        confidence: Objects must be found with more confidence than this.
        counting_confidence: The same for prompts of the task ``counting``.
        max_objects: Objects of a class that are looked at, the surest first.
        max_overlap: Of two objects of a class whose boxes overlap by this or more (intersection
            over union), the less sure one is dropped; 1 keeps all.
        position_margin: Objects must be apart by this share of their summed sizes to be beside
            one another.
    """

    confidence: float = 0.3
    counting_confidence: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1

    def __post_init__(self) -> None:
        for field in ("confidence", "counting_confidence", "max_overlap", "position_margin"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a number in [0, 1]")
        if self.max_objects < 1:
            raise ValueError(f"max_objects is {self.max_objects}; expected 1 or more")


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, whose last row and column count as inside."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return shared / (area(*a) + area(*b) - shared)


def relations(a: Box, b: Box, margin: float) -> set[str]:
    """Where box ``a`` is, seen from box ``b``: some of :data:`RELATIONS`, or none.

    The offset of the centres is shortened, in each direction, by ``margin`` times the boxes'
    summed extents; what remains must exceed half the offset's full length.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    extent = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    left = [max(abs(o) - margin * e, 0.0) for o, e in zip(offset, extent)]
    if max(left) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    found = set()
    for axis, (before, after) in enumerate((("left of", "right of"), ("above", "below"))):
        if left[axis] / length > 0.5:
            found.add(before if offset[axis] < 0 else after)
    return found


def kept(detections: Sequence[Detection], tag: str, rules: Rules) -> dict[str, list[Detection]]:
    """Group detections by class, the surest first, without the unsure, surplus and doubled."""
    least = rules.counting_confidence if tag == "counting" else rules.confidence
    groups: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > least:
            groups.setdefault(detection.label, []).append(detection)
    for label, group in groups.items():
        chosen: list[Detection] = []
        for detection in group[: rules.max_objects]:
            if rules.max_overlap >= 1 or all(
                overlap(detection.box, other.box) < rules.max_overlap for other in chosen
            ):
                chosen.append(detection)
        groups[label] = chosen
    return groups


@dataclass(frozen=True)
class Judgement:
    """Whether an image is right, and if not, why.

    Attributes:
        correct: Whether every demand is met.
        reasons: One sentence per unmet demand.
    """

    correct: bool
    reasons: tuple[str, ...]


def judge(
    image: Tensor,
    detections: Sequence[Detection],
    metadata: Mapping[str, Any],
    colors: ColorNamer | None,
    rules: Rules | None = None,
) -> Judgement:
    """Judge an image by GenEval's rules.

    Every entry of ``include`` must be met: at least ``count`` objects of the class; where a
    ``color`` is named, all of the ``count`` surest ones have it; where a ``position`` is named,
    each of them is there seen from each object of the entry it refers to. No entry of ``exclude``
    may be met: ``count`` or more objects of the class.

    Args:
        image: [3, H, W] in [0, 1], for the colours.
        detections: What was found in it.
        metadata: A line of GenEval's ``evaluation_metadata.jsonl``.
        colors: Names colours; may be None where no entry has one.
        rules: Thresholds; None for GenEval's.

    Raises:
        ValueError: If a colour is demanded and ``colors`` is None.

    Reference: GenEval, arXiv:2310.11513, section 3 and its implementation.
    """
    rules = rules or Rules()
    found = kept(detections, metadata["tag"], rules)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for entry in metadata.get("include", ()):
        label, count = entry["class"], entry["count"]
        objects = found.get(label, [])[:count]
        before = len(reasons)
        if len(objects) < count:
            reasons.append(f"expected {count} {label}, found {len(objects)}")
        else:
            if "color" in entry:
                reasons += _wrong_colors(image, objects, entry["color"], colors)
            if "position" in entry and len(reasons) == before:
                relation, target = entry["position"]
                reasons += _wrong_places(objects, label, relation, matched[target], rules)
        matched.append(objects if len(reasons) == before else None)
    for entry in metadata.get("exclude", ()):
        number = len(found.get(entry["class"], ()))
        if number >= entry["count"]:
            reasons.append(f"expected fewer than {entry['count']} {entry['class']}, found {number}")
    return Judgement(not reasons, tuple(reasons))


def _wrong_colors(
    image: Tensor, objects: Sequence[Detection], wanted: str, colors: ColorNamer | None
) -> list[str]:
    if colors is None:
        raise ValueError(
            f"the colour {wanted!r} is asked for, but there is nothing to name colours"
        )
    named = list(colors(image, objects))
    if all(color == wanted for color in named):
        return []
    return [f"expected {wanted} {objects[0].label}, found {' and '.join(named)}"]


def _wrong_places(
    objects: Sequence[Detection],
    label: str,
    relation: str,
    targets: Sequence[Detection] | None,
    rules: Rules,
) -> list[str]:
    if targets is None:
        return [f"nothing for {label} to be {relation}"]
    for thing in objects:
        for target in targets:
            seen = relations(thing.box, target.box, rules.position_margin)
            if relation not in seen:
                where = " and ".join(sorted(seen)) or "at the same place as"
                return [f"expected {label} {relation} {target.label}, found {where}"]
    return []


def read_metadata(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read GenEval's lines, by prompt.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not JSON, lacks something, names something unknown, or
            contradicts an earlier line of the same prompt; the message holds its number.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"reward 'geneval': there is no file at {file}; give GenEval's "
            "evaluation_metadata.jsonl, or lines like it for your own prompts"
        )
    lines: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = without_empty(json.loads(text))
            _check_line(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: {error!r}") from error
        if lines.setdefault(line["prompt"], line) != line:
            raise ValueError(
                f"{file}, line {number}: the prompt {line['prompt']!r} appears before with other "
                "demands; one prompt can have one meaning only"
            )
    if not lines:
        raise ValueError(f"{file} holds no lines")
    return lines


def without_empty(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line without fields that are None, as tables store what a record does not have."""
    cleaned = {name: value for name, value in line.items() if value is not None}
    for name in ("include", "exclude"):
        if isinstance(cleaned.get(name), list):
            cleaned[name] = [
                {k: v for k, v in entry.items() if v is not None} for entry in cleaned[name]
            ]
    return cleaned


def demands(prompt: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the demands of a prompt, in the form of a line, from what its source says of it.

    Args:
        prompt: The text.
        known: With ``tag``, ``include`` and perhaps ``exclude``, as in a line of GenEval's
            ``evaluation_metadata.jsonl``.

    Raises:
        ValueError: If something is missing or unknown, naming the prompt.
    """
    fields = {name: known.get(name) for name in ("tag", "include", "exclude")}
    missing = [name for name in ("tag", "include") if fields[name] is None]
    if missing:
        raise ValueError(
            f"nothing says what the prompt {prompt!r} demands: its record has no "
            f"{' and no '.join(missing)}; train on a .jsonl file with lines as in GenEval's "
            "evaluation_metadata.jsonl (--prompts FILE), or name one with demands for your prompts "
            "as option metadata"
        )
    try:
        line = without_empty({**fields, "prompt": prompt})
        _check_line(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the demands of the prompt {prompt!r} are wrong: {error!r}") from error
    return line


def entries(line: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the entries of a line, of ``include`` and of ``exclude``."""
    yield from line["include"]
    yield from line.get("exclude", ())


def _check_line(line: Mapping[str, Any]) -> None:
    if line["tag"] not in TAGS:
        raise ValueError(f"unknown tag {line['tag']!r}; known: {', '.join(TAGS)}")
    if not isinstance(line["prompt"], str):
        raise ValueError("prompt is not text")
    for i, entry in enumerate(line["include"]):
        if not isinstance(entry["class"], str) or int(entry["count"]) < 1:
            raise ValueError(f"{entry} needs a class and a count of 1 or more")
        if entry.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"unknown color {entry['color']!r}; known: {', '.join(COLORS)}")
        if "position" in entry:
            relation, target = entry["position"]
            if relation not in RELATIONS or not 0 <= target < i:
                raise ValueError(
                    f"position {entry['position']} is not one of {RELATIONS} and an earlier entry"
                )
    for entry in line.get("exclude", ()):
        if not isinstance(entry["class"], str) or int(entry["count"]) < 1:
            raise ValueError(f"{entry} needs a class and a count of 1 or more")


def geneval_name(label: str) -> str:
    """Return GenEval's name of a detector's class."""
    return COCO_TO_GENEVAL.get(label, label)


class TransformersDetector:
    """Finds objects with a detection model of transformers.

    Models with fixed classes (DETR, RT-DETR, ...) find what they were trained on; COCO's names
    are translated to GenEval's. Zero-shot models that take a list of texts (OWL-ViT, OWLv2) are
    asked for the classes that matter for the image, as "a photo of a ...". Either finds boxes, not
    masks, so colours are named by all of a box, background included.

    Args:
        model: Checkpoint folder or hub id.
        floor: Objects found with less confidence are never reported.
        precision: ``"fp32"`` or ``"bf16"``.
        device: Where to compute; None follows the images.
        batch_size: Images at once; zero-shot models take one at a time.

    Raises:
        OSError: If the checkpoint can not be loaded.
    """

    def __init__(
        self,
        model: str,
        floor: float = 0.05,
        precision: str = "fp32",
        device: str | None = None,
        batch_size: int = 8,
    ) -> None:
        from transformers import (
            MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
            AutoConfig,
            AutoImageProcessor,
            AutoModelForObjectDetection,
            AutoModelForZeroShotObjectDetection,
            AutoTokenizer,
        )

        self.floor, self.device, self.batch_size = floor, device, batch_size
        config = load("geneval", model, AutoConfig.from_pretrained)
        self.zero_shot = type(config) in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING
        kind: Any = AutoModelForObjectDetection
        if self.zero_shot:
            if not hasattr(config, "text_config") or config.model_type not in {"owlvit", "owlv2"}:
                raise ValueError(
                    f"{model} is a zero-shot detector of type {config.model_type!r}; supported "
                    "are owlvit and owlv2, and detectors with fixed classes"
                )
            kind = AutoModelForZeroShotObjectDetection
            self.tokenizer = load("geneval", model, AutoTokenizer.from_pretrained)
        self.model = load_model("geneval", model, kind, dtype_of(precision))
        self.processor = load("geneval", model, AutoImageProcessor.from_pretrained)
        fix_attention(self.model)
        freeze(self.model)

    @property
    def classes(self) -> frozenset[str] | None:
        """GenEval's names of the classes it can find; None for any."""
        if self.zero_shot:
            return None
        return frozenset(geneval_name(name) for name in self.model.config.id2label.values())

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Return what is in images [B, 3, H, W] in [0, 1]."""
        device = place(self.model, self.device, images)
        arrays = list(rounded(images).to("cpu", torch.uint8))
        found: list[list[Detection]] = []
        step = 1 if self.zero_shot else self.batch_size
        for start in range(0, len(arrays), step):
            part = arrays[start : start + step]
            inputs = self.processor(
                images=[array.numpy() for array in part],
                input_data_format="channels_first",
                return_tensors="pt",
            )
            tensors = {name: tensor.to(device) for name, tensor in inputs.items()}
            tensors["pixel_values"] = tensors["pixel_values"].to(self.model.dtype)
            names: Mapping[int, str] = self.model.config.id2label
            if self.zero_shot:
                names = dict(enumerate(labels[start]))
                tensors |= self.queries(labels[start], device)
            output = self.model(**tensors)
            output.logits, output.pred_boxes = output.logits.float(), output.pred_boxes.float()
            sizes = torch.tensor([array.shape[-2:] for array in part], device=device)
            for result in self.processor.post_process_object_detection(
                output, threshold=self.floor, target_sizes=sizes
            ):
                found.append(
                    [
                        Detection(geneval_name(names[label]), score, tuple(box))
                        for label, score, box in zip(
                            result["labels"].tolist(),
                            result["scores"].tolist(),
                            result["boxes"].tolist(),
                        )
                    ]
                )
        return found

    def queries(self, labels: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Return the tokens of a zero-shot model's questions, one per class."""
        tokens = self.tokenizer(
            [f"a photo of a {label}" for label in labels],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


class ClipColorNamer:
    """Names colours by CLIP, zero-shot, on the crop of each object.

    Each colour is the mean of three texts' unit embeddings ("a photo of a red cup", "a photo of a
    red-colored cup", "a photo of a red object"); the colour nearest the crop's embedding wins.
    Where a mask is known, what is around the object is painted grey.

    Args:
        model: Checkpoint folder or hub id of a ``CLIPModel``.
        precision: ``"fp32"`` or ``"bf16"``.
        device: Where to compute; None follows the images.

    Raises:
        OSError: If the checkpoint can not be loaded.

    Reference: GenEval, arXiv:2310.11513, section 3.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        precision: str = "fp32",
        device: str | None = None,
    ) -> None:
        from transformers import CLIPModel

        from chunkgrpo.rewards.clip_features import DualEncoder

        network = load_model("geneval", model, CLIPModel, dtype_of(precision))
        self.encoder = DualEncoder("geneval", network, model, device, batch_size=16)

    def classifier(self, label: str, device: torch.device) -> Tensor:
        """Return the unit embedding of each colour of an object of that class: [10, D]."""
        templates = ("a photo of a {} " + label, "a photo of a {}-colored " + label)
        texts = [
            template.format(color)
            for color in COLORS
            for template in (*templates, "a photo of a {} object")
        ]
        embedded = self.encoder.embed_texts(texts, device).view(len(COLORS), 3, -1)
        return F.normalize(embedded.mean(dim=1), dim=-1)

    def crop(self, image: Tensor, detection: Detection) -> Tensor:
        """Return the object of an image [3, H, W], cut out, at least one pixel in size."""
        if detection.mask is not None:
            inside = detection.mask.to(image.device, torch.bool)
            image = torch.where(inside, image, torch.full_like(image, CROP_BACKGROUND))
        height, width = image.shape[-2:]
        left, top, right, bottom = (round(edge) for edge in detection.box)
        left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
        return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]

    def __call__(self, image: Tensor, detections: Sequence[Detection]) -> list[str]:
        """Return the colour of each detection in an image [3, H, W] in [0, 1]."""
        names = []
        for detection in detections:
            embedded = self.encoder.embed_images(self.crop(image, detection)[None])
            classifier = self.classifier(detection.label, embedded.device)
            names.append(COLORS[int((embedded @ classifier.T).argmax())])
        return names


class GenEvalReward:
    """1 where an image holds what its prompt demands by GenEval's rules, else 0.

    The demands are those of the prompts' own source: train on GenEval's
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
        max_objects: Objects of a class that are looked at, the surest first.
        max_overlap: Of two objects of a class that overlap by this or more, the less sure one is
            dropped; 1 keeps all.
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
            metadata: What their source says of each; not looked at where there is a file.

        Raises:
            ValueError: If a prompt has no demands or wrong ones, or the detector can not find what
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
                    f"the detector can not find: it knows {len(known)} classes, such as "
                    f"{', '.join(sorted(known)[:3])}; leave these prompts out, or name another "
                    "detector as option detector (zero-shot ones, as OWLv2, find any class)"
                )
        return lines

    def check_prompts(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Refuse prompts without demands, with contradictory ones, or that can not be judged.

        Raises:
            ValueError: Naming the first one; see :meth:`lines`.
        """
        lines = self.lines(prompts, metadata)
        by_prompt: dict[str, dict[str, Any]] = {}
        for line in lines:
            if by_prompt.setdefault(line["prompt"], line) != line:
                raise ValueError(
                    f"reward {self.name!r}: the prompt {line['prompt']!r} appears with two "
                    "demands; one prompt can have one meaning only"
                )
        self._load_colors(lines)

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
            metadata: What their source says of each, B mappings; needed where no file was given.
        """
        judged = self.judgements(images, prompts, metadata)
        return torch.tensor([float(judgement.correct) for judgement in judged])
