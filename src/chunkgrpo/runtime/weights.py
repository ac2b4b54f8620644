# SPDX-License-Identifier: Apache-2.0
"""Replacing the values of parameters temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside this context the parameters have other values.

    Storage is swapped, not copied: it takes no memory and no time, and graphs built outside stay
    valid outside. Neither parameters nor values may be changed inside, and graphs built outside
    must not be back-propagated there. Contexts may be nested.

    Args:
        parameters: Parameters of any module.
        values: One for each, of its shape, type and device.

    Raises:
        ValueError: If the numbers, or a shape, type or device, differ.
    """
    if len(parameters) != len(values):
        raise ValueError(f"{len(values)} values for {len(parameters)} parameters; give one each")
    for i, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        there, here = ((t.shape, t.dtype, t.device) for t in (parameter, value))
        if there != here:
            raise ValueError(f"value {i} is {here}, but the parameter is {there}")
    kept = [parameter.data for parameter in parameters]
    try:
        _assign(parameters, [value.detach() for value in values])
        yield
    finally:
        _assign(parameters, kept)


def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    # Within an open torch.autocast, casts of weights are kept by parameter, not by storage: without
    # this, the network would go on with the former weights.
    torch.clear_autocast_cache()
