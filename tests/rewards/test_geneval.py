# SPDX-License-Identifier: Apache-2.0
"""GenEval's rules on made-up scenes: right ones score 1, each kind of mistake scores 0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkgrpo.rewards import make_reward
from chunkgrpo.rewards.geneval import (
    COLORS,
    RELATIONS,
    ClipColorNamer,
    Detection,
    Rules,
    TransformersDetector,
    demands,
    judge,
    overlap,
    read_metadata,
    relations,
)

SIDE = 600  # pixels of the made-up images
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above")))
CENTRES = {"left of": (100, 300), "right of": (500, 300), "above": (300, 100), "below": (300, 500)}


class Scene(list[Detection]):
    """Detections, and the colour of each by its box."""

    def __init__(self) -> None:
        super().__init__()
        self.colors: dict[Any, str] = {}

    def add(
        self, label: str, centre: tuple[float, float], color: str = "", score: float = 0.95
    ) -> None:
        x, y = centre
        self.append(Detection(label, score, (x - 20, y - 20, x + 20, y + 20)))
        self.colors[self[-1].box] = color

    def copy(self) -> Scene:
        other = Scene()
        other.extend(self)
        other.colors = dict(self.colors)
        return other


class PaintedColors:
    """Looks colours up instead of at pixels."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def __call__(self, image: Tensor, detections: Sequence[Detection]) -> list[str]:
        return [self.scene.colors[detection.box] for detection in detections]


def right_scene(line: dict[str, Any]) -> Scene:
    """What a line demands, and a bystander it does not mention."""
    scene, row = Scene(), 0
    for i, entry in enumerate(line["include"]):
        for _ in range(entry["count"]):
            centre: tuple[float, float] = (60 + 80 * (row % 7), 60 + 80 * (row // 7))
            if "position" in entry:
                centre = CENTRES[entry["position"][0]]
            elif any(e.get("position", ("", -1))[1] == i for e in line["include"]):
                centre = (300, 300)
            scene.add(entry["class"], centre, entry.get("color", "green"))
            row += 1
    scene.add("sentinel", (580, 580))
    return scene


def wrong_scenes(line: dict[str, Any]) -> Iterator[tuple[str, Scene]]:
    """The right scene with one mistake, of each kind that the line allows."""
    yield "empty", Scene()
    for entry in line["include"]:
        label = entry["class"]
        scene = right_scene(line)
        scene.remove(next(d for d in scene if d.label == label))
        yield f"{label} one short", scene
        scene = right_scene(line)
        i = next(i for i, d in enumerate(scene) if d.label == label)
        scene[i] = replace(scene[i], score=0.29)
        yield f"{label} unsure", scene
        scene = right_scene(line)
        scene[i] = replace(scene[i], label="sentinel")
        yield f"{label} replaced", scene
        if "color" in entry:
            for color in COLORS:
                if color != entry["color"]:
                    scene = right_scene(line)
                    scene.colors[scene[i].box] = color
                    yield f"{label} is {color}", scene
        if "position" in entry:
            relation = entry["position"][0]
            for other in RELATIONS:
                if other != relation:
                    scene = right_scene(line)
                    scene.pop(i)
                    scene.add(label, CENTRES[other])
                    yield f"{label} {other} instead of {relation}", scene
            scene = right_scene(line)
            scene.pop(i)
            scene.add(label, (302, 298))
            yield f"{label} on top", scene
    for entry in line.get("exclude", ()):
        scene = right_scene(line)
        have = sum(d.label == entry["class"] for d in scene)
        for extra in range(entry["count"] - have):
            scene.add(entry["class"], (60 + 80 * extra, 500))
        yield f"{entry['class']} too many", scene
    if line["tag"] == "counting":
        scene = right_scene(line)
        scene[0] = replace(scene[0], score=0.89)  # enough elsewhere, not for counting
        yield "not sure enough to count", scene


def verdict(line: dict[str, Any], scene: Scene) -> bool:
    return judge(torch.zeros(3, 1, 1), scene, line, PaintedColors(scene)).correct


LINES: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bowl", "count": 1}]},
    {"tag": "two_object", "include": [{"class": "bowl", "count": 1}, {"class": "dog", "count": 1}]},
    {"tag": "counting", "include": [{"class": "cup", "count": 3}],
     "exclude": [{"class": "cup", "count": 4}]},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "purple"}]},
    {"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"},
                                      {"class": "dog", "count": 1, "color": "blue"}]},
    *({"tag": "position", "include": [{"class": "cow", "count": 1},
                                      {"class": "cup", "count": 1, "position": [relation, 0]}]}
      for relation in RELATIONS),
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["tag"])
def test_right_scenes_pass_and_each_mistake_fails(line: dict[str, Any]) -> None:
    assert verdict(line, right_scene(line))
    mistakes = list(wrong_scenes(line))
    assert len(mistakes) >= 4
    for what, scene in mistakes:
        assert not verdict(line, scene), what


