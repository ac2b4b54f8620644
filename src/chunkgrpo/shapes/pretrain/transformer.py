# SPDX-License-Identifier: Apache-2.0
"""Second stage: the transformer and its text encoders, by flow matching on latents."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunkgrpo.runtime.attention import plain_attention
from chunkgrpo.shapes import grammar
from chunkgrpo.shapes.pretrain.common import (
    Average,
    OptimizerPair,
    Round,
    StageLog,
    save_state,
)
from chunkgrpo.shapes.verifier import verify_batch

CAPTION_DROPOUT = 0.1
# Rows of T5 embeddings per batch. Runs use one row, which keeps attention short; some batches are
# long so that the pipeline's default of 256 rows draws well too.
T5_ROWS = ((1, 0.95), (16, 0.03), (256, 0.02))
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


def train_transformer(
    pipe: Any,
    latents: Tensor,
    captions: Tensor,
    texts: Sequence[str],
    folder: Path,
    steps: int,
    seed: int,
    batch_size: int = 96,
) -> None:
    """Train in place; ends with the averaged weights. Resumes from ``folder/transformer.pt``.

    The flow-matching loss ``|v - (noise - x0)|^2`` at sigma = sigmoid(log 3 + n), n normal (a
    logit-normal under the sampler's shift of 3), a tenth uniform. Computation runs in bfloat16 on
    a copy of float32 master weights. The target is the mean of a scene's code: under a strong KL
    the posterior is wide, and a sample of it would draw a blurred scene.

    The rate falls to zero twice: after a third of the steps, then, from half the peak, all the way
    to the end. At the full rate most of the loss that is left is noise of the optimizer itself.
    """
    zero_modulation(pipe.transformer)
    masters = Networks(pipe)
    compute = copy.deepcopy(masters).to(torch.bfloat16)
    pairs = list(zip(compute.parameters(), masters.parameters(), strict=True))
    first = steps // 3
    rounds = (Round(first), Round(steps - first, peak=0.5, fall=1.0))
    optimizers = OptimizerPair(masters.named_parameters(), 0.015, 2e-3, rounds, 100, NOT_HIDDEN)
    average = Average(masters, 0.999)
    checkpoint, start = folder / "transformer.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        masters.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        average.values = state["average"]
        start = state["step"]
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    clip_ids = pipe.tokenizer(
        [*texts, ""], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    log = StageLog(folder / "pretrain.jsonl", "transformer", steps)
    running = 0.0
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.no_grad():
            for low, master in pairs:
                low.copy_(master)
        rows_draw = float(torch.rand((), generator=generator))
        rows = T5_ROWS[0][0]
        for option, share in T5_ROWS:
            rows = option
            rows_draw -= share
            if rows_draw < 0:
                break
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        which = torch.randint(captions.shape[1], (batch_size,), generator=generator)
        text = captions[pick, which].long()
        text[torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT] = len(texts)
        x0 = (latents[pick].float() - shift) * scale
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(1.0986 + torch.randn(batch_size, generator=generator))
        uniform = torch.rand(batch_size, generator=generator)
        sigma = torch.where(torch.rand(batch_size, generator=generator) < 0.1, uniform, sigma)
        s = sigma.view(-1, 1, 1, 1)
        x = (1 - s) * x0 + s * noise
        words = [str(texts[int(i)]) if i < len(texts) else "" for i in text.tolist()]
        with plain_attention():
            v = compute(x.bfloat16(), sigma, clip_ids[text], t5_ids(pipe, words, rows)).float()
            loss = F.mse_loss(v, noise - x0)
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
            if (step % 500 == 0 and step) or step == steps - 1:
                kept = {k: v.clone() for k, v in masters.state_dict().items()}
                average.copy_to(masters)
                values |= quick_accuracy(pipe, 120, seed=7)
                masters.load_state_dict(kept)
            log.write(step, **values)
        if step % 100 == 99 or step == steps - 1:
            state = {"model": masters.state_dict(), "optimizers": optimizers.state_dict()}
            save_state(checkpoint, state | {"average": average.values, "step": step + 1})
    average.copy_to(masters)
