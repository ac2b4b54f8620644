# SPDX-License-Identifier: Apache-2.0
"""Every file of a run's folder damaged in every way: the right result, or one line."""

import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from chunkgrpo.report.metrics import MetricsWriter, read_metrics
from small_runs import call, metrics, results, settings_of, stopped, trained

PART = "resume"
FILES = (
    "config.yaml", "history.jsonl", "metrics.jsonl", "evaluation/base.npz", "evaluation/base.json",
    "checkpoints/000003/state.safetensors", "checkpoints/000003/state.json",
    "checkpoints/000003/manifest.json", "checkpoints/000003/model/pytorch_lora_weights.safetensors",
    "checkpoints/best.json",
)  # fmt: skip
DAMAGES = ("missing", "empty", "cut", "flipped bit", "garbage", "other types", "deep", "folder")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def expected(tiny_pipeline_path, place):
    """A run in one piece."""
    given = settings_of(tiny_pipeline_path, place)
    trained("demo", *given, "--out", place / "whole")
    return results(place / "whole"), metrics(place / "whole")


@pytest.fixture(scope="module")
def cut_short(tiny_pipeline_path, place, expected):
    """The same run, stopped in its third iteration."""
    stopped(3, "demo", *settings_of(tiny_pipeline_path, place), "--out", place / "stopped")
    return place / "stopped"


def line_of(record):
    """A record as a run writes it."""
    with tempfile.TemporaryDirectory() as folder:
        with MetricsWriter(Path(folder) / "metrics.jsonl") as writer:
            writer.write(record)
        return (Path(folder) / "metrics.jsonl").read_text()


@pytest.fixture
def run(cut_short, tmp_path):
    return Path(shutil.copytree(cut_short, tmp_path / "run"))


def damage(path, how, draw):
    """Damage a file; return whether anything has changed."""
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "flipped bit":
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": whole[: len(whole) // 2],
                "garbage": b'{"\xff\x00": ]\n\n' * 5,
                "other types": b'[null, true, 1e999, "x"]\n{"iteration": "two", "of": 1}\n',
                "deep": b"[" * 50_000 + b"\n",
            }[how]
        )


def results_are_absent(folder):
    """Nothing was trained."""
    return not (folder / "summary.json").exists()


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ends_well(folder, expected, before, *options):
    """Go on; either one line and nothing lost, or the result of a run in one piece."""
    code, output = call("train", "--resume", folder, *options)
    assert "Traceback" not in output
    if code:
        assert code == 2, output
        last = output.strip().splitlines()[-1]
        assert last.startswith("chunkgrpo: ") and len(last) < 1500
        after = snapshot(folder)
        for path, content in before.items():
            aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
            assert after.get(path, after.get(aside)) == content, f"{path} was changed: {output}"
        return output
    outcome, records = expected
    changed = "-> " in output
    if not changed:
        assert results(folder) == outcome
        found = metrics(folder)
        if found != records:
            kept = [r for r in records if r in found]
            assert kept == found and "are missing" in output, output
    return output


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file(run, expected, attempt, full, file, how) -> None:
    number = FILES.index(file) * len(DAMAGES) + DAMAGES.index(how)
    if not full and number % 7:
        pytest.skip("the plain suite tries some")
    draw = random.Random(number)
    with attempt(PART, f"{file.replace('000003', 'N')}: {how}"):
        damage(run / file, how, draw)
        before = snapshot(run)
        output = ends_well(run, expected, before)
        if file.startswith("checkpoints/0"):
            assert "checkpoint before it, 000002" in output
            assert "1 record of iterations after 2, which are done again" in output
            (lost,) = read_metrics(run / "metrics.lost.jsonl")
            assert lost["iteration"] == 3
        if file == "evaluation/base.npz" and how not in ("missing", "folder"):
            assert "the base is evaluated again" in output
        if how == "folder" and file.count("/") < 2:
            assert "is a folder, not a file" in output or file == "config.yaml"
            assert results_are_absent(run)


def test_flipped_bits_in_settings(run, expected, attempt, full) -> None:
    """A bit of config.yaml is another text, another value, or another key: never silence."""
    path = run / "config.yaml"
    whole = path.read_bytes()
    draw = random.Random(3)
    for _ in range(40 if full else 4):
        with attempt(PART, "config.yaml: flipped bit, before loading"):
            damage(path, "flipped bit", draw)
            content = path.read_bytes()
            code, output = call("train", "--resume", run, "--set", "iterations=1")
            assert code == 2 and len(output.splitlines()) == 1, output
            assert path.read_bytes() == content
            path.write_bytes(whole)


