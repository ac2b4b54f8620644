# SPDX-License-Identifier: Apache-2.0
"""Image statistics that show signs of reward hacking.

Axes: B images, C channels, H rows, W columns, P prompts, G images of one prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "image_health",
    "texture",
    "edge_sharpness",
    "saturation",
    "brightness",
    "diversity",
    "separation",
]

_LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709, applied to the values as they are

# Health of tuned images over that of the base's; outside, a gain may have been hacked.
HEALTH_BANDS = {
    "texture": (0.5, 1.5),
    "edge_sharpness": (0.8, 1.25),
    "saturation": (0.75, 1.33),
    "brightness": (0.75, 1.33),
    "diversity": (0.75, 1.33),
}


def image_health(images_BCHW: Tensor, num_prompts: int | None = None) -> dict[str, float]:
    """All measures of this module, averaged over a batch.

    None of them measures quality by itself; a change against the images before training is the
    sign: higher texture is a grid or grain on plain areas, higher sharpness or saturation
    over-processing, lower diversity a collapse to one image per prompt.

    Args:
        images_BCHW: [B, 3, H, W] in [0, 1], H and W at least 5.
        num_prompts: P, if the batch is P groups of equally many images, prompt-major; without it,
            or with one image per prompt, ``diversity`` is left out.

    Returns:
        ``texture``, ``edge_sharpness``, ``saturation``, ``brightness`` and maybe ``diversity``.

    Raises:
        ValueError: The batch has another shape or range, or does not divide into P groups.
    """
    health = {
        "texture": texture(images_BCHW).mean().item(),
        "edge_sharpness": edge_sharpness(images_BCHW).mean().item(),
        "saturation": saturation(images_BCHW).mean().item(),
        "brightness": brightness(images_BCHW).mean().item(),
    }
    if num_prompts is not None and len(images_BCHW) > num_prompts:
        health["diversity"] = diversity(images_BCHW, num_prompts).mean().item()
    return health


def texture(images_BCHW: Tensor, window: int = 5) -> Tensor:
    """Median over pixels of the standard deviation of luma in a small window around each.

    The median looks past edges as long as most windows hold none, so it sees what covers the
    plain areas: grain, or a grid with a period up to the window.

    Args:
        images_BCHW: [B, 3, H, W] in [0, 1].
        window: Side of the window in pixels, 2 up to the shorter side of the image.

    Returns:
        [B] in [0, 0.5]; 0 where most of the image is flat.
    """
    luma = _luma(images_BCHW)
    if not 2 <= window <= min(luma.shape[-2:]):
        raise ValueError(f"window {window} does not fit images of {tuple(luma.shape[-2:])} pixels")
    centred = (luma - luma.mean(dim=(1, 2), keepdim=True)).unsqueeze(1)
    mean = functional.avg_pool2d(centred, window, stride=1)
    variance = functional.avg_pool2d(centred.square(), window, stride=1) - mean.square()
    return variance.clamp(min=0).sqrt().flatten(1).median(dim=1).values


def edge_sharpness(images_BCHW: Tensor, share: float = 0.05) -> Tensor:
    r"""Mean of the largest gradients of luma, :math:`\sqrt{\partial_x^2 + \partial_y^2}`.

    Args:
        images_BCHW: [B, 3, H, W] in [0, 1], H and W at least 2.
        share: The part of all pixels averaged, in (0, 1].

    Returns:
        [B] in [0, sqrt(2)], luma per pixel: low when blurred, high when over-sharpened.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be in (0, 1]")
    luma = _luma(images_BCHW)
    if min(luma.shape[-2:]) < 2:
        raise ValueError(f"a gradient needs 2 x 2 pixels; images have {tuple(luma.shape[-2:])}")
    across = luma[:, :-1, 1:] - luma[:, :-1, :-1]
    down = luma[:, 1:, :-1] - luma[:, :-1, :-1]
    gradient = torch.hypot(across, down).flatten(1)
    return gradient.topk(max(1, round(share * gradient.shape[1])), dim=1).values.mean(dim=1)


