# SPDX-License-Identifier: Apache-2.0
"""Making the checks, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

from chunkgrpo.config import Config, ConfigError
from chunkgrpo.config.doctor import CHECKS
from chunkgrpo.core.names import check_name
from chunkgrpo.doctor.conditioning import encoding, guidance, stock
from chunkgrpo.doctor.findings import (
    FAILURE,
    WARNING,
    Check,
    Finding,
    Measured,
    printable,
    skipped,
    warning,
)
from chunkgrpo.doctor.gradients import gradients, kl_gradient, reference
from chunkgrpo.doctor.overfitting import overfit
from chunkgrpo.doctor.patient import Patient, random_state_kept
from chunkgrpo.doctor.prompts import prompts
from chunkgrpo.doctor.ratios import modes, ratio_one
from chunkgrpo.doctor.resources import resources
from chunkgrpo.doctor.rewards import rewards
from chunkgrpo.doctor.sampling import noise, schedule, transition
from chunkgrpo.train.loop import Trainer

BY_NAME = {
    check.name: check
    for check in (
        Check(resources, quick=True),
        Check(prompts, quick=True),
        Check(schedule, quick=True),
        Check(encoding),
        Check(modes),
        Check(guidance, after=(encoding, modes)),
        Check(stock, after=(encoding, modes, guidance)),
        Check(transition, after=(schedule, modes)),
        Check(noise, after=(schedule, modes, transition)),
        Check(rewards, after=(modes,)),
        Check(reference, after=(modes,)),
        Check(ratio_one, after=(schedule, encoding, modes, transition, reference)),
        Check(gradients, after=(modes, transition, reference)),
        Check(kl_gradient, after=(modes, transition, reference, gradients)),
        Check(overfit, after=(ratio_one, rewards, gradients), thorough=True),
    )
}


NEEDS_TEXT = stock.__name__
"""The last check for which text encoders must be loaded."""


class DoctorError(ConfigError):
    """A check failed."""


def examine(
    trainer: Trainer,
    config: Config,
    *,
    thorough: bool = False,
    skip: Collection[str] = (),
    quick: bool = False,
    tell: Callable[[Finding], None] = lambda finding: None,
    release: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Examine a run that has been built and not started.

    It is left as it is: weights, optimizer, averages, random states and the algorithm's state.

    Args:
        trainer: The run.
        config: Its settings.
        thorough: Examine a whole rollout, and make the checks that take long.
        skip: Names of checks to leave out.
        quick: Make only the checks that call no network.
        tell: Called with each finding at once.
        release: Called once no text encoder is needed any more.

    Returns:
        At least one finding of each check, in their order.

    Raises:
        ValueError: If a name in ``skip`` is unknown.
    """
    for name in skip:
        check_name("check of the doctor", name, CHECKS)
    patient = Patient(trainer, config, thorough)
    found: list[Finding] = []
    with random_state_kept():
        for name in CHECKS:
            check = BY_NAME[name]
            if (check.thorough and not thorough) or (quick and not check.quick):
                continue
            failed = {each.name for each in found if each.status == FAILURE}
            started = time.perf_counter()
            for each in _findings(check, patient, name in skip, failed):
                texts = (printable(t) for t in (each.measured, each.bound, each.advice))
                finding = Finding(name, each.status, *texts)
                found.append(finding)
                tell(finding)
            patient.seconds[name] = time.perf_counter() - started
            if check is BY_NAME[NEEDS_TEXT]:
                release()
    if quick:
        release()
    return found


def _findings(
    check: Check, patient: Patient, unwanted: bool, failed: Collection[str]
) -> Iterator[Measured]:
    """Make one check, unless it is unwanted or could only repeat what another one found."""
    causes = [cause.__name__ for cause in check.after if cause.__name__ in failed]
    if unwanted:
        yield skipped("left out by doctor.skip")
    elif causes:
        yield skipped(f"not judged, because {causes[0]} failed")
    else:
        try:
            yield from check.examine(patient)
        except Exception as error:  # a check that cannot be made must not stop a run
            reason = " ".join(str(error).split())
            yield warning(f"could not be examined: {type(error).__name__}: {reason:.300}")


def examine_as_set(
    trainer: Trainer,
    config: Config,
    quick: bool = False,
    release: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Examine a run as ``doctor`` in its settings says; see :func:`examine`."""
    d = config.doctor
    return examine(trainer, config, thorough=d.thorough, skip=d.skip, quick=quick, release=release)


def refuse(findings: Collection[Finding]) -> None:
    """Raise an error about the first failure, if there is one.

    Raises:
        DoctorError: In one line.
    """
    failed = [each for each in findings if each.status == FAILURE]
    if failed:
        names = list(dict.fromkeys(each.name for each in failed))
        more = f" ({len(names) - 1} more failed: {', '.join(names[1:])})" if names[1:] else ""
        raise DoctorError(
            f"the doctor's check {failed[0]}{more}; to train nevertheless: "
            f"--set doctor.skip=[{','.join(names)}]"
        )


def in_words(findings: Collection[Finding], seconds: float) -> str:
    """Return the outcome of an examination as one sentence."""
    names = {each.name for each in findings}
    failed = [n for n in CHECKS if any(f.name == n and f.status == FAILURE for f in findings)]
    warned = [n for n in CHECKS if any(f.name == n and f.status == WARNING for f in findings)]
    parts = [f"{len(names)} checks in {seconds:.1f} s"]
    parts.append(f"failed: {', '.join(failed)}" if failed else "none failed")
    if warned:
        parts.append(f"warnings: {', '.join(warned)}")
    return "; ".join(parts)


def lines_of(findings: Collection[Finding], seconds: float) -> list[str]:
    """Return what a run says of its examination: its warnings, and one sentence."""
    told = [f"Doctor: {each}" for each in findings if each.status == WARNING]
    return [*told, f"Doctor: {in_words(findings, seconds)}."]
