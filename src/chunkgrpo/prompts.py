# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from: the embedded world's grammar, a file, or a dataset."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.runtime.sources import local_path
from chunkgrpo.types import Prompt


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order.

    Attributes:
        prompts: The records; two with the same text are two prompts.
    """

    prompts: tuple[Prompt, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each prompt."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def groups(self) -> tuple[str, ...]:
        """The label of each prompt in reports, such as a task."""
        return tuple(prompt.group for prompt in self.prompts)

    @property
    def metadata(self) -> tuple[Mapping[str, Any], ...]:
        """Other fields of each prompt's record; empty where there are none."""
        return tuple(prompt.metadata for prompt in self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def batch(self, iteration: int, number: int, seed: int) -> list[Prompt]:
        """Return an iteration's prompts, see :meth:`batch_rows`."""
        return [self.prompts[i] for i in self.batch_rows(iteration, number, seed)]

    def batch_rows(self, iteration: int, number: int, seed: int) -> list[int]:
        """Return which prompts an iteration takes: passes over the set, each in a new order.

        A pure function of its arguments, so a resumed run sees the prompts it would have seen.
        """
        if not self.prompts:
            raise ValueError("there are no prompts to draw from")
        rows: list[int] = []
        position = iteration * number
        while len(rows) < number:
            epoch, offset = divmod(position + len(rows), len(self))
            order = np.random.default_rng(derive_seed(seed, epoch)).permutation(len(self))
            rows += [int(i) for i in order[offset : offset + number - len(rows)]]
        return rows

    def __getitem__(self, index: slice) -> PromptSet:
        """Return some of the prompts."""
        return PromptSet(self.prompts[index])

    def head(self, number: int) -> PromptSet:
        """Return the first prompts."""
        return self[:number]


def shapes_prompts(
    split: str, number: int | None, seed: int, tasks: Sequence[str] | None = None
) -> PromptSet:
    """Return prompts of the embedded world, evenly over its tasks.

    Args:
        split: ``"train"``, ``"held_out"`` or ``"held_out_pairs"``.
        number: Number of prompts; None gives every task equal weight by repeating the smaller ones.
        seed: Seed of the choice.
        tasks: Tasks to draw from; all by default.
    """
    from chunkgrpo.shapes import grammar

    chosen = tuple(tasks or grammar.TASKS)
    if number is not None:
        found = grammar.sample_prompts(number, split, seed, chosen)
        return PromptSet(tuple(Prompt(p.text, group=p.task) for p in found))
    pools = [grammar.prompts(task, split) for task in chosen]
    largest = min(max(len(pool) for pool in pools), 1200)
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(np.resize(np.arange(len(p)), largest)) for p in pools]
    every = [pools[t][columns[t][i]] for i in range(largest) for t in range(len(pools))]
    return PromptSet(tuple(Prompt(p.text, group=p.task) for p in every))


def read_prompts(source: str | Path, column: str | None = None) -> PromptSet:
    """Read prompts from a file or a Hugging Face dataset.

    A ``.txt`` file holds one prompt per line; a ``.jsonl``, ``.json`` or ``.csv`` file one record
    per prompt (in ``.json`` a list of them, or of texts). Anything else is a dataset: a folder
    that ``datasets`` wrote or can read, or a name on the hub, ``owner/name`` or
    ``owner/name:split``; which needs the extra ``chunkgrpo[datasets]``.

    The prompt is the field ``column``, or the first of ``prompt``, ``prompts``, ``text``,
    ``caption`` and ``description`` (in any case) that the first record has. A field ``tag``,
    ``task`` or ``group`` labels it. A field ``negative_prompt`` is its negative prompt (none where
    it is null, or an empty cell of a table), and a field ``images`` that is a list of paths holds
    its source images. All other fields are its metadata, labels included.

    Args:
        source: The file, folder or name.
        column: Field of the prompt; only where records have fields.

    Raises:
        ValueError: If the source is missing, empty, of another kind, or a record is broken, has
            no prompt or a negative prompt that is no text; the message names the line (of a
            dataset, the row).
    """
    path = Path(source).expanduser()
    if path.suffix in READERS:
        if not path.is_file():
            raise ValueError(f"prompt file {path} does not exist")
        found, place = READERS[path.suffix](path), "line"
    else:
        found, place = _dataset_records(str(source)), "row"
    prompts: list[Prompt] = []
    key = None
    for n, record in found:
        if isinstance(record, str):
            record = {"prompt": record}
        elif key is None:
            key = _prompt_column(source, record, column)
        prompts.append(_prompt_of(record, key, f"{source}, {place} {n}"))
    if not prompts:
        raise ValueError(f"prompt file {source} holds no prompts")
    if column and key is None:
        raise ValueError(
            f"{source} holds plain texts, which have no column {column!r}; leave the column out"
        )
    return PromptSet(tuple(prompts))


def _prompt_of(record: Mapping[str, Any], key: str | None, where: str) -> Prompt:
    """Return a record's prompt.

    Args:
        record: Its fields.
        key: Field of the text; None for a plain text, which is ``prompt``.
        where: Names the record in errors.
    """
    text = record.get(key or "prompt")
    if not isinstance(text, str) or not text.strip():
        told = f" {key!r}" if key else ""
        if key and key not in record:
            told += f"; its fields are {', '.join(map(str, record)) or 'none'}"
        raise ValueError(f"{where} has no prompt{told}")
    rest = {name: value for name, value in record.items() if name != (key or "prompt")}
    negative = rest.pop("negative_prompt", None)
    if negative is not None and not isinstance(negative, str):
        raise ValueError(
            f"{where} has the negative prompt {negative!r:.80}, which is no text; quote it, or "
            "leave it out for the model's own setting"
        )
    images = rest.get("images")
    if isinstance(images, list) and all(isinstance(path, str) for path in images):
        del rest["images"]
    else:  # not paths, so metadata like any other field
        images = []
    group = str(record.get("tag") or record.get("task") or record.get("group") or "all")
    return Prompt(text.strip(), rest, negative, tuple(images), group)


