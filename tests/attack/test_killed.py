# SPDX-License-Identifier: Apache-2.0
"""The command line killed, told to stop, run twice, and on disks that fail: nothing is lost.

Each attack is followed by ``--resume``, and the run must end bit for bit as one in one piece.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from chunkgrpo.report.metrics import read_metrics
from chunkgrpo.runtime.checkpoints import list_checkpoints, load_checkpoint, verify_checkpoint
from forked_runs import Forks

PART = "state on disk"
TIMES = ("seconds", "phase_seconds", "images_per_second", "train_minutes", "total_minutes")
SETTINGS = (
    "iterations=2", "sampling.prompts=2", "sampling.group_size=3", "sampling.steps=4",
    "sampling.tail=euler", "sampling.batch_size=8", "objective.window=all",
    "objective.plan.sizes=[1,2]", "objective.selection.kind=uniform", "evaluation.every=1",
    "evaluation.prompts=4", "evaluation.final_prompts=8", "evaluation.final_seeds=2",
    "evaluation.reward={name: brightness}", "rewards=[{name: brightness}]", "checkpoints.every=1",
    "model.adaptation=lora", "model.max_sequence_length=4", "model.precision=fp32",
    "optimizer.learning_rate=1e-2", "threads=1",
    "doctor.skip=[resources]",  # a disk that fills up is one of the attacks here
)  # fmt: skip


@pytest.fixture(scope="module")
def forks(tmp_path_factory, tiny_pipeline_path):
    server = Forks(tmp_path_factory.mktemp("logs"), tiny_pipeline_path)
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(tiny_pipeline_path, place):
    (place / "prompts.txt").write_text("".join(f"a picture of {n} stars\n" for n in range(20)))
    given = [*SETTINGS, f"model.path={tiny_pipeline_path}", f"model.embedding_cache={place}/cache"]
    given += [f"prompts.{each}={place}/prompts.txt" for each in ("train", "held_out")]
    return [part for each in given for part in ("--set", each)]


@pytest.fixture(scope="module")
def whole(forks, settings, place):
    """What a run in one piece ends with, and the moments that it comes to."""
    ended = forks.run("train", "demo", *settings, "--out", place / "whole")
    assert ended.code == 0, ended.output
    result = outcome(place / "whole")
    moved = [v for k, v in result["checkpoint"][0].items() if "parameter" in k and "lora_B" in k]
    assert any(value.abs().max() > 0 for value in moved)
    return result, ended.moments


def without_times(record):
    return {key: value for key, value in record.items() if key not in TIMES}


def outcome(folder):
    """All that a run leaves: model, newest checkpoint, records, scores."""
    tensors, info = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    del info["settings"]["model"]["embedding_cache"]  # the one setting that tests here vary
    scores = {}
    for name in ("base", "tuned"):
        with np.load(folder / "evaluation" / f"{name}.npz") as file:
            scores |= {f"{name} {key}": file[key].tobytes() for key in file.files}
    return {
        "model": tuned_model(folder / "model"),
        "checkpoint": (tensors, without_times(info)),
        "names": [p.name for p in list_checkpoints(folder / "checkpoints")],
        "metrics": [without_times(r) for r in read_metrics(folder / "metrics.jsonl")],
        "scores": scores,
        "summary": without_times(json.loads((folder / "summary.json").read_text())),
    }


def tuned_model(folder):
    (path,) = folder.iterdir()
    with safe_open(path, "pt") as file:  # the order of its header is not fixed
        weights = {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}
        return path.name, dict(file.metadata()), weights


def same(found, expected):
    """Assert that two outcomes are bit for bit the same."""
    (tensors, info), (others, other_info) = found["checkpoint"], expected["checkpoint"]
    assert tensors.keys() == others.keys() and info == other_info
    assert [k for k in tensors if not torch.equal(tensors[k], others[k])] == []
    for key in expected.keys() - {"checkpoint"}:
        assert found[key] == expected[key], key


def all_sound(folder):
    for path in list_checkpoints(folder / "checkpoints"):
        verify_checkpoint(path)


def goes_on(forks, settings, folder, whole):
    """Go on with a run, or begin it where nothing was written; it ends as one in one piece."""
    if (folder / "config.yaml").exists():
        ended = forks.run("train", "--resume", folder)
    else:
        ended = forks.run("train", "demo", *settings, "--out", folder)
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    same(outcome(folder), whole)
    left = {path.name for path in folder.rglob(".*")}
    assert left == set(), "partial files are cleaned, the lock is released"


# --- SIGKILL ------------------------------------------------------------------------------------

KILLS = {"checkpoint": (1, 24), "model": (1, 5), "evaluation": (1, 4), "training": (0, 6)}
KILLS |= {"base evaluation": (0, 3), "final evaluation": (1, 3), "other file": (0, 9)}
KILLS |= {"metrics": (0, 2), "loading": (0, 1)}
"""How many kills at moments of each name: in the plain suite, and in all."""


def test_kills_change_nothing(forks, settings, place, whole, attempt, full):
    expected, moments = whole
    draw = random.Random(15)
    tried = 0
    for name, numbers in KILLS.items():
        # The whole run also wrote encoded prompts, before its first evaluation.
        later = moments[moments.index("base evaluation") :] if name == "other file" else moments
        here = range(1, later.count(name) + 1)
        for at in draw.sample(here, min(numbers[full], len(here))):
            folder = place / f"killed-{name.replace(' ', '-')}-{at}"
            with attempt(PART, f"SIGKILL, in: {name}"):
                ended = forks.run(
                    "train", "demo", *settings, "--out", folder, at=(name, at),
                    signals=[signal.SIGKILL],
                )  # fmt: skip
                assert ended.code == -signal.SIGKILL and ended.moments[-1] == name
                all_sound(folder)
                goes_on(forks, settings, folder, expected)
            tried += 1
            shutil.rmtree(folder)
    assert tried >= (50 if full else 4)


def test_kills_at_any_time_and_again_and_again(forks, settings, place, whole, attempt, full):
    if not full:
        pytest.skip("the long version of the kills above")
    draw = random.Random(16)
    for number in range(8):
        folder = place / f"killed-{number}"
        with attempt(PART, "SIGKILL at any time, three times"):
            for _ in range(3):
                known = (folder / "config.yaml").exists()
                begin = ["--resume", folder] if known else ["demo", *settings, "--out", folder]
                started = forks.start("train", *begin)
                time.sleep(draw.uniform(0.3, 3.0))
                os.kill(started[0], signal.SIGKILL)
                assert forks.wait(started).code in (-signal.SIGKILL, 0)
                all_sound(folder)
            goes_on(forks, settings, folder, whole[0])
        shutil.rmtree(folder)


# --- signals ------------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MOMENTS = (
    "loading", "encoding", "base evaluation", "training", "evaluation", "checkpoint",
    "final evaluation", "model",
)  # fmt: skip
PLAIN = {("encoding", signal.SIGUSR1), ("evaluation", signal.SIGTERM)}
PLAIN |= {("loading", signal.SIGTERM), ("final evaluation", signal.SIGINT)}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("each", SIGNALS)
def test_a_signal_ends_a_run_with_all_saved(
    forks, settings, place, whole, attempt, full, tmp_path, moment, each
):
    if not full and (moment, each) not in PLAIN:
        pytest.skip("the plain suite tries some pairs of signal and moment")
    folder = place / f"signal-{moment.replace(' ', '-')}-{each}"
    own = [*settings, "--set", f"model.embedding_cache={tmp_path}"] if moment == "encoding" else []
    with attempt(PART, f"{each.name}, in: {moment}"):
        ended = forks.run(
            "train", "demo", *(own or settings), "--out", folder, at=moment, signals=[each]
        )
        assert ended.code == 75 and "Traceback" not in ended.output, ended.output
        rest = ended.moments[ended.moments.index(moment) + 1 :]
        if moment == "loading":
            assert ended.lines == ["Stopped at once, before anything was begun."]
            assert not folder.exists()
        else:
            assert ended.lines[-1].endswith(f"Go on with: chunkgrpo train --resume {folder}")
        if moment in ("training", "evaluation", "checkpoint"):
            # The iteration is finished, its evaluation is not, and everything is saved.
            assert "training" not in rest[3:] and "checkpoint" in rest
            assert list_checkpoints(folder / "checkpoints")[-1].name == "000001"
            assert rest.count("evaluation") == (moment == "evaluation")  # the end of its batch
        else:
            assert not {"training", "evaluation", "base evaluation", moment} & set(rest) - {"model"}
        goes_on(forks, settings, folder, whole[0])
    shutil.rmtree(folder)


def test_a_second_signal_ends_a_run_at_once(forks, settings, place, whole, attempt, full):
    folder = place / "twice"
    second = 1 + whole[1].count("training") // 2 + 1  # an update of the second iteration
    with attempt(PART, "a second signal, in: training"):
        ended = forks.run(
            "train", "demo", *settings, "--out", folder, at=("training", second),
            signals=[signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM],
        )  # fmt: skip
        assert ended.code == 75 and "Traceback" not in ended.output, ended.output
        assert "Stopped at once. Go on with: chunkgrpo train --resume" in ended.lines[-1]
        assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["000001"]
        goes_on(forks, settings, folder, whole[0])


def test_a_reward_that_hangs_in_a_thread_does_not_keep_the_run(forks, settings, place, attempt):
    """After the second signal nothing waits for it, and a third is not needed."""
    folder = place / "hangs"
    hang = (
        "import os, signal, threading, time\n"
        "def hang(self, images, prompts):\n"
        "    def twice():\n"
        "        for _ in range(2):\n"
        "            time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    threading.Thread(target=twice, daemon=True).start()\n"
        "    time.sleep(600)\n"
        "from chunkgrpo.train import loop\n"
        "inner = loop.Trainer.train_once\n"
        "def train_once(self):\n"
        "    type(self.scorer.everything[0]).__call__ = hang\n"
        "    return inner(self)\n"
        "loop.Trainer.train_once = train_once\n"
    )
    with attempt(PART, "two signals while a reward hangs"):
        begun = time.monotonic()
        ended = forks.run(
            "train", "demo", *settings, "--async-rewards", "--out", folder, before=hang
        )
        assert ended.code == 75 and "Stopped at once" in ended.lines[-1], ended.output
        assert time.monotonic() - begun < 60


# --- one owner ----------------------------------------------------------------------------------


def test_a_run_has_one_owner(forks, settings, place, whole, attempt):
    folder = place / "owned"
    running = forks.start(
        "train", "demo", *settings, "--out", folder, at="training", signals=[signal.SIGSTOP]
    )
    try:
        wait_until_stopped(running[0])
        for attack, begin in (
            ("--resume of a run that is going on", ["--resume", folder]),
            ("a run into the folder of another", ["demo", *settings, "--out", folder]),
        ):
            with attempt(PART, attack):
                begun = time.monotonic()
                second = forks.run("train", *begin)
                assert second.code == 2 and len(second.lines) == 1, second.output
                if "--resume" in begin:
                    assert f"is in use by process {running[0]} on " in second.output
                    assert "last sign of life" in second.output
                assert "loading" not in second.moments and time.monotonic() - begun < 30
    finally:
        os.kill(running[0], signal.SIGCONT)
    assert forks.wait(running).code == 0
    same(outcome(folder), whole[0])


def wait_until_stopped(pid):
    deadline = time.monotonic() + 120
    while True:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        if state == "T":
            return
        assert state != "Z" and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_is_still_loading_owns_its_folder(forks, settings, place, attempt):
    folder = place / "loading"
    running = forks.start(
        "train", "demo", *settings, "--out", folder, at="loading", signals=[signal.SIGSTOP]
    )
    with attempt(PART, "a run into the folder of one that is still loading"):
        wait_until_stopped(running[0])
        second = forks.run("train", "demo", *settings, "--out", folder)
        assert second.code == 2 and len(second.lines) == 1
        assert f"is in use by process {running[0]} on " in second.output
        assert "loading" not in second.moments
        os.kill(running[0], signal.SIGTERM)
        os.kill(running[0], signal.SIGCONT)
        assert forks.wait(running).code == 75 and not folder.exists()


def test_two_runs_that_begin_at_once_get_two_folders(forks, settings, tmp_path, attempt):
    with attempt(PART, "two runs of one name at once"):
        both = [
            forks.start(
                "train", "demo", *settings, "--set", "name=twin", at="base evaluation",
                signals=[signal.SIGTERM], before=f"import os; os.chdir({str(tmp_path)!r})",
            )
            for _ in range(2)
        ]  # fmt: skip
        assert [forks.wait(each).code for each in both] == [75, 75]
        folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
        assert folders == ["twin", "twin-2"]
        assert all((tmp_path / "runs" / name / "config.yaml").exists() for name in folders)


# --- disks that fail ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may mount no disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def refused_in_one_line(ended, *words):
    """The last line says what went wrong; before it there is what a run says of its progress."""
    assert ended.code == 2 and "Traceback" not in ended.output, ended.output
    problems = [line for line in ended.lines if line.startswith("chunkgrpo:")]
    assert problems == ended.lines[-1:], ended.output
    for word in words:
        assert word in problems[0], problems[0]


def test_a_full_disk_loses_nothing(forks, settings, whole, attempt, full, small_disk):
    draw = random.Random(17)
    room = [200_000] + [draw.randrange(1_000, 900_000) for _ in range(15 if full else 0)]
    failed = 0
    for number, left in enumerate(room):
        folder, filler = small_disk / f"run-{number}", small_disk / "filler"
        with attempt(PART, "full disk, then space is made"):
            state = os.statvfs(small_disk)
            filler.write_bytes(bytes(state.f_bavail * state.f_frsize - left))
            ended = forks.run("train", "demo", *settings, "--out", folder)
            if ended.code:  # with the most room the run fits
                refused_in_one_line(ended, "No space left on device", "make space there")
                failed += 1
            if folder.exists():
                all_sound(folder)
            filler.unlink()
            goes_on(forks, settings, folder, whole[0])
        shutil.rmtree(folder)
    assert failed >= len(room) // 2 + 1


def test_a_limit_on_files_loses_nothing(forks, settings, place, whole, attempt):
    folder = place / "limited"
    largest = max(p.stat().st_size for p in (place / "whole" / "checkpoints").rglob("*.safe*"))
    with attempt(PART, "limit on the size of files"):
        ended = forks.run("train", "demo", *settings, "--out", folder, limit=largest // 2)
        refused_in_one_line(ended, "File too large", "ulimit -f", "there is none before it")
        assert list_checkpoints(folder / "checkpoints") == []
        goes_on(forks, settings, folder, whole[0])


def test_a_read_only_folder_is_refused(forks, settings, place, whole, attempt, small_disk):
    folder = small_disk / "run"
    shutil.copytree(place / "whole", folder)
    with attempt(PART, "read-only folder"):
        again = ["mount", "-o", "remount,ro", str(small_disk)]
        subprocess.run(again, check=True, capture_output=True)
        before = sorted(folder.rglob("*"))
        ended = forks.run("train", "--resume", folder)
        assert len(ended.lines) == 1 and "loading" not in ended.moments
        refused_in_one_line(ended, str(folder), "Read-only file system", "make it writable")
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_folder_that_disappears_is_noticed(forks, settings, place, whole, attempt, how):
    folder, moved = place / how, place / "elsewhere"
    act = (
        "shutil.rmtree(self.folder)" if how == "deleted" else f"self.folder.rename({str(moved)!r})"
    )
    before = (
        "import shutil\nfrom chunkgrpo.train import loop\ninner = loop.Trainer.train_once\n"
        "def train_once(self):\n"
        f"    if self.iteration == 1: {act}\n"
        "    return inner(self)\n"
        "loop.Trainer.train_once = train_once\n"
    )
    with attempt(PART, f"folder {how} while its run goes on"):
        ended = forks.run("train", "demo", *settings, "--out", folder, before=before)
        refused_in_one_line(ended, str(folder), "was deleted or moved while its run was going on")
        assert not folder.exists(), "nothing is made anew"
        if how == "moved":
            all_sound(moved)
            goes_on(forks, settings, moved, whole[0])


def test_with_all_checkpoints_damaged_nothing_is_loaded(forks, place, whole, tmp_path, attempt):
    folder = shutil.copytree(place / "whole", tmp_path / "run")
    for path in list_checkpoints(folder / "checkpoints"):
        (path / "state.json").write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with attempt(PART, "every checkpoint damaged"):
        ended = forks.run("train", "--resume", folder)
        refused_in_one_line(ended, "can be used: ", "000002/state.json is damaged", "--out")
        assert len(ended.lines) == 1 and "loading" not in ended.moments
        assert {path: path.read_bytes() for path in before} == before
