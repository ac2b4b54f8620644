# SPDX-License-Identifier: Apache-2.0
"""Second stage: the transformer and its text encoders, by flow matching on latents."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from chunkgrpo.runtime.attention import plain_attention
from chunkgrpo.shapes import grammar
from chunkgrpo.shapes.pretrain.common import (
    Average,
    OptimizerPair,
    Round,
    StageLog,
    round_of,
    save_state,
)
from chunkgrpo.shapes.verifier import verify_batch

CAPTION_DROPOUT = 0.1
COMPILE_FROM = 500  # steps
# Rows of T5 embeddings per batch. Runs use one row, which keeps attention short; some batches are
# long so that the pipeline's default of 256 rows draws well too.
T5_ROWS = ((1, 0.985), (16, 0.01), (256, 0.005))
NOT_HIDDEN = ("embedding", "pos_embed", "proj_out", "shared", "token", "context_embedder")


class Networks(nn.Module):
    """The four networks trained together: the transformer and three text encoders."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        self.text_encoder = pipe.text_encoder
        self.text_encoder_2 = pipe.text_encoder_2
        self.text_encoder_3 = pipe.text_encoder_3

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids as the stock pipeline does: joint embeddings and pooled ones."""
        first = self.text_encoder(clip_ids, output_hidden_states=True)
        second = self.text_encoder_2(clip_ids, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        t5 = self.text_encoder_3(t5_ids)[0].to(clip.dtype)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=1), torch.cat([first[0], second[0]], dim=-1)

    def forward(self, x: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Predict the velocity."""
        joint, pooled = self.encode(clip_ids, t5_ids)
        return self.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=joint,
            pooled_projections=pooled,
        ).sample


