# SPDX-License-Identifier: Apache-2.0
"""Reading prompts from files, and dealing them to iterations."""

import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import compose
from chunkgrpo.config import parse_config
from chunkgrpo.config.build import build_prompts
from chunkgrpo.core import FlowDiffusion, Transition, make_sigmas, whole_plan
from chunkgrpo.prompts import PromptSet, read_prompts, shapes_prompts
from chunkgrpo.rollout import Sampler
from chunkgrpo.shapes import grammar
from chunkgrpo.types import Prompt, as_prompts

NUMBERED = PromptSet(as_prompts(f"p{i}" for i in range(7)))

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
    assert found.metadata == ({},) * 3
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
    assert found.metadata == (
        {"tag": "single"}, {"task": "counting"}, {"group": "colors", "other": [1]}, {},
    )  # fmt: skip


def test_a_table_has_a_column_of_prompts(tmp_path):
    table = 'task,prompt\nplain,a star\nquoted,"a star, red"\n,a cross\n'
    found = read_prompts(write(tmp_path, "p.csv", table))
    assert found.texts == ("a star", "a star, red", "a cross")
    assert found.groups == ("plain", "quoted", "all")
    assert found.metadata[1] == {"task": "quoted"}


def test_a_json_list_holds_records_or_texts(tmp_path):
    records = '[{"prompt": "a star",\n "include": [{"class": "star"}]},\n {"prompt": "[a], b"}\n]\n'
    found = read_prompts(write(tmp_path, "p.json", records))
    assert found.texts == ("a star", "[a], b")
    assert found.metadata == ({"include": [{"class": "star"}]}, {})
    texts = read_prompts(write(tmp_path, "q.json", ' [ "a star" , "a cross"]'))
    assert texts.texts == ("a star", "a cross") and texts.metadata == ({}, {})


@pytest.mark.parametrize("name", ["prompt", "Prompt", "text", "TEXT", "caption", "description"])
def test_common_names_of_the_prompt_column_are_found(tmp_path, name):
    found = read_prompts(write(tmp_path, "p.csv", f"id,{name}\n1,a star\n"))
    assert found.texts == ("a star",) and found.metadata == ({"id": "1"},)


def test_the_prompt_column_can_be_named(tmp_path):
    lines = '{"prompt": "a sign that says HI", "words": "HI"}\n'
    path = write(tmp_path, "p.jsonl", lines)
    assert read_prompts(path).metadata == ({"words": "HI"},)
    assert read_prompts(path, "words").texts == ("HI",)
    assert read_prompts(path, "words").metadata == ({"prompt": "a sign that says HI"},)
    with pytest.raises(ValueError, match="has no column 'word'; it has prompt, words"):
        read_prompts(path, "word")
    with pytest.raises(ValueError, match="holds plain texts, which have no column 'words'"):
        read_prompts(write(tmp_path, "p.txt", "a star"), "words")


def test_a_record_may_have_a_negative_prompt(tmp_path):
    lines = (
        '{"prompt": "a star", "negative_prompt": "blurred", "n": 1}\n'
        '{"prompt": "a star", "negative_prompt": ""}\n'
        '{"prompt": "a star", "negative_prompt": null}\n'
        '{"prompt": "a star"}\n'
    )
    found = read_prompts(write(tmp_path, "p.jsonl", lines))
    assert [each.negative_prompt for each in found] == ["blurred", "", None, None]
    assert found.metadata == ({"n": 1}, {}, {}, {})
    # A table cannot tell an empty text from none.
    table = "prompt,negative_prompt\na star,blurred\na cross,\n"
    found = read_prompts(write(tmp_path, "p.csv", table))
    assert [each.negative_prompt for each in found] == ["blurred", None]
    assert found.metadata == ({}, {})
    # Named as the prompts' own column, it is one.
    path = write(tmp_path, "q.jsonl", '{"prompt": "a star", "negative_prompt": "blurred"}\n')
    assert read_prompts(path, "negative_prompt").prompts == (
        Prompt("blurred", {"prompt": "a star"}),
    )