@pytest.mark.needs_data
def test_every_line_of_the_benchmark() -> None:
    folder = os.environ.get("CHUNKGRPO_DATA")
    if not folder or not (Path(folder) / "geneval.jsonl").is_file():
        pytest.skip("set CHUNKGRPO_DATA to a folder with GenEval's metadata as geneval.jsonl")
    path = Path(folder) / "geneval.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert len(lines) >= 553 and len(read_metadata(path)) == 553
    tested: dict[str, int] = {}
    for line in {line["prompt"]: line for line in lines}.values():
        assert verdict(line, right_scene(line)), line
        for what, scene in wrong_scenes(line):
            assert not verdict(line, scene), (line, what)
            tested[line["tag"]] = tested.get(line["tag"], 0) + 1
    assert len(tested) == 6 and all(tested.values())


def test_only_the_surest_objects_are_looked_at() -> None:
    """Colour and place are those of the surest object, as in the benchmark."""
    line = LINES[3]
    scene = Scene()
    scene.add("cup", (100, 100), "red", score=0.9)
    scene.add("cup", (300, 100), "purple", score=0.8)
    assert not verdict(line, scene)
    scene.add("cup", (500, 100), "purple", score=0.95)
    assert verdict(line, scene)


def test_reasons_are_given() -> None:
    line = LINES[4]
    scene = right_scene(line)
    scene.pop(1)
    scene.colors[scene[0].box] = "pink"
    reasons = judge(torch.zeros(3, 1, 1), scene, line, PaintedColors(scene)).reasons
    assert reasons == ("expected red cup, found pink", "expected 1 dog, found 0")


def test_relations_follow_the_formula() -> None:
    middle = (40.0, 40.0, 60.0, 60.0)
    assert relations((0, 40, 20, 60), middle, 0.1) == {"left of"}
    assert relations((80, 40, 100, 60), middle, 0.1) == {"right of"}
    assert relations((40, 0, 60, 20), middle, 0.1) == {"above"}
    assert relations((40, 80, 60, 100), middle, 0.1) == {"below"}
    assert relations((0, 0, 20, 20), middle, 0.1) == {"left of", "above"}
    assert relations(middle, middle, 0.1) == set()
    # 4 pixels of offset are just what a tenth of the summed widths takes away.
    assert relations((36, 40, 56, 60), middle, 0.1) == set()
    # 7 pixels: 3 remain, which is less than half of 7; 9: 5 remain of 9.
    assert relations((33, 40, 53, 60), middle, 0.1) == set()
    assert relations((31, 40, 51, 60), middle, 0.1) == {"left of"}


def test_overlapping_boxes_can_be_dropped() -> None:
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    line = LINES[2]
    scene = right_scene(line)
    twice = replace(scene[0], box=tuple(edge + 1 for edge in scene[0].box), score=0.91)
    scene.append(twice)
    colors = PaintedColors(scene)
    image = torch.zeros(3, 1, 1)
    assert not judge(image, scene, line, colors).correct
    assert judge(image, scene, line, colors, Rules(max_overlap=0.8)).correct
    assert judge(image, scene, line, colors, Rules(max_objects=3)).correct


def test_reward_reads_demands_by_prompt(tmp_path: Path) -> None:
    lines = [{**line, "prompt": f"prompt {i}"} for i, line in enumerate(LINES)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [*lines, lines[0]]) + "\n\n")
    scenes = [right_scene(line) for line in lines]
    scenes[0].clear()
    asked: list[list[str]] = []

    def detector(images: Tensor, labels: Sequence[Sequence[str]]) -> list[Scene]:
        asked.extend(list(each) for each in labels)
        return scenes

    def colors(image: Tensor, detections: Sequence[Detection]) -> list[str]:
        number = round(image.mean().item() * 100)
        return [scenes[number].colors[detection.box] for detection in detections]

    reward = make_reward("geneval", {"metadata": path, "detector": detector, "color_model": colors})
    images = torch.arange(9).view(9, 1, 1, 1).expand(9, 3, 4, 4) / 100
    scores = reward(images, [line["prompt"] for line in lines])
    assert scores.tolist() == [0] + [1] * 8 and scores.dtype == torch.float32
    assert asked[1] == ["bowl", "dog"] and asked[2] == ["cup"]
    with pytest.raises(ValueError, match="no line for the prompt 'a cat'"):
        reward(images[:1], ["a cat"])


