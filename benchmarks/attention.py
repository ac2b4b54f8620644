# SPDX-License-Identifier: Apache-2.0
"""Time attention kernels on the CPU at the embedded model's shape, in one run.

192 images, 4 heads, 81 rows (64 of the image, 17 of the text) of 32 channels. Ratios are to
``matrix_attention``, which ``plain_attention`` uses; each time is the least of many.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chunkgrpo.runtime.attention import matrix_attention

SHAPE = (192, 81, 4, 32)
REPEATS = 25


def kernel(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return torch's attention by one of its kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def main() -> None:
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    ways = {
        "two matrix products": lambda q, k, v: matrix_attention(q, k, v, SHAPE[-1] ** -0.5),
        "torch, unfused": kernel(SDPBackend.MATH),
        "torch, fused": kernel(SDPBackend.FLASH_ATTENTION),
    }
    print(f"{torch.get_num_threads()} threads, [batch, rows, heads, channels] = {list(SHAPE)}")
    for dtype in (torch.bfloat16, torch.float32):
        # The networks' layout: heads beside channels.
        qkv = [torch.randn(SHAPE, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
        best = {name: [float("inf")] * 2 for name in ways}
        for _ in range(REPEATS):
            for name, attend in ways.items():
                start = time.perf_counter()
                with torch.no_grad():
                    attend(*qkv)
                middle = time.perf_counter()
                attend(*qkv).sum().backward()
                taken = (middle - start, time.perf_counter() - middle)
                best[name] = [min(pair) for pair in zip(best[name], taken, strict=True)]
        ours = best["two matrix products"]
        for name, (forward, both) in best.items():
            print(
                f"{str(dtype)[6:]:>9} {name:>20}: forward {1e3 * forward:6.1f} ms "
                f"({forward / ours[0]:.1f} x), with backward {1e3 * both:6.1f} ms "
                f"({both / ours[1]:.1f} x)"
            )


if __name__ == "__main__":
    main()