@torch.no_grad()
def zero_modulation(transformer: Any) -> None:
    """Start every block as the identity (adaLN-Zero) and the output at zero."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (
            name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
            or name == "proj_out"
        ):
            module.weight.zero_()
            module.bias.zero_()


def t5_ids(pipe: Any, texts: Sequence[str], rows: int) -> Tensor:
    """Tokenise for T5 as the pipeline does with ``max_sequence_length=rows``."""
    if rows == 1:  # truncation leaves only the end token
        return torch.full((len(texts), 1), pipe.tokenizer_3.eos_token_id)
    return pipe.tokenizer_3(
        list(texts), padding="max_length", max_length=rows, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def quick_accuracy(pipe: Any, number: int, seed: int, steps: int = 10) -> dict[str, float]:
    """Sample held-out prompts without guidance and return strict accuracy by task."""
    chosen = grammar.sample_prompts(number, "held_out", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = pipe(
            [p.text for p in chosen],
            sigmas=np.linspace(1, 1 / steps, steps).tolist(),
            num_inference_steps=steps,
            guidance_scale=0.0,
            max_sequence_length=1,
            output_type="np",
            generator=generator,
        ).images
    verdicts = verify_batch(images.astype(np.float32), [p.ask for p in chosen])
    result = {"strict": float(np.mean([v.strict for v in verdicts]))}
    for task in grammar.TASKS:
        members = [v.strict for v, p in zip(verdicts, chosen, strict=True) if p.task == task]
        result[task] = float(np.mean(members))
    return result | {"soft": float(np.mean([v.soft for v in verdicts]))}


@dataclass(frozen=True)
class Batch:
    """Noised latents of some scenes with one caption each.

    Attributes:
        x, sigma: Noised latents [B, C, h, w] and their noise levels [B].
        target: Velocity noise - x0, [B, C, h, w].
        clip_ids, t5_ids: Token ids, [B, L] each.
    """

    x: Tensor
    sigma: Tensor
    target: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


@dataclass(frozen=True)
class Scenes:
    """Draws batches for the pipeline's networks from encoded scenes and their captions.

    Attributes:
        pipe: Its VAE's scale and its tokenizers are used.
        latents: [S, C, h, w].
        captions: Indices into ``texts``, [S, captions a scene].
        texts: Every caption.
    """

    pipe: Any
    latents: Tensor
    captions: Tensor
    texts: Sequence[str]

    @cached_property
    def clip_ids(self) -> Tensor:
        """CLIP token ids of every caption, and of the empty one at the end."""
        return self.pipe.tokenizer(
            [*self.texts, ""], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def draw(self, size: int, generator: Generator) -> Batch:
        """Draw a batch; a tenth of the captions is empty."""
        rows_draw = float(torch.rand((), generator=generator))
        rows = T5_ROWS[0][0]
        for option, share in T5_ROWS:
            rows = option
            rows_draw -= share
            if rows_draw < 0:
                break
        pick = torch.randint(len(self.latents), (size,), generator=generator)
        which = torch.randint(self.captions.shape[1], (size,), generator=generator)
        text = self.captions[pick, which].long()
        text[torch.rand(size, generator=generator) < CAPTION_DROPOUT] = len(self.texts)
        config = self.pipe.vae.config
        x0 = (self.latents[pick].float() - config.shift_factor) * config.scaling_factor
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(1.0986 + torch.randn(size, generator=generator))
        uniform = torch.rand(size, generator=generator)
        sigma = torch.where(torch.rand(size, generator=generator) < 0.1, uniform, sigma)
        s = sigma.view(-1, 1, 1, 1)
        known = len(self.texts)
        words = [str(self.texts[int(i)]) if i < known else "" for i in text.tolist()]
        ids = t5_ids(self.pipe, words, rows)
        return Batch((1 - s) * x0 + s * noise, sigma, noise - x0, self.clip_ids[text], ids)


def computing_copy(networks: Networks, steps: int) -> Networks:
    """Return a copy in bfloat16, its transformer blocks compiled where that pays.

    Compiled blocks make a training step one and a half times as fast on two CPU cores; compiling
    takes a C++ compiler and half a minute.
    """
    copied = copy.deepcopy(networks).to(torch.bfloat16)
    if steps >= COMPILE_FROM and shutil.which(os.environ.get("CXX", "g++")):
        for block in copied.transformer.transformer_blocks:
            block.compile(dynamic=False)
    return copied


def compiled_where_short(batch: Batch) -> AbstractContextManager[Any]:
    """Run the rare batches with many text rows as they are: each shape would be compiled anew."""
    if batch.t5_ids.shape[1] == T5_ROWS[0][0]:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def train_transformer(pipe: Any, scenes: Scenes, folder: Path, steps: int, seed: int) -> None:
    """Train in place; ends with the averaged weights. Resumes from ``folder/transformer.pt``.

    The flow-matching loss ``|v - (noise - x0)|^2`` at sigma = sigmoid(log 3 + n), n normal (a
    logit-normal under the sampler's shift of 3), a tenth uniform. Computation runs in bfloat16 on
    a copy of float32 master weights. The target is the mean of a scene's code: under a strong KL
    the posterior is wide, and a sample of it would draw a blurred scene.

    In two rounds (``transformer_rounds``). The rate falls for most of each: at the full rate most
    of the loss that is left after a few thousand steps is noise of the optimizer itself.
    """
    zero_modulation(pipe.transformer)
    fit(pipe, scenes, folder, "transformer", transformer_rounds(steps), seed)


def transformer_rounds(steps: int) -> tuple[Round, Round]:
    """Cut the steps into a round of small batches and one of large ones, at a lower rate.

    Small batches learn more from a scene while there is much to learn; large ones use the
    processor better and have less noise in their gradient.
    """
    first = steps * 7 // 13
    return Round(first, fall=0.85), Round(steps - first, peak=0.7, fall=1.0, batch_size=128)


def distil_guidance(
    pipe: Any, scenes: Scenes, folder: Path, steps: int, seed: int, scale: float
) -> None:
    """Teach the networks to draw without guidance what they draw with it.

    Trains in place from the present weights; resumes from ``folder/guidance.pt``. With frozen
    teacher velocities for a caption and for the empty one, the target is
    ``v_empty + scale (v_caption - v_empty)``; where the caption is empty itself, ``v_empty``.

    Reference: Meng et al., "On Distillation of Guided Diffusion Models", arXiv:2210.03142, for one
    fixed scale.
    """
    teacher = computing_copy(Networks(pipe), steps).requires_grad_(False)
    empty = scenes.clip_ids[-1]

    def guided(batch: Batch) -> Tensor:
        rows = len(batch.x)
        t5 = t5_ids(pipe, [""] * rows, batch.t5_ids.shape[1])
        clip = torch.cat([batch.clip_ids, empty.expand(rows, -1)])
        x, sigma = batch.x.bfloat16().repeat(2, 1, 1, 1), batch.sigma.repeat(2)
        with torch.no_grad():
            v, v_empty = teacher(x, sigma, clip, torch.cat([batch.t5_ids, t5])).float().chunk(2)
        return v_empty + scale * (v - v_empty)

    rounds = (Round(steps, peak=0.2, fall=1.0),)
    fit(pipe, scenes, folder, "guidance", rounds, seed + 1, target=guided)


def fit(
    pipe: Any,
    scenes: Scenes,
    folder: Path,
    stage: str,
    rounds: Sequence[Round],
    seed: int,
    target: Callable[[Batch], Tensor] | None = None,
) -> None:
    """Fit the networks to a batch's velocities, or to what ``target`` makes of it."""
    steps = sum(part.steps for part in rounds)
    masters = Networks(pipe)
    compute = computing_copy(masters, steps)
    pairs = list(zip(compute.parameters(), masters.parameters(), strict=True))
    optimizers = OptimizerPair(masters.named_parameters(), 0.015, 2e-3, rounds, 100, NOT_HIDDEN)
    average = Average(masters, min(0.999, 1 - 8 / steps))
    checkpoint, start = folder / f"{stage}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        masters.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        average.values = state["average"]
        start = state["step"]
    log = StageLog(folder / "pretrain.jsonl", stage, steps)
    running = 0.0
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.no_grad():
            for low, master in pairs:
                low.copy_(master)
        batch = scenes.draw(round_of(rounds, step)[0].batch_size, generator)
        with plain_attention(), compiled_where_short(batch):
            wanted = batch.target if target is None else target(batch)
            v = compute(batch.x.bfloat16(), batch.sigma, batch.clip_ids, batch.t5_ids).float()
            loss = F.mse_loss(v, wanted)
            loss.backward()
        for low, master in pairs:
            master.grad = None if low.grad is None else low.grad.float()
            low.grad = None
        torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        optimizers.step(step)
        average.update(masters, step)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            values = {"loss": running}
            if (step % 1000 == 0 and step) or step == steps - 1:
                kept = {k: v.clone() for k, v in masters.state_dict().items()}
                average.copy_to(masters)
                values |= quick_accuracy(pipe, 120, seed=7)
                masters.load_state_dict(kept)
            log.write(step, **values)
        if step % 100 == 99 or step == steps - 1:
            state = {"model": masters.state_dict(), "optimizers": optimizers.state_dict()}
            save_state(checkpoint, state | {"average": average.values, "step": step + 1})
    average.copy_to(masters)
