# SPDX-License-Identifier: Apache-2.0
"""First stage: the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkgrpo.shapes.pretrain.common import OptimizerPair, Round, StageLog, save_state


def to_signed(images: Tensor) -> Tensor:
    """Turn uint8 [B, H, W, 3] into float [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def edge_l1(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean absolute difference of horizontal and vertical pixel differences."""
    difference = a - b
    down = weight[:, :, 1:] * difference.diff(dim=2).abs()
    across = weight[:, :, :, 1:] * difference.diff(dim=3).abs()
    return down.mean() + across.mean()


def contrast_weight(images: Tensor, reach: int = 4) -> Tensor:
    """Weigh pixels by how little what is drawn there stands out from what surrounds it.

    With d the Euclidean distance, on the 0 to 255 scale, between the largest and the smallest
    value of each channel within ``reach`` pixels: (200 / d)^2 within [1, 8]; 1 where d < 40, as
    nothing is drawn there. Squared errors then count alike for a purple star on gray (d = 89) and
    for one on white; unweighted, the code leaves the former out: it matters too little.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        reach: Pixels to each side.

    Returns:
        [B, 1, H, W].
    """
    size = 2 * reach + 1
    high = F.max_pool2d(images, size, stride=1, padding=reach)
    low = -F.max_pool2d(-images, size, stride=1, padding=reach)
    distance = 127.5 * (high - low).norm(dim=1, keepdim=True)
    weight = (200 / distance.clamp_min(40)) ** 2
    return torch.where(distance < 40, torch.ones_like(weight), weight.clamp(1, 8))


def weighted_errors(output: Tensor, batch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted means of squared errors, of absolute ones, and of those of edges."""
    error = output - batch
    return (
        (weight * error.pow(2)).mean(),
        (weight * error.abs()).mean(),
        edge_l1(output, batch, weight),
    )


def psnr_of(output: Tensor, batch: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, of images in [-1, 1], unweighted."""
    return -10 * ((output - batch).pow(2).mean() / 4).log10().item()


def train_vae(
    vae: Any, images: Tensor, folder: Path, steps: int, seed: int, batch_size: int = 24
) -> None:
    """Train the autoencoder in place; resumes from ``folder/vae.pt`` where that exists.

    Loss: 4 MSE + w (L1 + edge L1) + (0.001 + 0.3 w) KL, with the KL averaged over latent elements
    and w rising from 0 to 1 between 20 and 50 % of the first half of the steps. From the start, L1
    is content with the median, the background, and a strong KL with the prior. In the end the KL
    decides how easy the latent is to generate: it empties elements that draw nothing and evens out
    the others. With w rises noise on the latent, up to 0.3 of its spread, so that the decoder
    forgives the small errors of a generated latent.

    In the second half errors are weighted by ``contrast_weight`` and the KL by half of that: what
    stands out little was left out of the code until then.
    """
    optimizers = OptimizerPair(
        vae.named_parameters(), 0.02, 2e-3, vae_rounds(steps), 24, ("conv_in", "encoder.conv_out")
    )
    first = vae_rounds(steps)[0].steps
    with torch.no_grad():
        # Start nearly deterministic: from the usual unit variance the noise drowns the code for
        # most of a short training, and the decoder learns to blur.
        half = vae.encoder.conv_out.out_channels // 2
        vae.encoder.conv_out.weight[half:] = 0
        vae.encoder.conv_out.bias[half:] = -4
    checkpoint, start = folder / "vae.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        start = state["step"]
    log = StageLog(folder / "pretrain.jsonl", "vae", steps)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        late = min(1.0, max(0.0, (step / first - 0.2) / 0.3))
        batch = to_signed(images[torch.randint(len(images), (batch_size,), generator=generator)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            latent = mean + std * torch.randn(mean.shape, generator=generator)
            amount = 0.3 * late * torch.rand(batch_size, 1, 1, 1, generator=generator)
            spread = mean.detach().std()
            latent = latent + amount * spread * torch.randn(mean.shape, generator=generator)
            output = vae.decode(latent).sample.float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        weight = contrast_weight(batch) if step >= first else torch.ones_like(batch[:, :1])
        kl_weight = 0.15 if step >= first else 0.001 + 0.3 * late
        squared, l1, edges = weighted_errors(output, batch, weight)
        loss = 4 * squared + late * (l1 + edges) + kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizers.step(step)
        vae.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            psnr = psnr_of(output, batch)
            log.write(step, loss=loss.item(), l1=l1.item(), psnr=psnr, kl=kl.item())
        if step % 200 == 199 or step == steps - 1:
            state = {"model": vae.state_dict(), "optimizers": optimizers.state_dict()}
            save_state(checkpoint, state | {"step": step + 1})


def train_decoder(
    vae: Any,
    images: Tensor,
    latents: Tensor,
    folder: Path,
    steps: int,
    seed: int,
    batch_size: int = 24,
) -> None:
    """Train the decoder alone on codes that stay; resumes from ``folder/decoder.pt``.

    The loss of ``train_vae``'s second half without its KL, from the mean of each code with noise of
    up to 0.3 of the codes' spread. What the code says faintly, such as green on black, the decoder
    learns to read, and the codes that the transformer is trained on do not change.

    Args:
        vae: Trained in place.
        images: uint8 [S, H, W, 3].
        latents: Their codes as ``encode_all`` returns them.
        folder: For the checkpoint and the log.
        steps, seed, batch_size: As in ``train_vae``.
    """
    decoder = vae.decoder
    rounds = (Round(steps, peak=0.3, fall=1.0),)
    optimizers = OptimizerPair(decoder.named_parameters(), 0.02, 2e-3, rounds, 24, ("conv_in",))
    checkpoint, start = folder / "decoder.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        decoder.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        start = state["step"]
    log = StageLog(folder / "pretrain.jsonl", "decoder", steps)
    spread = latents.float().std()
    for step in range(start, steps):
        generator = torch.Generator().manual_seed((seed + 2) * 1_000_003 + step)
        pick = torch.randint(len(images), (batch_size,), generator=generator)
        batch, code = to_signed(images[pick]), latents[pick].float()
        amount = 0.3 * spread * torch.rand(batch_size, 1, 1, 1, generator=generator)
        code = code + amount * torch.randn(code.shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = vae.decode(code).sample.float()
        squared, l1, edges = weighted_errors(output, batch, contrast_weight(batch))
        loss = 4 * squared + l1 + edges
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizers.step(step)
        decoder.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            psnr = psnr_of(output, batch)
            log.write(step, loss=loss.item(), l1=l1.item(), psnr=psnr)
        if step % 200 == 199 or step == steps - 1:
            state = {"model": decoder.state_dict(), "optimizers": optimizers.state_dict()}
            save_state(checkpoint, state | {"step": step + 1})


def vae_rounds(steps: int) -> tuple[Round, Round]:
    """Cut the steps in two halves, the second at half the rate."""
    return Round(steps // 2), Round(steps - steps // 2, peak=0.5, fall=1.0)


@torch.no_grad()
def encode_all(vae: Any, images: Tensor, batch_size: int = 128) -> Tensor:
    """Encode every image once: latent means, float16 [S, C, h, w]."""
    means = []
    for chunk in images.split(batch_size):
        batch = to_signed(chunk)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
        means.append(posterior.mean.half())
    return torch.cat(means)
