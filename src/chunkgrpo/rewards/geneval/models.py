# SPDX-License-Identifier: Apache-2.0
"""The networks of GenEval: one detects objects, one names their colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkgrpo.rewards.geneval.rules import COLORS, Detection
from chunkgrpo.rewards.images import rounded
from chunkgrpo.rewards.loading import dtype_of, fix_attention, freeze, load, load_model, place

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
        OSError: If the checkpoint cannot be loaded.
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
        OSError: If the checkpoint cannot be loaded.

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
