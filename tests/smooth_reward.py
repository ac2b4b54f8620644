# SPDX-License-Identifier: Apache-2.0
"""A reward without jumps: pixels that differ by rounding are scored alike, to rounding."""

import torch


def smooth(images, prompts):
    """Weigh pixels and their squares by a pattern of waves over the picture."""
    pixels = images.double()
    height, width = pixels.shape[-2:]
    y = torch.linspace(0, 1, height, dtype=torch.float64)[:, None]
    x = torch.linspace(0, 1, width, dtype=torch.float64)
    waves = [torch.sin(5 * x + 3 * y), torch.cos(4 * x - 7 * y), torch.sin(9 * x * y)]
    pattern = torch.stack(waves).to(pixels.device)
    return ((pixels + pixels.square()) * pattern).mean((1, 2, 3)).float().cpu()