def saturation(images_BCHW: Tensor) -> Tensor:
    """Mean chroma, the largest minus the smallest of red, green and blue.

    Args:
        images_BCHW: [B, 3, H, W] in [0, 1].

    Returns:
        [B] in [0, 1]; 0 for greys.
    """
    pixels = _checked(images_BCHW)
    return (pixels.amax(dim=1) - pixels.amin(dim=1)).mean(dim=(1, 2))


def brightness(images_BCHW: Tensor) -> Tensor:
    """Mean Rec. 709 luma.

    Args:
        images_BCHW: [B, 3, H, W] in [0, 1].

    Returns:
        [B] in [0, 1].
    """
    return _luma(images_BCHW).mean(dim=(1, 2))


def diversity(images_BCHW: Tensor, num_prompts: int) -> Tensor:
    r"""Mean distance of two images of the same prompt, seen coarsely.

    .. math:: \frac{2}{G(G-1)} \sum_{i<j} \frac{\lVert y_i - y_j \rVert_2}{\sqrt{3 \cdot 8 \cdot 8}}

    y is the image averaged down to 8 x 8 pixels, so grain counts for nothing and layout and
    colour count for everything.

    Args:
        images_BCHW: [B, 3, H, W] in [0, 1], prompt-major.
        num_prompts: P; B / P is the group size G, at least 2.

    Returns:
        [P] in [0, 1]; 0 when all images of a prompt are the same.

    Raises:
        ValueError: B is not P groups of at least 2.
    """
    return separation(images_BCHW, num_prompts).mean(dim=1)


def separation(images_BCHW: Tensor, num_prompts: int) -> Tensor:
    r"""Mean distance of each image from the others of its prompt, seen coarsely.

    .. math:: \frac{1}{G-1} \sum_{j \ne i}
              \frac{\lVert y_i - y_j \rVert_2}{\sqrt{3 \cdot 8 \cdot 8}}

    with y as in :func:`diversity`, which is the mean over the images of a prompt.

    Args:
        images_BCHW: [B, 3, H, W] in [0, 1], prompt-major.
        num_prompts: P; B / P is the group size G, at least 2.

    Returns:
        [P, G] in [0, 1].

    Raises:
        ValueError: B is not P groups of at least 2.
    """
    pixels = _checked(images_BCHW)
    if num_prompts < 1 or len(pixels) % num_prompts or len(pixels) < 2 * num_prompts:
        raise ValueError(f"{len(pixels)} images are not {num_prompts} groups of 2 or more")
    coarse = functional.adaptive_avg_pool2d(pixels, 8).reshape(num_prompts, -1, 3 * 8 * 8)
    size = coarse.shape[1]
    distances = torch.zeros(num_prompts, size, size, dtype=coarse.dtype)
    first, second = torch.triu_indices(size, size, offset=1).unbind()
    squared = (coarse[:, first] - coarse[:, second]).square().mean(dim=2)
    distances[:, first, second] = distances[:, second, first] = squared.sqrt()
    return distances.sum(dim=2) / (size - 1)


def _luma(images_BCHW: Tensor) -> Tensor:
    pixels = _checked(images_BCHW)
    weights = torch.tensor(_LUMA, dtype=pixels.dtype)
    return torch.einsum("bchw,c->bhw", pixels, weights)


def _checked(images_BCHW: Tensor) -> Tensor:
    """The images as float64 on the CPU, with shape and range checked."""
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or images_BCHW.shape[0] == 0:
        raise ValueError(f"images have shape {tuple(images_BCHW.shape)}; expected [B, 3, H, W]")
    pixels = images_BCHW.detach().to("cpu", torch.float64)
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # written so that NaN fails too
        raise ValueError(f"image values span [{low:.3g}, {high:.3g}]; expected [0, 1]: clamp first")
    return pixels
