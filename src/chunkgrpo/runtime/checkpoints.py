# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in safetensors and JSON: written atomically, checked by SHA-256, kept by rules.

A run's ``checkpoints/`` holds ``best.json`` and one folder per checkpoint, named by its number of
finished iterations. A folder takes its name when everything in it is on the disk:

``state.safetensors``
    Every tensor of the run, by name.
``state.json``
    Every other value.
``model/``
    What ``policy.save`` wrote with the weights that a run ends with (the averaged ones, where there
    is an average): the LoRA in the files of diffusers. Absent where all weights are trained, as it
    would be as large as the model; :func:`tuned_weights` reads them from the state instead.
``manifest.json``
    Iteration, the judge's score, size and SHA-256 of every other file, and its own SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.runtime.files import atomic_folder, atomic_write, disk_problem, remove_folder
from chunkgrpo.runtime.finite import check_finite

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, absent, or cannot be written."""


@dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written, and which of them are kept.

    Attributes:
        every: Iterations between checkpoints; at least 1.
        keep_last: The newest ones are kept, this many; at least 1, and 2 leave one to fall back on
            where the newest gets damaged.
        keep_every: Those of every so many iterations are written and kept, too; 0: none of them.
        keep_best: The one with the best score in the evaluations while training is written, even
            where none is due, and kept.
    """

    every: int = 10
    keep_last: int = 2
    keep_every: int = 0
    keep_best: bool = True

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        for name, least in (("every", 1), ("keep_last", 1), ("keep_every", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"checkpoints.{name} is {value}; it must be at least {least}")

    def due(self, iteration: int) -> bool:
        """Return whether a checkpoint is due after an iteration, whatever its score."""
        return any(each and iteration % each == 0 for each in (self.every, self.keep_every))

    def kept(self, past: Sequence[Path]) -> set[Path]:
        """Return which of the checkpoints stay; they come oldest first."""
        best = best_checkpoint(past) if self.keep_best else None
        steady = [p for p in past if self.keep_every and number_of(p) % self.keep_every == 0]
        return {*past[-self.keep_last :], *steady, *([best] if best else [])}


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
    folder: Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    rules: Checkpointing | None = None,
    save_model: Callable[[Path], None] | None = None,
) -> Path:
    """Save a checkpoint, and delete those that no rule keeps.

    Nothing older is touched before the new one is whole on the disk. Checkpoints of later
    iterations are deleted, too: the run went on from an earlier one, because they were damaged.

    Args:
        folder: Folder of all checkpoints of the run; its parent must exist.
        iteration: Number of finished iterations.
        tensors: Tensors by name.
        info: Other values, serialisable as JSON; ``score`` is the judge's, or None.
        rules: Which are kept.
        save_model: Writes the model into the folder that it is given.

    Returns:
        The checkpoint's folder, named by the iteration.

    Raises:
        NonFiniteError: If a number is not finite; nothing is written then.
        CheckpointError: If the disk refuses; the older checkpoints stay.
    """
    from safetensors.torch import save_file

    check_finite("checkpoint", tensors)

    target = folder / f"{iteration:06d}"
    try:
        folder.mkdir(exist_ok=True)
        with atomic_folder(target) as partial:
            held = {name: value.detach().contiguous() for name, value in tensors.items()}
            save_file(held, partial / "state.safetensors")
            state = {"iteration": iteration, **info}
            (partial / "state.json").write_text(json.dumps(state, indent=1, default=_number))
            if save_model is not None:
                save_model(partial / "model")
            _write_manifest(partial, iteration, info.get("score"))
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {disk_problem(error, target)}; {_left(folder)}, and --resume goes on "
            "from there"
        ) from error
    prune(folder, iteration, rules or Checkpointing())
    return target


def _number(value: Any) -> Any:
    """A tensor or array of one element, as JSON has it."""
    return value.item()


def _left(folder: Path) -> str:
    found = list_checkpoints(folder)
    return f"the newest before it is {found[-1].name}" if found else "there is none before it"


def prune(folder: Path, newest: int, rules: Checkpointing) -> None:
    """Delete checkpoints that no rule keeps, and those later than the newest; say which is best."""
    found = list_checkpoints(folder)
    past = [path for path in found if number_of(path) <= newest]
    kept = rules.kept(past)
    for path in found:
        if path not in kept:
            remove_folder(path)
    best = best_checkpoint(sorted(kept, key=number_of))
    if best is not None:
        note = {"iteration": number_of(best), "score": score_of(best)}
        atomic_write(folder / "best.json", json.dumps(note) + "\n")
    else:
        (folder / "best.json").unlink(missing_ok=True)


# --- reading --------------------------------------------------------------------------------------


def number_of(path: Path) -> int:
    """Return the number of finished iterations of a checkpoint, from its name."""
    return int(path.name)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, by number, oldest first.

    A checkpoint gets its name when it is complete, so these are whole, unless something damaged
    them since (:func:`verify_checkpoint`).
    """
    found = [p for p in folder.glob("[0-9]*") if p.name.isdecimal() and p.is_dir()]
    return sorted(found, key=number_of)


def score_of(path: Path) -> float | None:
    """Return the judge's score of a checkpoint; None without one, or with a damaged manifest."""
    try:
        score = _read_manifest(path)["score"]
    except CheckpointError:
        return None
    return score if score is not None and math.isfinite(score) else None


