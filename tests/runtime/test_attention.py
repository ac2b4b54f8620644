# SPDX-License-Identifier: Apache-2.0
"""Unfused attention: the same function, and only where it is asked for."""

import pytest
import torch
import torch.nn.functional as F

from chunkgrpo.runtime.attention import plain_attention


def test_plain_attention_restores_the_setting():
    read = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    before = read()
    with plain_attention():
        assert read()
    assert read() == before
    with pytest.raises(RuntimeError, match="stop"), plain_attention():
        raise RuntimeError("stop")
    assert read() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_attention_is_attention(dtype):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, 2, rows, 8, generator=draw).to(dtype).requires_grad_() for rows in (5, 7, 7)
    )
    written_out = torch.softmax(q.double() @ k.double().mT / 8**0.5, -1) @ v.double()
    with plain_attention():
        found = F.scaled_dot_product_attention(q, k, value=v)
        scaled = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert found.dtype == dtype
    assert torch.allclose(found.double(), written_out, rtol=0, atol=tolerance)
    other = torch.softmax(0.5 * (q.double() @ k.double().mT), -1) @ v.double()
    assert torch.allclose(scaled.double(), other, rtol=0, atol=tolerance)
    weights = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    gradients = torch.autograd.grad((found.double() * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((written_out * weights).sum(), (q, k, v))
    for a, b in zip(gradients, expected, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=5 * tolerance)


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"attn_mask": torch.tensor([[True, False, True]] * 3)}],
)
def test_masked_attention_stays_masked_when_plain(options):
    q, k, v = torch.randn(3, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    with plain_attention():
        found = F.scaled_dot_product_attention(q, k, v, **options)
    assert torch.allclose(found, F.scaled_dot_product_attention(q, k, v, **options), atol=1e-6)
    assert not torch.allclose(found, F.scaled_dot_product_attention(q, k, v), atol=1e-2)
