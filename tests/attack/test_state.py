# SPDX-License-Identifier: Apache-2.0
"""State on disk under attack: damaged, swapped and edited checkpoints."""

import json
import random
import shutil

import pytest
import torch

import compose
from chunkgrpo.core import ChunkPlan, FlowDiffusion, Transition, make_sigmas
from chunkgrpo.core.finite import NonFiniteError
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.rewards import FunctionReward
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.checkpoints import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)
from chunkgrpo.types import as_prompts

PART = "state on disk"
FLOW = Transition(FlowDiffusion(0.7))
PROMPTS = PromptSet(as_prompts(("a star", "two circles", "a red cross")))
BRIGHTNESS = FunctionReward("brightness", lambda images, prompts: images.mean((1, 2, 3)))
TIMES = ("seconds", "phase_seconds", "images_per_second")
FILES = ("state.safetensors", "state.json", "manifest.json", "model/mean.pt")


def trainer(folder, **changes):
    settings = {
        "iterations": 6, "num_prompts": 2, "group_size": 3, "learning_rate": 1e-2,
        "evaluate_every": 3, "checkpoint_every": 2,
    } | changes  # fmt: skip
    made = compose.trainer(
        GaussianPolicy(torch.zeros(4)),
        compose.chunk_grpo(ChunkPlan((1, 2)), FLOW),
        Sampler(FLOW, make_sigmas(4), same_noise=True, batch_size=96),
        PROMPTS, [(BRIGHTNESS, 1.0)], PROMPTS, BRIGHTNESS, folder, **settings,
    )  # fmt: skip
    made.with_model = True

    def look():  # the toy has no images to look at
        score = float(made.ema.values[0].sum())
        return {"accuracy": score} if made.iteration % 3 == 0 else {}

    made.evaluate_if_due = look
    return made