def best_checkpoint(paths: Sequence[Path]) -> Path | None:
    """Return the checkpoint with the highest score, the earliest of equals; None where none has."""
    best, top = None, -math.inf
    for path in paths:
        score = score_of(path)
        if score is not None and score > top:
            best, top = path, score
    return best


def verify_checkpoint(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    This finds damage, not forgery: who can write there can write a manifest, too.

    Raises:
        CheckpointError: If a file is missing, changed or unknown, or the folder is of another
            iteration than its name says; the message names the file.
    """
    try:
        manifest = _read_manifest(path)
        listed = manifest["files"]
        found = {f.relative_to(path).as_posix() for f in path.rglob("*") if not f.is_dir()}
        for name in sorted(set(listed) - found):
            raise CheckpointError(f"{path / name} is missing")
        for name in sorted(found - set(listed) - {MANIFEST}):
            raise CheckpointError(f"{path / name} is not of this checkpoint: {MANIFEST} lacks it")
        for name, known in sorted(listed.items()):
            if _described(path / name) != known:
                raise CheckpointError(
                    f"{path / name} is damaged: its size or SHA-256 is not that of {MANIFEST}"
                )
        number = json.loads((path / "state.json").read_text())["iteration"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError):  # a manifest that is not of ours
        raise CheckpointError(f"{path} is no checkpoint of a run") from None
    if not number == manifest["iteration"] == number_of(path):
        raise CheckpointError(
            f"{path} holds iteration {number}, not {number_of(path)} as its name says"
        )


def newest_sound(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is not damaged; None where there is no checkpoint at all.

    Args:
        folder: Folder of all checkpoints of the run.
        say: Told of each damaged one that is passed over.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged.
    """
    found = list_checkpoints(folder)
    problems: list[str] = []
    for path in reversed(found):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"{problem}; going on from the checkpoint before it, {path.name}")
        return path
    if not found:
        return None
    raise CheckpointError(
        f"no checkpoint in {folder} can be used: {problems[0]}"
        + (f", and {len(problems) - 1} more" if problems[1:] else "")
        + "; put a sound copy back, or start a new run with another --out"
    )


def find_checkpoint(folder: Path, which: str) -> Path:
    """Return the checkpoint that a person names, verified.

    Args:
        folder: Folder of all checkpoints of a run.
        which: ``"last"``, ``"best"`` by the held-out judge, or a number of iterations.

    Raises:
        CheckpointError: If there is none, or it is damaged; it lists what there is.
    """
    found = list_checkpoints(folder)
    numbers = [number_of(path) for path in found]
    existing = f"there are {', '.join(map(str, numbers))}" if found else "there are none yet"
    chosen = None
    if which == "last":
        chosen = found[-1] if found else None
    elif which == "best":
        chosen = best_checkpoint(found)
    elif which.isdecimal():
        chosen = next((path for path in found if number_of(path) == int(which)), None)
    else:
        raise CheckpointError(
            f"unknown checkpoint {which!r}; name an iteration, 'last' or 'best'; {existing}"
        )
    if chosen is None:
        wanted = "with a score" if which == "best" else which
        raise CheckpointError(f"{folder} has no checkpoint {wanted}; {existing}")
    try:
        verify_checkpoint(chosen)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {existing}") from None
    return chosen


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors and the information of a checkpoint that was verified."""
    from safetensors.torch import load_file

    return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())


def tuned_weights(path: Path) -> dict[str, Tensor]:
    """Load the trained weights by name, as ``model/`` of a run that ends here has them.

    They are the averaged ones, where there is an average. Nothing else of the state is read.
    """
    from safetensors import safe_open

    averaged = json.loads((path / "state.json").read_text())["averaged"]
    start = "ema." if averaged else "parameter."
    with safe_open(path / "state.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
        return {name.removeprefix(start): file.get_tensor(name) for name in names}


# --- the manifest ---------------------------------------------------------------------------------


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _own_sum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, iteration: int, score: float | None) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest: dict[str, Any] = {
        "iteration": iteration,
        "score": score,
        "files": {path.relative_to(folder).as_posix(): _described(path) for path in files},
    }
    manifest["sha256"] = _own_sum(manifest)
    (folder / MANIFEST).write_text(_text(manifest))


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: If it is missing or was changed.
    """
    source = path / MANIFEST
    try:
        text = source.read_bytes()
        manifest = json.loads(text)
        if manifest["sha256"] == _own_sum(manifest) and text == _text(manifest).encode():
            return manifest
    except FileNotFoundError:
        raise CheckpointError(
            f"{source} is missing: the checkpoint is damaged, or an older version wrote it"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise CheckpointError(f"{source} is damaged: its content is not that of its own SHA-256")
