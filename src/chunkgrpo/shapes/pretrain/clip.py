# SPDX-License-Identifier: Apache-2.0
"""The embedded world's CLIP: a small ``CLIPModel`` that tells matching captions from others."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from chunkgrpo.runtime.attention import plain_attention
from chunkgrpo.shapes import grammar
from chunkgrpo.shapes.build import PROMPT_TOKENS, clip_tokenizer
from chunkgrpo.shapes.pretrain.common import Average, OptimizerPair, Round, StageLog, save_state
from chunkgrpo.shapes.pretrain.pairs import Captions, Trial, draw_pairs, trials
from chunkgrpo.shapes.scenes import IMAGE_SIZE

MEAN = STD = 0.5
LARGEST_SCALE = 50.0
NOT_HIDDEN = ("embedding", "projection")
SAVE_EVERY = 100  # steps
NUM_TRIALS = 240  # images per split of an evaluation


@dataclass(frozen=True)
class ClipSize:
    """Widths and depths of both towers.

    Attributes:
        width, layers: Of the vision tower; heads are ``width // 32``.
        text_width, text_layers: Of the text tower; heads are ``text_width // 32``.
        projection: Elements of an embedding.
        patch: Side of a patch in pixels.
    """

    width: int = 128
    layers: int = 4
    text_width: int = 96
    text_layers: int = 3
    projection: int = 64
    patch: int = 8


TINY_CLIP = ClipSize(width=32, layers=1, text_width=32, text_layers=1, projection=16, patch=16)
"""For tests."""


@dataclass(frozen=True)
class ClipSettings:
    """Settings of the CLIP's training; the defaults are those of the shipped one.

    Attributes:
        seed: Seed of scenes, captions and weights.
        steps: Optimizer steps.
        twins: Pairs of scenes per step.
        size: Widths and depths.
        evaluate_every: Steps between evaluations on held-out pairs.
        threads: CPU threads; 0 leaves torch's default.
    """

    seed: int = 0
    steps: int = 1500
    twins: int = 48
    size: ClipSize = field(default_factory=ClipSize)
    evaluate_every: int = 200
    threads: int = 0


def build_clip(size: ClipSize | None = None, seed: int = 0) -> Any:
    """Return a ``CLIPModel`` with random weights for images of 64 x 64, in float32."""
    from transformers import CLIPConfig, CLIPModel

    size = size or ClipSize()
    tokenizer = clip_tokenizer(grammar.words())
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_width,
        "intermediate_size": 4 * size.text_width,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_width // 32,
        "max_position_embeddings": PROMPT_TOKENS,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
        "image_size": IMAGE_SIZE,
        "patch_size": size.patch,
        "hidden_act": "gelu",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.projection)
        )


def pixel_values(images: np.ndarray) -> Tensor:
    """Return uint8 images [B, 64, 64, 3] as the image processor does, [B, 3, 64, 64]."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def contrastive_loss(
    cosines_BM: Tensor, scale: Tensor, fits_BM: Tensor, unclear_BM: Tensor
) -> Tensor:
    r"""CLIP's symmetric loss where captions may be true of several images.

    .. math:: L = \tfrac12 \big[ \mathrm{mean}_i\, CE(s\,c_{i\cdot}, i)
        + \mathrm{mean}_{i} CE(s\,c_{\cdot i}, i) \big]

    Each image chooses its own caption among all M that are wrong for it, each image's caption its
    own image among all B that it is wrong for; what also fits, or is unclear, is left out.

    Args:
        cosines_BM: Of image i and caption j, [B, M], M >= B; caption i < B is image i's own.
        scale: s, above 0.
        fits_BM, unclear_BM: See :class:`~chunkgrpo.shapes.pretrain.pairs.PairBatch`.

    Reference: CLIP, arXiv:2103.00020, section 2.3; captions nearly right as in NegCLIP,
        arXiv:2210.01936, section 4.
    """
    number = len(cosines_BM)
    own = torch.arange(number)
    left_out = fits_BM | unclear_BM
    left_out[own, own] = False
    logits = (scale * cosines_BM).masked_fill(left_out, -math.inf)
    by_image = F.cross_entropy(logits, own)
    by_caption = F.cross_entropy(logits[:, :number].T, own)
    return (by_image + by_caption) / 2


Score = Callable[[Tensor, Sequence[str]], Tensor]