def outcome(made):
    """What a run ends with: weights, average, and records without times."""
    records = read_metrics(made.folder / "metrics.jsonl")
    kept = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    tensors = [*made.parameters, *made.ema.values]
    return [t.detach().tolist() for t in tensors], kept, made.num_updates


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("whole"))
    assert made.run()
    return outcome(made)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was stopped after its fourth iteration: it has checkpoints 2, 3 (best) and 4."""
    made = trainer(tmp_path_factory.mktemp("begun"))
    made.on_iteration = lambda record: made.stop() if record["iteration"] == 4 else None
    assert not made.run()
    assert [p.name for p in list_checkpoints(made.folder / "checkpoints")] == [
        "000003", "000004",
    ]  # fmt: skip
    return made.folder


def goes_on_from_the_one_before(folder, whole, named):
    """Resume: the damaged newest checkpoint is named, and the result is that of a whole run."""
    said = []
    made = trainer(folder)
    made.say = said.append
    assert made.run()
    assert len(said) == 1 and named in said[0] and "\n" not in said[0]
    assert "going on from the checkpoint before it, 000003" in said[0]
    assert outcome(made) == whole
    for path in list_checkpoints(folder / "checkpoints"):
        verify_checkpoint(path)


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1))


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


DAMAGES = {
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "with one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path: path.unlink(),
    "of the other checkpoint": lambda path: shutil.copy(other(path), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def other(path):
    """The same file of the checkpoint before."""
    parts = ["000003" if part == "000004" else part for part in path.parts]
    return type(path)(*parts)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    begun, whole, tmp_path, attempt, damage, name
):
    folder = shutil.copytree(begun, tmp_path / "run")
    target = folder / "checkpoints" / "000004" / name
    with attempt(PART, f"file of a checkpoint {damage}"):
        DAMAGES[damage](target)
        # A manifest of the other checkpoint is sound in itself: its files are not these.
        swapped_manifest = damage.startswith("of the other") and name == "manifest.json"
        named = "000004/" if swapped_manifest else f"000004/{name}"
        goes_on_from_the_one_before(folder, whole, named)


def test_no_flipped_bit_is_taken(begun, whole, tmp_path, attempt, full):
    draw = random.Random(15)
    for number in range(200 if full else 8):
        name = FILES[number % len(FILES)]
        folder = shutil.copytree(begun, tmp_path / str(number))
        with attempt(PART, "flipped bit in a checkpoint"):
            flip(folder / "checkpoints" / "000004" / name, draw.randrange(10**6), draw.randrange(8))
            goes_on_from_the_one_before(folder, whole, f"000004/{name}")
        shutil.rmtree(folder)


EDITS = {
    ("state.json", "iteration"): lambda state: state.update(iteration=5),
    ("state.json", "number of updates"): lambda state: state.update(num_updates=99),
    ("state.json", "average"): lambda state: state.update(ema_updates=0),
    ("state.json", "nothing but spaces"): lambda state: state.update(),
    ("manifest.json", "iteration"): lambda manifest: manifest.update(iteration=5),
    ("manifest.json", "score"): lambda manifest: manifest.update(score=1.0),
    ("manifest.json", "a sum"): lambda manifest: manifest["files"]["state.json"].update(
        sha256="0" * 64
    ),
    ("manifest.json", "a file less"): lambda manifest: manifest["files"].pop("model/mean.pt"),
    ("manifest.json", "its own sum"): lambda manifest: manifest.update(sha256="0" * 64),
    ("manifest.json", "no sums"): lambda manifest: manifest.clear(),
}  # fmt: skip


@pytest.mark.parametrize(("name", "what"), EDITS)
def test_an_edited_file_is_named(begun, whole, tmp_path, attempt, name, what):
    folder = shutil.copytree(begun, tmp_path / "run")
    target = folder / "checkpoints" / "000004" / name
    with attempt(PART, "edited JSON of a checkpoint"):
        if what == "nothing but spaces":
            target.write_text(target.read_text() + " ")
        else:
            edited(target, EDITS[name, what])
        goes_on_from_the_one_before(folder, whole, f"000004/{name}")


def test_a_checkpoint_under_another_number_is_refused(begun, whole, tmp_path, attempt):
    with attempt(PART, "two checkpoints swapped"):
        folder = shutil.copytree(begun, tmp_path / "swapped")
        a, b, c = (folder / "checkpoints" / name for name in ("000003", "000004", "x"))
        a.rename(c), b.rename(a), c.rename(b)
        before = sorted(folder.rglob("*"))
        with pytest.raises(CheckpointError, match=r"no checkpoint .* can be used: .*000004 holds"):
            trainer(folder).run()
        assert sorted(folder.rglob("*")) == before
    with attempt(PART, "checkpoint under another number"):
        folder = shutil.copytree(begun, tmp_path / "renamed")
        held = folder / "checkpoints"
        shutil.copytree(held / "000003", held / "000005")
        shutil.rmtree(held / "000004")
        goes_on_from_the_one_before(folder, whole, "000005 holds iteration 3, not 5")


@pytest.mark.parametrize("name", ["extra.json", "model/other.safetensors", ".hidden"])
def test_a_file_too_many_is_named(begun, whole, tmp_path, attempt, name):
    folder = shutil.copytree(begun, tmp_path / "run")
    with attempt(PART, "unknown file in a checkpoint"):
        (folder / "checkpoints" / "000004" / name).write_text("x")
        goes_on_from_the_one_before(folder, whole, f"000004/{name}")


def test_an_empty_checkpoint_is_named(begun, whole, tmp_path, attempt):
    folder = shutil.copytree(begun, tmp_path / "run")
    with attempt(PART, "empty folder in place of a checkpoint"):
        shutil.rmtree(folder / "checkpoints" / "000004")
        (folder / "checkpoints" / "000004").mkdir()
        goes_on_from_the_one_before(folder, whole, "000004/manifest.json is missing")


def test_with_all_damaged_nothing_begins_and_nothing_is_touched(begun, tmp_path, attempt):
    folder = shutil.copytree(begun, tmp_path / "run")
    for path in list_checkpoints(folder / "checkpoints"):
        flip(path / "state.safetensors", 200)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    made = trainer(folder)
    with attempt(PART, "every checkpoint damaged"):
        with pytest.raises(CheckpointError) as caught:
            made.run()
        message = str(caught.value)
        assert "no checkpoint in" in message and "000004/state.safetensors is damaged" in message
        assert "start a new run with another --out" in message and "\n" not in message
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert made.iteration == 0


@pytest.mark.parametrize("content", ["", "{", '{"iteration": 4, "score": 9}', None])
def test_the_best_is_told_by_the_checkpoints_themselves(begun, whole, tmp_path, attempt, content):
    """``best.json`` is for people: an edited one decides nothing, and is written anew."""
    folder = shutil.copytree(begun, tmp_path / "run")
    note = folder / "checkpoints" / "best.json"
    original = note.read_text()
    with attempt(PART, "best.json torn, edited or deleted"):
        note.unlink() if content is None else note.write_text(content)
        assert find_checkpoint(folder / "checkpoints", "best").name == "000003"
        made = trainer(folder)
        assert made.run() and outcome(made) == whole
        best = max((3, 6), key=lambda number: whole[1][number - 1]["accuracy"])
        assert json.loads(note.read_text())["iteration"] == best
        assert json.loads(original)["iteration"] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_reach_no_checkpoint(begun, tmp_path, attempt, value):
    folder = shutil.copytree(begun, tmp_path / "run")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    made = trainer(folder)
    made.resume()
    with attempt(PART, "NaN or infinite weights to be saved"):
        with torch.no_grad():
            made.parameters[0][1] = value
        made.iteration = 5
        with pytest.raises(NonFiniteError, match=r"parameter\.mean is not finite"):
            made.save()
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