def scene_reader(scenes: Sequence[Scene], classes: set[str] | None = None) -> Any:
    """A detector that finds the scene whose number is the image's level of grey in per cent."""

    def number(image: Tensor) -> int:
        return round(image.mean().item() * 100)

    class Reader:
        def __call__(self, images: Tensor, labels: Sequence[Sequence[str]]) -> list[Scene]:
            return [scenes[number(image)] for image in images]

        def colors(self, image: Tensor, detections: Sequence[Detection]) -> list[str]:
            return [scenes[number(image)].colors[detection.box] for detection in detections]

    reader = Reader()
    reader.classes = classes  # type: ignore[attr-defined]
    return reader


def grey(*levels: int) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 100


def test_demands_come_with_the_prompts(tmp_path: Path) -> None:
    """A prompt file in GenEval's form is all that is needed."""
    from chunkgrpo.prompts import read_prompts
    from chunkgrpo.rewards import Scorer
    from chunkgrpo.rewards.scoring import check_prompts

    path = tmp_path / "geneval.jsonl"
    path.write_text(
        "\n".join(json.dumps({**line, "prompt": f"prompt {i}"}) for i, line in enumerate(LINES))
    )
    prompts = read_prompts(path)
    scenes = [right_scene(line) for line in LINES]
    scenes[2].append(replace(scenes[2][0]))  # a fourth cup
    reader = scene_reader(scenes)
    reward: Any = make_reward("geneval", {"detector": reader, "color_model": reader.colors})
    assert reward.needs_metadata and reward.share
    check_prompts(reward, prompts.prompts)
    scorer = Scorer([(reward, 1.0)])
    scores = scorer(grey(*range(9)), prompts.prompts).total
    assert scores.tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1]
    # Each image is judged by its own prompt's demands.
    swapped = scorer(grey(1, 0, 3), prompts.prompts[:3]).total
    assert swapped.tolist() == [1, 0, 0]


@pytest.mark.needs_data
def test_the_published_prompts_bring_their_demands() -> None:
    from chunkgrpo.prompts import read_prompts
    from chunkgrpo.rewards.scoring import check_prompts

    folder = os.environ.get("CHUNKGRPO_DATA")
    if not folder or not (Path(folder) / "geneval.jsonl").is_file():
        pytest.skip("set CHUNKGRPO_DATA to a folder with GenEval's metadata as geneval.jsonl")
    prompts = read_prompts(Path(folder) / "geneval.jsonl")
    lines = list(dict(zip(prompts.texts, prompts.metadata)).items())
    assert len(lines) == 553
    for start in range(0, len(lines), 90):  # levels of grey name the scenes of one batch
        part = lines[start : start + 90]
        scenes = [right_scene(dict(known)) for _, known in part]
        reader = scene_reader(scenes)
        reward: Any = make_reward("geneval", {"detector": reader, "color_model": reader.colors})
        check_prompts(reward, prompts.prompts)
        texts, metadata = [text for text, _ in part], [known for _, known in part]
        assert reward(grey(*range(len(part))), texts, metadata).all()
        scenes[0].clear()
        assert reward(grey(0), texts[:1], metadata[:1]).tolist() == [0]


def test_tables_store_what_is_absent_as_none() -> None:
    entry = {"class": "cup", "count": 1, "color": None, "position": None}
    known = {"tag": "single_object", "include": [entry], "exclude": None, "id": 3}
    line = demands("a cup", known)
    assert line == {
        "tag": "single_object", "prompt": "a cup", "include": [{"class": "cup", "count": 1}],
    }  # fmt: skip
    scene = right_scene(line)
    assert verdict(line, scene) and not verdict(line, Scene())


@pytest.mark.parametrize(
    "known, message",
    [
        ({}, "nothing says what the prompt 'a cup' demands: its record has no tag and no include"),
        ({"tag": "colors"}, r"has no include; train on a .jsonl file .*\(--prompts FILE\)"),
        ({"tag": "shape", "include": []}, "demands of the prompt 'a cup' are wrong: .*'shape'"),
        ({"tag": "colors", "include": [{"class": "cup"}]}, "'a cup' are wrong: KeyError.*count"),
        ({"tag": "colors", "include": ["cup"]}, "'a cup' are wrong: AttributeError"),
    ],
)
def test_prompts_without_demands_are_refused(known: dict[str, Any], message: str) -> None:
    reward: Any = make_reward("geneval", {"detector": scene_reader([Scene()])})
    for ask in (reward.check_prompts, lambda *given: reward(grey(0), *given)):
        with pytest.raises(ValueError, match=f"reward 'geneval': .*{message}"):
            ask(["a cup"], [known])


