# SPDX-License-Identifier: Apache-2.0
"""First stage: the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.shapes.pretrain.common import OptimizerPair, StageLog, save_state


def to_signed(images: Tensor) -> Tensor:
    """Turn uint8 [B, H, W, 3] into float [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def edge_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical pixel differences."""
    difference = a - b
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def train_vae(
    vae: Any, images: Tensor, folder: Path, steps: int, seed: int, batch_size: int = 24
) -> None:
    """Train the autoencoder in place; resumes from ``folder/vae.pt`` where that exists.

    Loss: 4 MSE + w (L1 + edge L1) + 3e-5 KL, where w rises from 0 to 1 between 20 and 50 % of the
    steps: from the start, L1 is content with the median, the background, and colours come ten
    times later. With w rises noise on the latent, up to 0.3 of its spread, so that the decoder
    forgives the small errors of a generated latent.
    """
    optimizers = OptimizerPair(
        vae.named_parameters(), 0.02, 2e-3, steps, 24, ("conv_in", "encoder.conv_out")
    )
    with torch.no_grad():
        # Start nearly deterministic: from the usual unit variance the noise drowns the code for
        # most of a short training, and the decoder learns to blur.
        half = vae.encoder.conv_out.out_channels // 2
        vae.encoder.conv_out.weight[half:] = 0
        vae.encoder.conv_out.bias[half:] = -4
    checkpoint, start = folder / "vae.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        vae.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        start = state["step"]
    log = StageLog(folder / "pretrain.jsonl", "vae", steps)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        late = min(1.0, max(0.0, (step / steps - 0.2) / 0.3))
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
        l1 = (output - batch).abs().mean()
        squared = (output - batch).pow(2).mean()
        loss = 4 * squared + late * (l1 + edge_l1(output, batch)) + 3e-5 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizers.step(step)
        vae.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            psnr = -10 * (squared / 4).log10().item()
            log.write(step, loss=loss.item(), l1=l1.item(), psnr=psnr, kl=kl.item())
        if step % 200 == 199 or step == steps - 1:
            state = {"model": vae.state_dict(), "optimizers": optimizers.state_dict()}
            save_state(checkpoint, state | {"step": step + 1})


@torch.no_grad()
def encode_all(vae: Any, images: Tensor, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Encode every image once: latent means and standard deviations, float16 [S, C, h, w]."""
    means, stds = [], []
    for chunk in images.split(batch_size):
        batch = to_signed(chunk)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
        means.append(posterior.mean.half())
        stds.append(posterior.std.half())
    return torch.cat(means).contiguous(), torch.cat(stds).contiguous()


@torch.no_grad()
def whiten(vae: Any, latents: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    r"""Give every latent channel unit variance and decorrelate them, in place and losslessly.

    .. math:: z' = W z, \quad W = C^{-1/2}

    with C the channels' covariance. W goes into the encoder's last convolution and its inverse
    into the decoder's first, so decoding is unchanged. Without it one direction (the background)
    holds 40 % of the variance and those that draw a shape's outline a hundredth of it: a flow
    would settle the outline in its last steps only.

    Args:
        vae: The trained autoencoder.
        latents: Means and standard deviations of its codes, float16 [S, C, h, w].

    Returns:
        The latents of the changed encoder.
    """
    mean, std = latents
    channels = mean.shape[1]
    flat = mean[:: max(1, len(mean) // 8000)].double().transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    forward = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    backward = vectors @ torch.diag(values.sqrt()) @ vectors.T
    variance = (forward.float() ** 2) @ std.float().pow(2).mean((0, 2, 3))
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[:channels] = torch.einsum("ij,jkxy->ikxy", forward.float(), out.weight[:channels])
    out.bias[:channels] = forward.float() @ out.bias[:channels]
    out.weight[channels:] = 0
    out.bias[channels:] = variance.log()
    into.weight.copy_(torch.einsum("kjxy,ji->kixy", into.weight, backward.float()))
    white = torch.cat([torch.einsum("ij,sjxy->sixy", forward.float(), part.float()).half()
                       for part in mean.split(2000)])  # fmt: skip
    spread = variance.sqrt().view(1, -1, 1, 1).half().expand(len(mean), -1, *mean.shape[2:])
    return white, spread