def test_a_list_of_paths_is_a_records_images(tmp_path):
    lines = (
        '{"prompt": "a star", "images": ["a.png", "b.png"], "n": 1}\n'
        '{"prompt": "a star", "images": 4}\n'
        '{"prompt": "a star", "image": "a.png"}\n'
    )
    found = read_prompts(write(tmp_path, "p.jsonl", lines))
    assert [each.images for each in found] == [("a.png", "b.png"), (), ()]
    assert found.metadata == ({"n": 1}, {"images": 4}, {"image": "a.png"})


def test_a_configuration_names_files_and_column(tmp_path):
    path = write(tmp_path, "p.jsonl", "".join(f'{{"a": "x{i}", "b": {i}}}\n' for i in range(5)))
    config = parse_config(
        {
            "prompts": {"train": str(path), "held_out": str(path), "column": "a"},
            "evaluation": {"final_prompts": 2, "prompts": 2},
        }
    )
    assert build_prompts(config, "train").texts == tuple(f"x{i}" for i in range(5))
    assert build_prompts(config, "final").metadata == ({"b": 0}, {"b": 1})
    assert build_prompts(config, "watch").metadata == ({"b": 2}, {"b": 3})


def test_a_run_trains_on_some_tasks_and_is_judged_by_all() -> None:
    config = parse_config({"prompts": {"tasks": ["counting"]}, "evaluation": {"final_prompts": 12}})
    assert set(build_prompts(config, "train").groups) == {"counting"}
    assert set(build_prompts(config, "final").groups) == set(grammar.TASKS)
    config = parse_config({"evaluation": {"final_prompts": 12, "tasks": ["colors"]}})
    assert set(build_prompts(config, "final").groups) == {"colors"}
    assert set(build_prompts(config, "train").groups) == set(grammar.TASKS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt"\n', "line 3 is no JSON"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b", "n": 1}\n',
            "line 2 has no prompt 'prompt'; its fields are text, n",
        ),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "  "}\n', "line 2 has no prompt"),
        ("p.jsonl", '{"prompt": null}\n', "line 1 has no prompt"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "negative_prompt": ["b"]}\n',
            r"line 2 has the negative prompt \['b'\], which is no text",
        ),
        ("p.csv", "task,prompt\nx,a\ny,\n", "line 3 has no prompt"),
        ("p.csv", "task,words\nx,a\n", "no prompt column: its columns are task, words"),
        ("p.csv", "prompt,x\na,1\nb,1,2\n", "line 3 has more cells than the header"),
        ("p.csv", "prompt,x\na,1\nb\n", "line 3 has fewer cells than the header"),
        ("p.csv", "x,prompt\n1,a\n2\n", "line 3 has fewer cells than the header"),
        ("p.csv", 'prompt\na\n"b\n', "line 3 is no CSV"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "line 2 is no JSON object"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2 has no prompt"),
        ("p.json", '[{"prompt": "a"},\n\n{"prompt": ""}]', "line 3 has no prompt"),
        ("p.json", '["a",\n7]', "line 2 is neither a JSON object nor a text"),
        ("p.json", '["a",\n{"prompt": }]', "line 2 is no JSON"),
        ("p.json", '["a"\n"b"]', "line 2 is no JSON: a comma or the list's end is missing"),
        ("p.json", '["a",\n', "line 2 is no JSON"),
        ("p.json", '["a"]\nb', "line 2 comes after the end of the list"),
        ("p.json", '\n{"prompt": "a"}', "line 2: a .json file of prompts must hold a list"),
        ("p.json", "", "holds no prompts"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.json", "[]", "holds no prompts"),
        ("p.xml", "<a/>", r"must end in .txt, .jsonl, .json, .csv"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("a star\nein gr\u00f6\u00dferer Stern\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"p\.txt, line 2 is not UTF-8"):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_prompts(tmp_path / "nowhere")


# --- datasets -----------------------------------------------------------------------------------

HAS_DATASETS = importlib.util.find_spec("datasets") is not None
needs_datasets = pytest.mark.skipif(not HAS_DATASETS, reason="the package datasets is missing")


@pytest.mark.skipif(HAS_DATASETS, reason="the package datasets is installed")
def test_without_the_package_a_dataset_says_what_to_install(tmp_path):
    for source in (str(tmp_path), "owner/name", "owner/name:test"):
        with pytest.raises(ValueError, match=r"install chunkgrpo\[datasets\]") as caught:
            read_prompts(source)
        assert source in str(caught.value)


@needs_datasets
def test_a_dataset_that_was_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [
        {"caption": " a star", "tag": "single", "include": [{"class": "star"}]},
        {"caption": "a cross", "tag": "single", "include": [{"class": "cross"}]},
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    found = read_prompts(tmp_path / "one")
    assert found.texts == ("a star", "a cross") and found.groups == ("single", "single")
    assert found.metadata[1] == {"tag": "single", "include": [{"class": "cross"}]}
    both = DatasetDict({"a": Dataset.from_list(rows[:1]), "b": Dataset.from_list(rows[1:])})
    both.save_to_disk(tmp_path / "two")
    assert read_prompts(f"{tmp_path}/two:b").texts == ("a cross",)
    with pytest.raises(ValueError, match="has the splits a, b; choose one"):
        read_prompts(tmp_path / "two")
    with pytest.raises(ValueError, match="has no splits; leave :b out"):
        read_prompts(f"{tmp_path}/one:b")
    Dataset.from_list([*rows, {"caption": ""}]).save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match="row 3 has no prompt 'caption'"):
        read_prompts(tmp_path / "bad")


@needs_datasets
def test_a_folder_of_data_files(tmp_path):
    from datasets import Dataset

    (tmp_path / "set").mkdir()
    Dataset.from_list([{"text": "a star", "n": 3}]).to_parquet(tmp_path / "set" / "part.parquet")
    found = read_prompts(tmp_path / "set")
    assert found.texts == ("a star",) and found.metadata == ({"n": 3},)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read as a dataset") as caught:
        read_prompts(tmp_path / "empty")
    assert "\n" not in str(caught.value)


# --- public prompt sets -------------------------------------------------------------------------


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
        assert all("include" in m and "prompt" not in m for m in found.metadata)
        # The only task with exclusions is counting: one more of the same class.
        excluding = [m for m in found.metadata if "exclude" in m]
        assert len(excluding) == 320 and {m["tag"] for m in excluding} == {"counting"}
        assert found.metadata[0] == {
            "tag": "counting",
            "include": [{"class": "wine glass", "count": 2}],
            "exclude": [{"class": "wine glass", "count": 3}],
        }
        assert Counter(found.groups) == {
            "color_attr": 400, "position": 400, "two_object": 396,
            "colors": 376, "counting": 320, "single_object": 320,
        }  # fmt: skip
    else:
        assert set(found.groups) == {"all"} and not any(found.metadata)
    if name == "ocr.txt":
        assert all(text.count('"') == 2 for text in found.texts)  # one text to render each


@pytest.mark.needs_data
def test_no_public_prompt_set_is_left_out():
    folder = os.environ.get("CHUNKGRPO_DATA")
    if not folder:
        pytest.skip("CHUNKGRPO_DATA names no folder of public prompt sets")
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(PUBLIC)


# --- dealing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 20])
def test_every_pass_is_a_permutation(number):
    stream = [p.text for i in range(21) for p in NUMBERED.batch(i, number, seed=4)]
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
        PromptSet(()).batch(0, 1, 0)


def test_the_head_keeps_its_labels():
    both = PromptSet(tuple(Prompt(text, group=g) for text, g in zip("abc", "xyx", strict=True)))
    assert both.head(2) == PromptSet((Prompt("a", group="x"), Prompt("b", group="y")))
    assert both.head(2).texts == ("a", "b") and both.head(2).groups == ("x", "y")
    assert len(both.head(9)) == 3
    noted = PromptSet((Prompt("a", {"n": 1}, group="x"), Prompt("b", {"n": 2}, group="y")))
    assert noted[1:] == PromptSet((Prompt("b", {"n": 2}, group="y"),))
    assert noted[1:] != PromptSet((Prompt("b", group="y"),))
    assert noted.metadata == ({"n": 1}, {"n": 2})
    assert list(noted) == list(noted.prompts)


def test_texts_become_records_and_records_pass():
    record = Prompt("a", {"n": 1}, "blurred", ("a.png",), "x")
    first, second = as_prompts([record, "b"])
    assert first is record
    assert second == Prompt("b", {}, None, (), "all")
    # Two with one text are two, but a mapping does not keep one from being a key.
    assert Prompt("a", {"n": 1}) != Prompt("a", {"n": 2})
    assert hash(Prompt("a", {"n": 1})) == hash(Prompt("a", {"n": 1}))


def test_rows_and_prompts_of_a_batch_agree():
    rows = NUMBERED.batch_rows(3, 5, seed=4)
    assert NUMBERED.batch(3, 5, seed=4) == [NUMBERED.prompts[row] for row in rows]


def test_metadata_reach_the_rewards_that_ask(tiny_policy, tmp_path):
    """Training and evaluation hand every image's own mapping to its reward."""
    prompts = PromptSet(tuple(Prompt(f"p{i}", {"n": i}) for i in range(5)))
    seen = []

    class Noted:
        name, needs_metadata = "noted", True

        def __call__(self, images, prompts, metadata):
            seen.append(list(zip(prompts, metadata, strict=True)))
            return torch.arange(len(prompts), dtype=torch.float32)

    flow = Transition(FlowDiffusion(0.7))
    trainer = compose.trainer(
        tiny_policy(), compose.chunk_grpo(whole_plan(2), flow, updates=1),
        Sampler(flow, make_sigmas(3), same_noise=True, batch_size=96), prompts, [(Noted(), 1.0)],
        prompts, Noted(), tmp_path, num_prompts=2, group_size=3, assign="gain",
    )  # fmt: skip
    trainer.train_once()
    # One call scores the images, one each chunk's clean prediction.
    assert len(seen) == 2 and all(len(call) == 6 for call in seen)
    trainer.evaluate(prompts, 2, seed=0)
    assert len(seen[-1]) == 10
    for call in seen:
        assert all(text == f"p{noted['n']}" for text, noted in call)


@pytest.mark.parametrize("overlap", [False, True])
def test_two_records_of_one_text_are_rewarded_by_their_own_metadata(tiny_policy, tmp_path, overlap):
    """In training, synchronous or not, and in evaluation."""
    prompts = PromptSet((Prompt("a star", {"n": 1}), Prompt("a star", {"n": 2})))
    seen = []

    class Noted:
        name, needs_metadata = "noted", True

        def __call__(self, images, prompts, metadata):
            assert prompts == ["a star"] * len(images)
            seen.append([each["n"] for each in metadata])
            return images.mean((1, 2, 3)).cpu() + torch.tensor([100.0 * n for n in seen[-1]])

    flow = Transition(FlowDiffusion(0.7))
    trainer = compose.trainer(
        tiny_policy(), compose.chunk_grpo(whole_plan(2), flow, updates=1),
        Sampler(flow, make_sigmas(3), same_noise=True, batch_size=96), prompts, [(Noted(), 1.0)],
        prompts, Noted(), tmp_path, num_prompts=2, group_size=3, overlap=overlap,
    )  # fmt: skip
    first, second = (prompts.prompts.index(each) for each in trainer.prompts_of(0))
    trainer.train_once()
    assert {first, second} == {0, 1}
    assert seen == [[first + 1] * 3 + [second + 1] * 3]
    found = trainer.evaluate(prompts, 2, seed=0)
    assert seen[-1] == [1, 1, 2, 2]
    assert (found.scores["noted"] // 100).tolist() == [[1, 1], [2, 2]]


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
