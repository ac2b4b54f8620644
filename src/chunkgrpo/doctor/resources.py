# SPDX-License-Identifier: Apache-2.0
"""Whether there is room for the run: memory, disk, and a folder that can be written to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from chunkgrpo.doctor.findings import Measured, failure, judged, ok, warning
from chunkgrpo.doctor.patient import Patient
from chunkgrpo.estimate import GIB, disk_space, make_estimate

SMALL = 0.005
"""Share of the memory below which a model's weights need no estimate of a run's memory."""


def resources(patient: Patient) -> Iterator[Measured]:
    """Compare what the run needs with what there is."""
    yield from folder(patient)
    yield from memory(patient)


def existing(path: Path) -> Path:
    """Return the nearest folder that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def folder(patient: Patient) -> Iterator[Measured]:
    """Check that the run's folder can be written to, and that checkpoints fit beside it."""
    place = existing(patient.trainer.folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield failure(
            f"{place} cannot be written to: {error.strerror or error}",
            "a folder that can be written to",
            "choose another by --out, or make space",
        )
        return
    trainable = sum(p.numel() for p in patient.policy.parameters())
    whole = sum(p.nbytes for p in [*patient.policy.parameters(), *patient.frozen().values()])
    space = disk_space(patient.config, trainable, whole)
    free = shutil.disk_usage(place).free
    needed = space.in_all
    said = (
        f"checkpoints take {size(space.each)} each and {size(needed)} in all with the tuned model; "
        f"{size(free)} are free at {place}"
    )
    if needed <= 0.9 * free:
        yield ok(said, "at most nine tenths of what is free")
        return
    yield judged(
        needed <= free,
        said,
        "less than what is free",
        "free some space, choose another --out, keep fewer (checkpoints.keep_last), or train fewer "
        "weights",
    )


def memory(patient: Patient) -> Iterator[Measured]:
    """Compare the estimated memory of an update with what the device has."""
    if patient.pipeline is None:
        return
    device = patient.policy.device
    if device.type == "cuda":
        there = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        there = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    weights = [*patient.policy.parameters(), *patient.frozen().values()]
    held = sum(p.nbytes for p in weights)
    if held < SMALL * there:
        yield ok(f"the weights take {size(held)} of {size(there)} of {device.type} memory")
        return
    estimate = make_estimate(patient.config)
    phase = max(estimate.memory, key=lambda name: estimate.memory[name])
    said = (
        f"an estimated {estimate.peak / GIB:.3g} GiB at the peak of {phase}, of {there / GIB:.3g} "
        f"GiB of {device.type} memory"
    )
    if estimate.peak <= there:
        yield ok(said, "less than there is")
        return
    yield warning(
        said,
        "less than there is",
        "lower objective.micro_batch or sampling.batch_size, or turn on "
        "model.gradient_checkpointing; `chunkgrpo plan` shows what takes how much",
    )


def size(value: float) -> str:
    """Write bytes in the unit that suits them."""
    for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e3:.3g} kB"