def _prompt_column(source: str | Path, record: Mapping[str, Any], column: str | None) -> str:
    """Return the field that holds the prompt, judged by the first record."""
    names = [str(name) for name in record]
    if column:
        if column in names:
            return column
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(names)}")
    for wanted in PROMPT_COLUMNS:
        for name in names:
            if name.lower() == wanted:
                return name
    raise ValueError(
        f"{source} has no prompt column: its columns are {', '.join(names) or 'none'}, and none is "
        f"named {', '.join(PROMPT_COLUMNS)}; name it with prompts.column"
    )


def _read_text(path: Path) -> str:
    """Return a file's text without a byte-order mark."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        n = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {n} is not UTF-8; save the file as UTF-8") from None


def _text_records(path: Path) -> Iterator[NumberedRecord]:
    for n, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield n, line


def _jsonl_records(path: Path) -> Iterator[NumberedRecord]:
    # Not splitlines: JSON strings may hold other line separators of Unicode.
    for n, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {n} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {n} is no JSON object")
            yield n, record


def _json_records(path: Path) -> Iterator[NumberedRecord]:
    """Read a JSON list entry by entry, so that each entry's line is known."""
    text, decoder = _read_text(path), json.JSONDecoder()

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    def line(position: int) -> int:
        return text.count("\n", 0, position) + 1

    position = skip(0)
    if position == len(text):
        return
    if text[position] != "[":
        raise ValueError(
            f"{path}, line {line(position)}: a .json file of prompts must hold a list of objects "
            "or texts; for an object a line, name it .jsonl"
        )
    position = skip(position + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno} is no JSON: {error}") from error
        n = line(position)
        if not isinstance(record, dict | str):
            raise ValueError(f"{path}, line {n} is neither a JSON object nor a text")
        yield n, record
        position = skip(end)
        if text[position : position + 1] == "]":
            if skip(position + 1) < len(text):
                rest = line(skip(position + 1))
                raise ValueError(f"{path}, line {rest} comes after the end of the list")
            return
        if text[position : position + 1] != ",":
            at = line(position)
            raise ValueError(f"{path}, line {at} is no JSON: a comma or the list's end is missing")
        position = skip(position + 1)


def _csv_records(path: Path) -> Iterator[NumberedRecord]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    while True:
        before = reader.line_num
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {before + 1} is no CSV: {error}") from error
        if None in row:
            raise ValueError(
                f"{path}, line {reader.line_num} has more cells than the header; quote cells that "
                "hold commas"
            )
        if None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num} has fewer cells than the header; end it with a "
                "comma for each empty cell"
            )
        if row.get("negative_prompt") == "":  # a table cannot represent absence otherwise
            del row["negative_prompt"]
        yield reader.line_num, row


def dataset_and_split(source: str) -> tuple[str, str | None]:
    """Return a dataset's folder or name, and its split where ``:split`` names one."""
    if Path(source).expanduser().exists() or ":" not in source:
        return source, None
    name, _, split = source.rpartition(":")
    return name, split


def _dataset_records(source: str) -> Iterator[NumberedRecord]:
    """Read a dataset's rows, without image and audio columns."""
    name, split = dataset_and_split(source)
    try:
        path = local_path(name) or Path(name)
    except FileNotFoundError as error:
        raise ValueError(
            f"prompt file {error}; give a {', '.join(READERS)} file, a folder that datasets can "
            "read, or a dataset's name on the hub, owner/name"
        ) from None
    if path.is_file():
        raise ValueError(f"prompt file {source} must end in {', '.join(READERS)}")
    try:
        import datasets  # type: ignore[import-not-found] # an extra
    except ImportError:
        raise ValueError(
            f"{source} is no {', '.join(READERS)} file, and reading it as a dataset needs the "
            "package datasets; install chunkgrpo[datasets], or export the prompts to a file"
        ) from None
    saved = path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    )
    try:
        found: Any = (
            datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
        )
    except Exception as error:  # datasets raises errors of many unrelated classes
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source} cannot be read as a dataset: {reason}") from error
    if isinstance(found, dict):
        names = list(found)
        split = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if split not in names:
            raise ValueError(
                f"dataset {path} has the splits {', '.join(names)}; choose one, as in "
                f"{path}:{names[0]}"
            )
        found = found[split]
    elif split:
        raise ValueError(f"dataset {path} has no splits; leave :{split} out")
    media = [n for n, f in found.features.items() if type(f).__name__ in MEDIA_FEATURES]
    yield from enumerate(found.remove_columns(media), 1)


NumberedRecord = tuple[int, Mapping[str, Any] | str]
"""A line's or row's number, and what stands there."""

READERS: Mapping[str, Callable[[Path], Iterator[NumberedRecord]]] = {
    ".txt": _text_records,
    ".jsonl": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
}
PROMPT_COLUMNS = ("prompt", "prompts", "text", "caption", "description")
MEDIA_FEATURES = ("Image", "Audio", "Video", "Pdf", "Nifti")