def test_one_text_with_two_demands_is_two_prompts() -> None:
    """A bowl alone is what the first asks for, and half of what the second does."""
    reward: Any = make_reward("geneval", {"detector": scene_reader([right_scene(LINES[0])])})
    reward.check_prompts(["a bowl"] * 2, LINES[:2])
    assert reward(grey(0, 0), ["a bowl"] * 2, LINES[:2]).tolist() == [1, 0]


@pytest.mark.parametrize("from_file", [False, True])
def test_classes_that_the_detector_can_not_find_are_named(from_file: bool, tmp_path: Path) -> None:
    """It would never find them: include would always fail, exclude always pass."""
    lines = [
        {**LINES[0], "prompt": "a bowl"},
        {**LINES[0], "prompt": "no yeti", "exclude": [{"class": "yeti", "count": 1}]},
        {"tag": "single_object", "prompt": "a dodo", "include": [{"class": "dodo", "count": 1}]},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    reader = scene_reader([right_scene(LINES[0])], {"bowl", "cup"})
    options = {"detector": reader} | ({"metadata": path} if from_file else {})
    reward: Any = make_reward("geneval", options)
    texts = [line["prompt"] for line in lines]
    known = [] if from_file else [lines]
    reward.check_prompts(texts[:1], *([lines[:1]] if known else []))
    message = "'geneval': prompts ask for 'yeti', 'dodo', which the detector cannot find: it knows"
    with pytest.raises(ValueError, match=f"{message} 2 classes, such as bowl, cup; leave these"):
        reward.check_prompts(texts, *known)
    with pytest.raises(ValueError, match=message):
        reward(grey(0, 0, 0), texts, *known)
    reader.classes = None  # finds whatever it is asked for
    assert reward(grey(0, 0, 0), texts, *known).tolist() == [1, 1, 0]


def test_detectors_say_what_they_can_find(tmp_path: Path) -> None:
    from tiny_rewards import save_detr, save_owlvit

    fixed = TransformersDetector(str(save_detr(tmp_path / "fixed")))
    assert fixed.classes == {"N/A", "cup", "computer mouse", "dog"}  # by GenEval's names
    assert TransformersDetector(str(save_owlvit(tmp_path / "any"))).classes is None
    reward: Any = make_reward("geneval", {"detector": str(tmp_path / "fixed")})
    good = {"tag": "single_object", "include": [{"class": "computer mouse", "count": 1}]}
    reward.check_prompts(["a mouse"], [good])
    with pytest.raises(ValueError, match="prompts ask for 'mouse', which the detector cannot"):
        reward.check_prompts(["a"], [{**good, "include": [{"class": "mouse", "count": 1}]}])


def test_the_color_model_is_loaded_with_the_first_color(tmp_path: Path) -> None:
    from tiny_rewards import save_clip

    options = {"detector": scene_reader([Scene()]), "color_model": str(save_clip(tmp_path))}
    reward: Any = make_reward("geneval", options)
    reward.check_prompts(["a bowl"], LINES[:1])
    assert reward.colors is None
    reward.check_prompts(["a purple cup"], LINES[3:4])
    assert isinstance(reward.colors, ClipColorNamer)
    missing: Any = make_reward("geneval", {**options, "color_model": str(tmp_path / "none")})
    with pytest.raises(FileNotFoundError, match="none"):
        missing.check_prompts(["a purple cup"], LINES[3:4])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tag": "shape"}, "unknown tag 'shape'"),
        ({"include": [{"class": "cup"}]}, "count"),
        ({"include": [{"class": "cup", "count": 1, "color": "teal"}]}, "unknown color 'teal'"),
        ({"include": [{"class": "cup", "count": 1, "position": ["left of", 0]}]}, "earlier entry"),
    ],
)
def test_wrong_metadata_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {**LINES[0], "prompt": "a bowl"}
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "prompt": "x", **change}))
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        read_metadata(path)


