# SPDX-License-Identifier: Apache-2.0
"""Image tensors as the rewards need them: checked, and in the 8 bits a saved file would have.

No pixel that is NaN or infinite gets past this module: rounded to 8 bits it would be black or
white, and score as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chunkgrpo.core.finite import NonFiniteError, all_finite, finite_rows
from chunkgrpo.types import Prompt, as_prompts


def check_batch(images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse anything but a batch of colour images with one prompt each.

    Raises:
        NonFiniteError: If a pixel is not finite.
        ValueError: If ``images`` is not [B, 3, H, W] or ``prompts`` has another length than B.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W]")
    if len(prompts) != len(images):
        raise ValueError(
            f"{len(images)} images and {len(prompts)} prompts; give one prompt per image"
        )
    refuse_nonfinite(images, prompts)


def rounded(images: Tensor) -> Tensor:
    """Return images in [0, 1] as float32 levels 0, 1, ..., 255, on their device.

    Published rewards were trained on, and score, 8-bit images; a reward must not see more than
    the saved image holds.

    Args:
        images: [B, 3, H, W] in [0, 1]; values outside are clipped.
    """
    return images.detach().float().mul(255).round().clamp(0, 255)


def byte_images(images: Tensor) -> list[np.ndarray]:
    """Return images [B, 3, H, W] in [0, 1] as B arrays [H, W, 3] of ``uint8``, RGB."""
    levels = rounded(images).to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
    return list(levels.numpy())


def refuse_nonfinite(
    images: Tensor,
    prompts: Sequence[Prompt | str],
    folder: Path | None = None,
    label: str = "",
    phase: str = "reward",
) -> None:
    """Refuse images of which a pixel is NaN or infinite: rounded to 8 bits they would score.

    Args:
        images: [B, 3, H, W].
        prompts: B.
        folder: Where the first such image is saved, those pixels in magenta; None: nowhere.
        label: Prefix of its name.
        phase: Of the error.

    Raises:
        NonFiniteError: Naming the sample, its prompt and the saved image.
    """
    if all_finite([images]):
        return
    index = int((~finite_rows(images)).nonzero()[0])
    texts = [record.text for record in as_prompts(prompts)]
    whose = f", of prompt {texts[index]!r}" if index < len(texts) else ""
    path = saved_image(images[index], folder, f"{label}image-{index}.png")
    saved = f" (saved as {path}, such pixels in magenta)" if path else ""
    raise NonFiniteError(
        phase,
        f"image {index}{whose}{saved},",
        "set model.precision to fp32, or lower optimizer.learning_rate where the model was trained",
    )


def saved_image(image: Tensor, folder: Path | None, name: str) -> Path | None:
    """Save one image [3, H, W] in [0, 1] as a PNG in the folder, if there is one.

    Pixels that are not finite are magenta, so that they are not taken for black ones.
    """
    if folder is None:
        return None
    from PIL import Image

    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)[-150:]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / plain
    bad = ~image.isfinite().all(dim=0)
    magenta = torch.tensor([1.0, 0.0, 1.0], device=image.device)[:, None, None]
    image = image.detach().float().where(~bad, magenta)
    Image.fromarray(eight_bit(image).permute(1, 2, 0).cpu().numpy()).save(path)
    return path


def eight_bit(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded.

    Raises:
        NonFiniteError: If a pixel is not finite: it would become black.
    """
    if not all_finite([images]):
        fix = "8 bits have no such number; find out where it begins"
        raise NonFiniteError("reward", "a pixel", fix)
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def quantised(images: Tensor) -> Tensor:
    """Images in [0, 1] as a PNG returns them: multiples of 1/255, float32.

    The difference is at most 1/510 per pixel.
    """
    return eight_bit(images).float() / 255
