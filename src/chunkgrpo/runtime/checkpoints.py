# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in safetensors and JSON, written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.runtime.finite import check_finite

KEEP = 2


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Flatten an optimizer's state to tensors by name: ``optimizer.PARAMETER:MOMENT``.

    Args:
        optimizer: Optimizer of one list of parameters.
        names: Names of the parameters, in their order.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in _leaves(values):
            tensor = torch.as_tensor(value)
            # safetensors refuses tensors that share memory, as tables of 8-bit states do.
            shared = tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            found[f"optimizer.{names[index]}:{name}"] = tensor.clone() if shared else tensor
    return found


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of inner dictionaries (8-bit states come in one) among the rest."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield name, value


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """Restore what ``optimizer_tensors`` returned; the optimizer keeps its settings."""
    state: dict[int, dict[str, Any]] = {}
    positions = {name: index for index, name in enumerate(names)}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            parameter, _, name = key.removeprefix("optimizer.").rpartition(":")
            index = positions[parameter]
            counter = value.ndim == 0 and not value.is_floating_point()
            state.setdefault(index, {})[name] = int(value) if counter else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_checkpoint(
    folder: Path, iteration: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> Path:
    """Save a checkpoint, and delete all but the newest ones.

    Args:
        folder: Folder of all checkpoints of the run.
        iteration: Number of finished iterations.
        tensors: Tensors by name.
        info: Other values, serialisable as JSON.

    Returns:
        The checkpoint's folder, named by the iteration.

    Raises:
        NonFiniteError: If a number is not finite; nothing is written then.
    """
    from safetensors.torch import save_file

    check_finite("checkpoint", tensors)

    target = folder / f"{iteration:06d}"
    partial = folder / f".{iteration:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {k: v.detach().contiguous() for k, v in tensors.items()}, partial / "state.safetensors"
    )
    (partial / "state.json").write_text(json.dumps({"iteration": iteration, **info}, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in list_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """List complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if (p / "state.json").is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint's tensors and information."""
    from safetensors.torch import load_file

    return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())