def test_contradictions_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    both = [{**LINES[0], "prompt": "a bowl"}, {**LINES[3], "prompt": "a bowl"}]
    path.write_text("\n".join(json.dumps(line) for line in both))
    with pytest.raises(ValueError, match="one prompt can have one meaning only"):
        read_metadata(path)
    with pytest.raises(FileNotFoundError, match="there is no file at"):
        make_reward("geneval", {"metadata": str(tmp_path / "none.jsonl")})
    path.write_text(json.dumps(both[0]))
    with pytest.raises(FileNotFoundError, match="nothing at"):
        make_reward("geneval", {"metadata": path, "detector": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="confidence is 2"):
        Rules(confidence=2)


def test_detector_of_fixed_classes(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    from tiny_rewards import pil_images, random_images, save_detr

    folder = save_detr(tmp_path)
    images = random_images(3, 40, 48)
    found = TransformersDetector(str(folder), floor=0.2, batch_size=2)(images, [["cup"]] * 3)
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    number = 0
    for image, ours in zip(pil_images(images), found):
        with torch.no_grad():
            output = model(**processor(images=image, return_tensors="pt"))
        # By hand: the surest class but the last, which is "nothing"; boxes from centre and size.
        scores, labels = output.logits[0].softmax(-1)[:, :-1].max(-1)
        x, y, w, h = output.pred_boxes[0].unbind(-1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        boxes = boxes * torch.tensor([48, 40, 48, 40])
        keep = scores > 0.2
        names = ["N/A", "cup", "computer mouse", "dog"]
        assert [d.label for d in ours] == [names[i] for i in labels[keep]]
        assert [d.score for d in ours] == pytest.approx(scores[keep].tolist(), abs=1e-4)
        torch.testing.assert_close(
            torch.tensor([d.box for d in ours]), boxes[keep], rtol=1e-3, atol=1e-2
        )
        number += len(ours)
    assert number > 3


def test_zero_shot_detector(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, OwlViTForObjectDetection

    from tiny_rewards import pil_images, random_images, save_owlvit

    folder = save_owlvit(tmp_path)
    images = random_images(2, 32, 32)
    labels = [["cup", "dog"], ["cow"]]
    found = TransformersDetector(str(folder), floor=0.0)(images, labels)
    model = OwlViTForObjectDetection.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(
        images=pil_images(images), return_tensors="pt"
    )["pixel_values"]
    for i, ours in enumerate(found):
        tokens = AutoTokenizer.from_pretrained(folder)(
            [f"a photo of a {label}" for label in labels[i]],
            padding="max_length",
            truncation=True,
            max_length=24,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=pixels[i : i + 1],
            )
        best = output.logits[0].max(-1)
        assert [d.score for d in ours] == pytest.approx(best.values.sigmoid().tolist(), abs=1e-4)
        assert [d.label for d in ours] == [labels[i][j] for j in best.indices]


@pytest.mark.parametrize("zero_shot", [False, True])
def test_the_process_wide_choice_of_kernels_moves_no_box(zero_shot: bool, tmp_path: Path) -> None:
    from chunkgrpo.runtime.attention import plain_attention
    from tiny_rewards import random_images, save_detr, save_owlvit

    folder = (save_owlvit if zero_shot else save_detr)(tmp_path)
    detector = TransformersDetector(str(folder), floor=0.0)
    images, labels = random_images(2, 32, 32), [["cup", "dog"]] * 2
    alone = detector(images, labels)
    with plain_attention():  # as a policy that samples in another thread
        beside = detector(images, labels)
    seen = [[[(d.label, d.score, d.box) for d in each] for each in run] for run in (alone, beside)]
    assert seen[0] == seen[1] and len(seen[0][0]) > 3
    assert detector.model.config._attn_implementation == "eager"


def test_colors_are_named_by_clip(tmp_path: Path) -> None:
    """The crop goes to CLIP; the nearest mean of three texts wins."""
    from tiny_rewards import random_images, save_clip

    namer = ClipColorNamer(str(save_clip(tmp_path)))
    image = random_images(1, 64, 64)[0]
    box = (3.4, 10.6, 35.2, 42.9)  # rounds to 3:35, 11:43
    thing = Detection("cup", 0.9, box)
    crop = namer.crop(image, thing)
    torch.testing.assert_close(crop, image[:, 11:43, 3:35])
    seen = namer.encoder.embed_images(crop[None])[0]
    scores = []
    for color in COLORS:
        texts = [
            f"a photo of a {color} cup", f"a photo of a {color}-colored cup",
            f"a photo of a {color} object",
        ]  # fmt: skip
        mean = namer.encoder.embed_texts(texts, seen.device).mean(0)
        scores.append(float(seen @ (mean / mean.norm())))
    assert namer(image, [thing, thing]) == [COLORS[scores.index(max(scores))]] * 2

    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[11:20] = True
    painted = namer.crop(image, replace(thing, mask=mask))
    torch.testing.assert_close(painted[:, :9], image[:, 11:20, 3:35])
    assert (painted[:, 9:] == 0x99 / 255).all()
    assert namer.crop(image, replace(thing, box=(-9.0, -9.0, -5.0, -5.0))).shape == (3, 1, 1)
