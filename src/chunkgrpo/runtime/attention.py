# SPDX-License-Identifier: Apache-2.0
"""Which attention kernel runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def matrix_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale Q K^T) V by two batched matrix products.

    Args:
        query, key, value: [..., rows, channels].
        scale: Usually channels^-0.5.

    Returns:
        [..., rows of query, channels of value].
    """
    q, k, v = (x.flatten(0, -3) for x in (query, key, value))
    nothing = q.new_zeros(()).expand(len(q), q.shape[1], k.shape[1])
    scores = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, query.shape[:-2])


def _is_special(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Return whether a call needs more than plain attention of equal batches and heads."""
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.ndim > 2
    return attn_mask is not None or dropout_p > 0 or is_causal or enable_gqa or not same


class _MatrixAttention(TorchFunctionMode):
    """Replaces calls of scaled dot product attention by ``matrix_attention`` where possible."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not _is_special(*args, **kwargs):
            query, key, value = (
                *args,
                *(kwargs[n] for n in ("query", "key", "value")[len(args) :]),
            )
            return matrix_attention(
                query, key, value, kwargs.get("scale") or query.shape[-1] ** -0.5
            )
        return func(*args, **kwargs)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Use unfused attention, which on CPUs trains short sequences fastest in bfloat16.

    Two matrix products and a softmax between them; masked, causal, dropped-out and grouped
    attention uses torch's own unfused kernel. ``benchmarks/attention.py`` compares the
    kernels; in float32 the fused one would be faster.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH), _MatrixAttention():
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