# --- checkpoints that are gone --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "empty", "a file", "all damaged", "a partial one"])
def test_gone_checkpoints_never_mean_starting_over(run, expected, attempt, how) -> None:
    with attempt(PART, f"checkpoints/: {how}"):
        folder = run / "checkpoints"
        if how == "all damaged":
            for path in folder.glob("0*/state.safetensors"):
                path.write_bytes(b"")
        else:
            shutil.rmtree(folder)
        if how == "a file":
            folder.write_text("")
        elif how in ("empty", "a partial one"):
            folder.mkdir()
        if how == "a partial one":
            (folder / ".000003.partial").mkdir()
        before = snapshot(run)
        code, output = call("train", "--resume", run)
        assert code == 2 and len(output.splitlines()) == 1, output
        assert str(folder) in output
        assert snapshot(run) == before


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    run, expected, attempt, tiny_pipeline_path, place
) -> None:
    """Its history, its metrics and its folder say that there never was one."""
    for finished in (0, 1):
        with attempt(PART, f"killed after {finished} iterations, before the first checkpoint"):
            again = Path(shutil.copytree(run, run.parent / f"again-{finished}"))
            shutil.rmtree(again / "checkpoints")
            history = (again / "history.jsonl").read_text().splitlines(keepends=True)
            (again / "history.jsonl").write_text(history[0])
            lines = (again / "metrics.jsonl").read_text().splitlines(keepends=True)
            (again / "metrics.jsonl").write_text("".join(lines[:finished]))
            output = ends_well(again, expected, snapshot(again))
            assert ("begins again at iteration 1" in output) == bool(finished)
            lost = read_metrics(again / "metrics.lost.jsonl")
            assert [r["iteration"] for r in lost] == [1] * finished
            assert metrics(again) == expected[1]


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        ("a torn last line", "last line was incomplete"),
        ("a line deleted", "iterations 2 are missing"),
        ("a line twice", "iterations 2 stand there more than once"),
        ("lines of later iterations", "2 records of iterations after 3"),
        ("another order", "not in order"),
        ("a line edited", "metrics.jsonl:2: "),
        ("an iteration edited", "metrics.jsonl:2: iteration is -2"),
        ("a value edited", "metrics.jsonl:2: reward_mean is 'much'"),
        ("a number edited", "metrics.jsonl:2: the line is not as it was written"),
        ("an infinity", "metrics.jsonl:2: "),
    ],
)
def test_metrics_that_are_not_what_was_written(run, expected, attempt, full, attack, says) -> None:
    if not full and attack in ("a line twice", "another order"):
        pytest.skip("as a line deleted")
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    second = read_metrics(path)[1]
    changed = {
        "a torn last line": [*lines, lines[0][:40]],
        "a line deleted": [lines[0], lines[2]],
        "a line twice": [lines[0], lines[1], lines[1], lines[2]],
        "lines of later iterations": [
            *lines, *(line_of(second | {"iteration": n}) for n in (4, 5))
        ],
        "another order": [lines[1], lines[0], lines[2]],
        "a line edited": [lines[0], lines[1][1:], lines[2]],
        "an iteration edited": [lines[0], json.dumps(second | {"iteration": -2}) + "\n", lines[2]],
        "a value edited": [lines[0], json.dumps(second | {"reward_mean": "much"}) + "\n", lines[2]],
        "a number edited": [lines[0], lines[1].replace(": 0.", ": 1.", 1), lines[2]],
        "an infinity": [lines[0], json.dumps(second | {"kl": float("inf")}) + "\n", lines[2]],
    }[attack]  # fmt: skip
    with attempt(PART, f"metrics.jsonl: {attack}"):
        path.write_text("".join(changed))
        before = snapshot(run)
        code, output = call("train", "--resume", run)
        assert says in output and "Traceback" not in output
        if says.startswith("metrics.jsonl:"):
            assert code == 2 and len(output.splitlines()) == 1 and snapshot(run) == before
        else:
            assert code == 0 and results(run) == expected[0]
            assert [r for r in metrics(run) if r["iteration"] == 4] == expected[1][3:]


def test_flipped_bits_in_metrics(run, attempt, full) -> None:
    """A bit of metrics.jsonl is another number, key or checksum: it is named, nothing lost."""
    path = run / "metrics.jsonl"
    whole, draw = path.read_bytes(), random.Random(5)
    for _ in range(400 if full else 40):
        with attempt(PART, "metrics.jsonl: flipped bit, before loading"):
            damage(path, "flipped bit", draw)
            try:
                read = read_metrics(path)
            except ValueError as error:
                assert "metrics.jsonl:" in str(error)
            else:  # the end of the last line: it counts as torn
                path.write_bytes(whole)
                assert read == read_metrics(path)[:-1]
            path.write_bytes(whole)


# --- the history ----------------------------------------------------------------------------------


def test_a_missing_history_hides_no_edit(run, expected, attempt) -> None:
    """The newest checkpoint knows the settings, too."""
    path = run / "config.yaml"
    with attempt(PART, "history.jsonl gone and seed edited"):
        (run / "history.jsonl").unlink()
        text = path.read_text()
        path.write_text(text.replace("seed: 0", "seed: 1"))
        code, output = call("train", "--resume", run)
        assert code == 2 and "seed 0 -> 1" in output
        path.write_text(text)
        assert "compared with those in checkpoint 000003" in ends_well(run, expected, {})
