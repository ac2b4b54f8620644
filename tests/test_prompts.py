# SPDX-License-Identifier: Apache-2.0
"""Reading prompts from files, and dealing them to iterations."""

import os
from collections import Counter
from pathlib import Path

import pytest

from chunkgrpo.prompts import PromptSet, read_prompts, shapes_prompts
from chunkgrpo.shapes import grammar

NUMBERED = PromptSet(tuple(f"p{i}" for i in range(7)), ("all",) * 7)

# --- files --------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    path = write(tmp_path, "p.txt", "a star\n\n  ein größerer Stern \n\na cross")
    found = read_prompts(path)
    assert found.texts == ("a star", "ein größerer Stern", "a cross")
    assert found.groups == ("all",) * 3
    assert read_prompts(str(path)) == found


def test_records_may_carry_a_label(tmp_path):
    lines = (
        '{"prompt": "a star", "tag": "single"}\n'
        '{"prompt": "two stars", "task": "counting"}\n\n'
        '{"prompt": " a red star ", "group": "colors", "other": [1]}\n'
        '{"prompt": "a cross"}\n'
    )
    found = read_prompts(write(tmp_path, "p.jsonl", lines))
    assert found.texts == ("a star", "two stars", "a red star", "a cross")
    assert found.groups == ("single", "counting", "colors", "all")


def test_a_table_has_a_column_of_prompts(tmp_path):
    table = 'task,prompt\nplain,a star\nquoted,"a star, red"\n,a cross\n'
    found = read_prompts(write(tmp_path, "p.csv", table))
    assert found.texts == ("a star", "a star, red", "a cross")
    assert found.groups == ("plain", "quoted", "all")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt"\n', "line 3 is no JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "  "}\n', "line 2 has no prompt"),
        ("p.jsonl", '{"prompt": null}\n', "line 1 has no prompt"),
        ("p.csv", "task,prompt\nx,a\ny,\n", "line 3 has no prompt"),
        ("p.csv", "task,text\nx,a\n", "line 2 has no prompt"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.json", "[]", "must end in .txt, .jsonl or .csv"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path)


PUBLIC = {
    "geneval.jsonl": (2212, "a photo of two wine glasses"),
    "drawbench.txt": (1000, None),
    "hpdv21_test.csv": (400, None),
    "ocr.txt": (1018, None),
}


@pytest.mark.needs_data
@pytest.mark.parametrize("name", PUBLIC)
def test_public_prompt_sets_are_read_whole(name):
    folder = os.environ.get("CHUNKGRPO_DATA")
    if not folder:
        pytest.skip("CHUNKGRPO_DATA names no folder of public prompt sets")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    number, first = PUBLIC[name]
    found = read_prompts(path)
    assert len(found) == number
    assert first is None or found.texts[0] == first
    assert all(text == text.strip() and text for text in found.texts)
    if name == "geneval.jsonl":
        assert Counter(found.groups) == {
            "color_attr": 400, "position": 400, "two_object": 396,
            "colors": 376, "counting": 320, "single_object": 320,
        }  # fmt: skip
    else:
        assert set(found.groups) == {"all"}


# --- dealing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 20])
def test_every_pass_is_a_permutation(number):
    stream = [text for i in range(21) for text in NUMBERED.batch(i, number, seed=4)]
    assert len(stream) == 21 * number
    epochs = [stream[i : i + 7] for i in range(0, len(stream) - 6, 7)]
    assert all(sorted(epoch) == sorted(NUMBERED.texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # each pass in a new order


def test_a_batch_depends_on_nothing_but_its_arguments():
    forward = [NUMBERED.batch(i, 3, seed=4) for i in range(10)]
    backward = [NUMBERED.batch(i, 3, seed=4) for i in reversed(range(10))]
    assert forward == backward[::-1]
    assert forward != [NUMBERED.batch(i, 3, seed=5) for i in range(10)]


def test_no_prompts_can_not_be_dealt():
    with pytest.raises(ValueError, match="no prompts to draw from"):
        PromptSet((), ()).batch(0, 1, 0)


def test_the_head_keeps_its_labels():
    both = PromptSet(("a", "b", "c"), ("x", "y", "x"))
    assert both.head(2) == PromptSet(("a", "b"), ("x", "y"))
    assert len(both.head(9)) == 3


# --- the embedded world -------------------------------------------------------------------------


def test_a_number_of_prompts_is_spread_evenly_over_tasks():
    found = shapes_prompts("held_out", 60, seed=1)
    assert len(set(found.texts)) == 60
    assert Counter(found.groups) == dict.fromkeys(grammar.TASKS, 10)
    assert found == shapes_prompts("held_out", 60, seed=1)
    assert found != shapes_prompts("held_out", 60, seed=2)
    for text, group in zip(found.texts, found.groups, strict=True):
        assert grammar.parse(text).task == group
        assert grammar.is_held_out_text(text)


def test_all_prompts_give_every_task_equal_weight():
    found = shapes_prompts("train", None, seed=1)
    counts = Counter(found.groups)
    assert set(counts) == set(grammar.TASKS) and len(set(counts.values())) == 1
    # Any stretch is balanced, not only the whole.
    assert set(Counter(found.groups[:60]).values()) == {10}
    # A small task is repeated evenly, a large one not at all.
    for task in grammar.TASKS:
        times = Counter(t for t, g in zip(found.texts, found.groups, strict=True) if g == task)
        assert max(times.values()) - min(times.values()) <= 1
        assert set(times) <= {prompt.text for prompt in grammar.prompts(task, "train")}


def test_tasks_can_be_chosen():
    found = shapes_prompts("train", 10, seed=1, tasks=["counting", "position"])
    assert Counter(found.groups) == {"counting": 5, "position": 5}
    with pytest.raises(ValueError, match="unknown task"):
        shapes_prompts("train", 10, seed=1, tasks=["cooking"])
    with pytest.raises(ValueError, match="unknown split"):
        shapes_prompts("test", 10, seed=1)
