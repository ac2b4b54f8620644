# SPDX-License-Identifier: Apache-2.0
"""What is read of the prompts, and which of them stand twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from chunkgrpo.config.build import build_prompts
from chunkgrpo.doctor.findings import Measured, ok, warning
from chunkgrpo.doctor.patient import Patient
from chunkgrpo.policies.lengths import text_readers
from chunkgrpo.rewards.clip_features import num_cut
from chunkgrpo.rewards.ocr import OcrReward, quoted_text, quoted_texts
from chunkgrpo.types import Prompt

DOUBLE = '"“”„«»'
"""Marks that are quotation marks, unless an inch stands behind a digit."""


def prompts(patient: Patient) -> Iterator[Measured]:
    """Count prompts that are cut, repeated, trained on though held out, or misread."""
    trained = list(patient.trainer.prompts)
    final = list(build_prompts(patient.config, "final"))
    held_out = [*patient.trainer.evaluator.held_out, *final]
    every = list(dict.fromkeys(each.text for each in [*trained, *held_out]))
    yield from cut_by_encoders(patient, every)
    yield from cut_by_rewards(patient, every)
    yield from repeated(patient, trained)
    yield held_out_ones(patient, trained, held_out)
    yield from quotes(patient, every)


def share(number: int, of: int) -> str:
    """Say how many of how many."""
    return f"{number:,} of {of:,} prompts"


def example(texts: Sequence[str]) -> str:
    """Show one of some texts, the shortest."""
    return f"such as {min(texts, key=len)!r:.100}"


def cut_by_encoders(patient: Patient, texts: list[str]) -> Iterator[Measured]:
    """Say how many prompts are longer than each text encoder reads."""
    if patient.pipeline is None:
        return
    readers = text_readers(patient.pipeline, texts)
    if not readers:
        return
    said = ", ".join(f"{r.name} ({r.limit} tokens) cuts {len(r.cut):,}" for r in readers)
    lost = sorted(set.intersection(*(set(r.cut) for r in readers)))
    if not lost:
        yield ok(
            f"{share(len(lost), len(texts))} are longer than the text encoder reads: {said}"
            if len(readers) == 1
            else f"each of {len(texts):,} prompts is read to its end by one text encoder or more: "
            f"{said}",
            "0",
        )
        return
    yield warning(
        f"{share(len(lost), len(texts))} are longer than the text encoder reads, "
        f"{example([texts[i] for i in lost])}: {said}",
        "0",
        "raise model.max_sequence_length where the model allows it, or shorten these prompts: what "
        "is cut has no effect on the image, and a reward that reads it punishes for it",
    )


def cut_by_rewards(patient: Patient, texts: list[str]) -> Iterator[Measured]:
    """Say how many prompts are longer than a reward reads."""
    for reward in everything(patient):
        number = num_cut(reward, texts)
        if number is None:
            continue
        said = f"{share(number, len(texts))} are longer than reward {reward.name!r} reads"
        if not number:
            yield ok(said, "0")
            continue
        yield warning(
            said, "0", "it scores their beginning alone: shorten them, or take another reward"
        )


def everything(patient: Patient) -> list:
    """Return every reward of the run once."""
    rewards = [*patient.trainer.scorer.everything, patient.trainer.evaluator.judge]
    return list({id(each): each for each in rewards}.values())


def repeated(patient: Patient, trained: list[Prompt]) -> Iterator[Measured]:
    """Count training prompts that stand twice with the same metadata."""
    counts = Counter((p.text, repr(sorted(p.metadata.items())), p.negative_prompt) for p in trained)
    extra = sum(counts.values()) - len(counts)
    said = f"{len(counts):,} different training prompts, {extra:,} more are repetitions"
    if not extra or patient.config.prompts.train == "shapes":  # there, they balance the tasks
        yield ok(said)
        return
    most, times = counts.most_common(1)[0]
    yield warning(
        f"{said}, such as {most[0]!r:.80}, {times} times",
        "none",
        "a prompt that stands twice is trained on twice as often: drop it unless that is meant",
    )


def held_out_ones(patient: Patient, trained: list[Prompt], held_out: list[Prompt]) -> Measured:
    """Count held-out prompts that are trained on."""
    known = {" ".join(p.text.casefold().split()) for p in trained}
    texts = list(dict.fromkeys(p.text for p in held_out))
    leaked = [text for text in texts if " ".join(text.casefold().split()) in known]
    said = f"{len(leaked):,} of {len(texts):,} held-out prompts are also trained on"
    if not leaked:
        return ok(said, "0")
    p = patient.config.prompts
    why = "prompts.train and prompts.held_out are one file: " if p.train == p.held_out else ""
    return warning(
        f"{said}, {example(leaked)}",
        "0",
        f"{why}the evaluation then does not tell skill from memory: name other prompts by "
        "--set prompts.held_out=FILE",
    )


def quotes(patient: Patient, texts: list[str]) -> Iterator[Measured]:
    """Count prompts of which a reward that reads images would take the wrong text."""
    if not any(isinstance(reward, OcrReward) for reward in everything(patient)):
        return
    strange, missing = [], []
    for text in texts:
        if not quoted_texts(text):
            missing.append(text)
        elif left_open(text):
            strange.append(text)
    if missing:
        yield warning(
            f"{share(len(missing), len(texts))} quote no text, {example(missing)}",
            "0",
            'put what the image shall show in double quotes: a sign that says "Open"',
        )
    if strange:
        shown = min(strange, key=len)
        yield warning(
            f"{share(len(strange), len(texts))} leave a quotation open; of {shown!r:.100} the text "
            f"{quoted_text(shown)!r:.60} is taken",
            "quotation marks in pairs",
            "close every quotation",
        )
    if not missing and not strange:
        yield ok(f"each of {len(texts):,} prompts quotes a text")


def left_open(text: str) -> bool:
    """Whether a quotation mark stands beside the quotations of a prompt."""
    rest = text
    for quoted in quoted_texts(text):
        at = rest.index(quoted)
        rest = rest[: at - 1] + rest[at + len(quoted) + 1 :]
    marks = [i for i, letter in enumerate(rest) if letter in DOUBLE]
    return any(not (i and rest[i - 1].isalnum()) for i in marks)