def matching_accuracy(score: Score, found: Sequence[Trial]) -> dict[str, float]:
    """Return how often the fitting caption scores above the other one.

    Args:
        score: Images [B, 3, 64, 64] in [0, 1] and B captions to B scores, such as a reward.
        found: See :func:`~chunkgrpo.shapes.pretrain.pairs.trials`.

    Returns:
        Shares in [0, 1]: for each kind, and for each task by its kind as ``task/kind``. A tie
        counts as wrong.
    """
    images = torch.from_numpy(np.stack([t.image for t in found])).permute(0, 3, 1, 2).float() / 255
    right = score(images, [t.right for t in found])
    wrong = score(images, [t.wrong for t in found])
    groups: dict[str, list[bool]] = defaultdict(list)
    for trial, better in zip(found, (right > wrong).tolist(), strict=True):
        groups[trial.kind].append(better)
        groups[f"{trial.task}/{trial.kind}"].append(better)
    return {name: sum(group) / len(group) for name, group in sorted(groups.items())}


def train_clip(out: Path, settings: ClipSettings | None = None) -> Path:
    """Train the embedded CLIP from scratch and save it.

    Args:
        out: Folder for the work in progress (``work/``), the log, the checksum and the checkpoint
            (``clip/``). Running again with the same folder and settings continues where it stopped.
        settings: What to train; the shipped checkpoint's by default.

    Returns:
        The checkpoint's folder, for ``CLIPModel.from_pretrained``.
    """
    s = settings or ClipSettings()
    if s.threads:
        torch.set_num_threads(s.threads)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer(grammar.words())
    model = build_clip(s.size, s.seed).train()
    fit(model, tokenizer, work, s)
    folder = out / "clip"
    # Half the size; whoever computes with it widens it again.
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    shutil.copy(work / "clip.jsonl", out / "clip.jsonl")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    sums = {"clip/model.safetensors": digest}
    (out / "clip-checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    return folder


def image_processor() -> Any:
    """Return the image processor of the checkpoint."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )


def fit(model: Any, tokenizer: Any, work: Path, s: ClipSettings) -> None:
    """Train in place; ends with the averaged weights. Resumes from ``work/clip.pt``."""
    captions = Captions()
    tokens = tokenizer(captions.texts, padding="max_length", return_tensors="pt").input_ids
    optimizers = OptimizerPair(
        model.named_parameters(), 0.015, 2e-3, (Round(s.steps, fall=0.8),), 50, NOT_HIDDEN
    )
    average = Average(model, min(0.998, 1 - 8 / s.steps))
    checkpoint, start = work / "clip.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        average.values, start = state["average"], state["step"]
    log = StageLog(work / "clip.jsonl", "clip", s.steps)
    running = math.nan
    for step in range(start, s.steps):
        batch = draw_pairs(captions, s.twins, np.random.default_rng([s.seed, step]))
        with plain_attention(), torch.autocast("cpu", torch.bfloat16):
            images = model.vision_model(pixel_values=pixel_values(batch.images)).pooler_output
            texts = model.text_model(input_ids=tokens[batch.captions]).pooler_output
            images, texts = model.visual_projection(images), model.text_projection(texts)
        cosines = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        fits, unclear = torch.from_numpy(batch.fits), torch.from_numpy(batch.unclear)
        loss = contrastive_loss(cosines, model.logit_scale.exp(), fits, unclear)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(step)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        average.update(model, step)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        last = step == s.steps - 1
        if step % 50 == 0 or last:
            values = {"loss": running, "scale": model.logit_scale.exp().item()}
            if (step and step % s.evaluate_every == 0) or last:
                values |= averaged_accuracy(model, tokenizer, average)
            log.write(step, **values)
        if step % SAVE_EVERY == SAVE_EVERY - 1 or last:
            state = {"model": model.state_dict(), "optimizers": optimizers.state_dict()}
            save_state(checkpoint, state | {"average": average.values, "step": step + 1})
    average.copy_to(model)


@torch.no_grad()
def averaged_accuracy(model: Any, tokenizer: Any, average: Average) -> dict[str, float]:
    """Return the matching accuracy of the averaged weights on held-out prompts and pairs."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    average.copy_to(model)

    def score(images: Tensor, texts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids
        pixels = (images - MEAN) / STD
        vision = model.vision_model(pixel_values=pixels).pooler_output
        text = model.text_model(input_ids=ids).pooler_output
        return F.cosine_similarity(model.visual_projection(vision), model.text_projection(text))

    result: dict[str, float] = {}
    for split in ("held_out", "held_out_pairs"):
        accuracy = matching_accuracy(score, trials(NUM_TRIALS, split, seed=7))
        result |= {f"{split} {k}": v for k, v in accuracy.items() if "/" not in k}
    model.load_state_dict(kept)
    return result
