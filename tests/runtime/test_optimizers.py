# SPDX-License-Identifier: Apache-2.0
"""Forms of AdamW: steps, and checkpoints that go on as if nothing had happened."""

import importlib.util
import sys

import pytest
import torch
from torch import Generator

from chunkgrpo.runtime.checkpoints import (
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from chunkgrpo.runtime.optimizers import OPTIMIZERS, make_optimizer

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            kind != "adamw" and not INSTALLED, reason="bitsandbytes is not installed"
        ),
    )
    for kind in OPTIMIZERS
]


def weights():
    """Two tensors of 8 bits and one too small for that."""
    generator = Generator().manual_seed(0)
    shapes = ((64, 128), (80, 80), (10,))
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def make(kind, parameters):
    return make_optimizer(kind, parameters, 1e-2, (0.9, 0.99), 1e-8, 1e-3)


def step(optimizer, parameters, number):
    """Pull towards a target that moves."""
    for parameter in parameters:
        parameter.grad = 2 * (parameter.detach() - 0.1 * number)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    parameters = weights()
    names = [f"weight.{i}" for i in range(len(parameters))]
    optimizer = make(kind, parameters)
    for number in range(3):
        step(optimizer, parameters, number)
    save_checkpoint(tmp_path, 3, optimizer_tensors(optimizer, names), {})
    again = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = make(kind, again)
    load_optimizer_tensors(resumed, load_checkpoint(tmp_path / "000003")[0], names)
    for number in range(3, 5):
        step(optimizer, parameters, number)
        step(resumed, again, number)
    for a, b in zip(parameters, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_adamw(kind):
    plain, parameters = weights(), weights()
    reference = torch.optim.AdamW(plain, 1e-2, (0.9, 0.99), 1e-8, 1e-3)
    optimizer = make(kind, parameters)
    for number in range(5):
        step(reference, plain, number)
        step(optimizer, parameters, number)
    for first, a, b in zip(weights(), plain, parameters, strict=True):
        moved = (a - first).norm()
        assert (a - b).norm() <= (1e-6 if kind == "adamw" else 0.05) * moved


def test_what_is_missing_or_unknown_is_named(monkeypatch):
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; known: adamw, adamw8bit"):
        make("lion", weights())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"'adamw8bit' needs bitsandbytes: pip install"):
        make("adamw8bit", weights())
