# SPDX-License-Identifier: Apache-2.0
"""The state of a run in a checkpoint: every tensor by the name of the weight it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.algorithms.protocol import Algorithm
from chunkgrpo.runtime.checkpoints import load_optimizer_tensors, optimizer_tensors
from chunkgrpo.runtime.ema import Ema


def training_state(
    names: Sequence[str],
    parameters: Sequence[Tensor],
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    algorithm: Algorithm,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything a run needs to go on, bit for bit.

    Args:
        names: Of the parameters, in their order.
        parameters: What is trained.
        ema: Their average.
        optimizer: Over them, in their order.
        algorithm: May keep a state of its own.

    Returns:
        Tensors: ``parameter.NAME``, ``ema.NAME``, ``optimizer.NAME:MOMENT`` and
        ``algorithm.KEY``; and JSON values. ``averaged`` says whether ``ema.NAME`` are the weights
        that are evaluated and saved, as they are where there is an average.
    """
    tensors = {f"parameter.{n}": p for n, p in zip(names, parameters, strict=True)}
    tensors |= {f"ema.{n}": value for n, value in zip(names, ema.values, strict=True)}
    tensors |= optimizer_tensors(optimizer, names)
    own, info = algorithm.state()
    tensors |= {f"algorithm.{key}": value for key, value in own.items()}
    averaged = bool(ema.decay and ema.num_updates)
    return tensors, {"ema_updates": ema.num_updates, "averaged": averaged, "algorithm": info}


def check_same_weights(
    tensors: Mapping[str, Tensor], names: Sequence[str], parameters: Sequence[Tensor]
) -> None:
    """Refuse a checkpoint whose weights have other names or shapes than those that are trained.

    Raises:
        ValueError: With the first difference.
    """
    start = "parameter."
    held = {
        k.removeprefix(start): tuple(v.shape) for k, v in tensors.items() if k.startswith(start)
    }
    trained = {name: tuple(p.shape) for name, p in zip(names, parameters, strict=True)}
    if held == trained:
        return
    missing, surplus = sorted(set(trained) - set(held)), sorted(set(held) - set(trained))
    if missing:
        example = f"it lacks {missing[0]}"
    elif surplus:
        example = f"it holds {surplus[0]}, which is not trained"
    else:
        name = next(name for name in names if held[name] != trained[name])
        example = f"its {name} has shape {held[name]}, not {trained[name]}"
    raise ValueError(
        f"the checkpoint is of other weights than those trained now: {example}; it was written "
        "with another model or other model.adaptation, or by a version before 0.2.0"
    )


@torch.no_grad()
def restore_training_state(
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    algorithm: Algorithm,
) -> None:
    """Take over what :func:`training_state` returned.

    Raises:
        ValueError: If the checkpoint holds other weights, or is of another method; nothing has
            changed then.
    """
    check_same_weights(tensors, names, parameters)
    prefix = "algorithm."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    algorithm.load(own, info["algorithm"])
    for name, parameter, average in zip(names, parameters, ema.values, strict=True):
        parameter.copy_(tensors[f"parameter.{name}"])
        average.copy_(tensors[f"ema.{name}"])
    ema.num_updates = info["ema_updates"]
    load_optimizer_tensors(optimizer, tensors, names)
