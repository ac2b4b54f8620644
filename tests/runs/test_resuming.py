# SPDX-License-Identifier: Apache-2.0
"""Going on with a run, and using one that is not finished."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from chunkgrpo.config import ConfigError, load_config
from chunkgrpo.runs import find_tuned, load_tuned, resumed_config, train_run, training
from chunkgrpo.runs.history import read_history
from chunkgrpo.runtime.checkpoints import list_checkpoints, tuned_weights
from chunkgrpo.runtime.optimizers import Optimization
from chunkgrpo.train.loop import Trainer
from small_runs import call, metrics, results, settings_of, stopped, trained, weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(tiny_pipeline_path, place):
    return settings_of(tiny_pipeline_path, place)


@pytest.fixture(scope="module")
def whole(settings, place):
    """A run of 4 iterations in one piece."""
    trained("demo", *settings, "--out", place / "whole")
    return place / "whole"


@pytest.fixture(scope="module")
def cut_short(settings, place):
    """The same run, stopped in its second iteration."""
    stopped(2, "demo", *settings, "--out", place / "stopped")
    return place / "stopped"


@pytest.fixture
def run(cut_short, tmp_path):
    return Path(shutil.copytree(cut_short, tmp_path / "run"))


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(training, "build_trainer", fail)


def events(folder):
    return [record["event"] for record in read_history(folder).records]


def test_a_stopped_run_ends_as_one_in_one_piece(run, whole) -> None:
    assert events(run) == ["start", "stop"]
    trained("--resume", run)
    assert results(run) == results(whole) and metrics(run) == metrics(whole)
    assert events(run) == ["start", "stop", "resume", "finish"]
    assert events(whole) == ["start", "finish"]
    assert "What happened to the run" in (run / "report.html").read_text()
    assert "What happened to the run" not in (whole / "report.html").read_text()


def test_a_longer_run_is_that_of_the_longer_setting(run, settings, place) -> None:
    """What is allowed to change does what it would have done from the start."""
    trained("demo", *settings, "--set", "iterations=5", "--out", place / "five")
    output = trained("--resume", run, "--set", "iterations=5")
    assert "from iteration 3 on: iterations 4 -> 5" in output
    assert results(run) == results(place / "five") and metrics(run) == metrics(place / "five")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["iterations"] == 5
    (change,) = [r for r in read_history(run).records if r["event"] == "change"]
    assert {k: change[k] for k in ("iteration", "key", "old", "new", "given")} == {
        "iteration": 2, "key": "iterations", "old": 4, "new": 5, "given": "--set",
    }  # fmt: skip
    page = (run / "report.html").read_text()
    assert "iterations changed, by --set" in page
    # From then on they are its own settings.
    assert resumed_config(run).iterations == 5


def test_a_finished_run_can_be_made_longer(whole, settings, place, tmp_path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    trained("--resume", run, "--set", "iterations=5")
    if not (place / "five").exists():
        trained("demo", *settings, "--set", "iterations=5", "--out", place / "five")
    assert results(run) == results(place / "five")


def test_an_edited_rate_is_noticed_and_taken(run, whole) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    output = trained("--resume", run)
    assert "from iteration 3 on: optimizer.learning_rate 0.01 -> 0.02" in output
    (change,) = [r for r in read_history(run).records if r["event"] == "change"]
    assert change["given"] == "config.yaml" and change["new"] == 0.02
    assert metrics(run)[:2] == metrics(whole)[:2]
    assert results(run)["model"] != results(whole)["model"]
    assert (
        results(run)["scores"]["base score.brightness"]
        == (results(whole)["scores"]["base score.brightness"])
    )


def test_a_fall_is_counted_with_the_new_number() -> None:
    """The figures of the page on going on with a run."""
    rate = Optimization(learning_rate=1.0, fall=0.5).rate
    assert rate(0, (100 - 80) / 100) == pytest.approx(0.4)
    assert rate(0, (200 - 80) / 200) == 1.0
    assert rate(0, (200 - 100) / 200) == 1.0 and rate(0, (200 - 101) / 200) < 1.0


FIXED = [
    ("model.adaptation.rank=4", "model.adaptation.rank 32 -> 4"),
    ("model.path=shapes", "model.path"),
    ("model.precision=bf16", "model.precision 'fp32' -> 'bf16'"),
    ("rewards=[{name: jpeg_compressibility}]", "rewards.0.name 'brightness' -> 'jpeg_compress"),
    ("sampling.group_size=4", "sampling.group_size 2 -> 4"),
    ("evaluation.final_prompts=5", "evaluation.final_prompts 4 -> 5"),
    ("evaluation.seed=3", "evaluation.seed 1234 -> 3"),
    ("seed=3", "seed 0 -> 3"),
    ("optimizer.betas=[0.5,0.9]", "optimizer.betas [0.9, 0.999] -> [0.5, 0.9]"),
    ("ema.decay=0.5", "ema.decay"),
]


@pytest.mark.parametrize(("setting", "says"), FIXED)
@pytest.mark.parametrize("how", ["--set", "config.yaml"])
def test_what_cannot_change_is_refused_before_loading(
    run, setting, says, how, nothing_is_loaded
) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    if how == "--set":
        code, output = call("train", "--resume", run, "--set", setting)
    else:
        edited = load_config(run / "config.yaml", [setting])
        (run / "config.yaml").write_text(yaml.safe_dump(edited.model_dump(mode="json")))
        before[run / "config.yaml"] = (run / "config.yaml").read_bytes()
        code, output = call("train", "--resume", run)
    assert code == 2 and len(output.splitlines()) == 1, output
    assert says in output and "start a new run" in output
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "iterations=1"], "iterations = 1, and 2 are finished"),
        (["--model", "./elsewhere"], "model.path"),
        (["--reward", "shapes"], "rewards.0.name 'brightness' -> 'shapes'"),
        (["--prompts", "other.txt"], "prompts.train"),
        (["--out", "elsewhere"], "--out elsewhere says otherwise"),
        (["--set", "optimizer.learning_rate=0"], "learning_rate"),
        (["--set", "nonsense=0"], "unknown configuration key"),
    ],
)
def test_options_beside_resume(run, options, says, nothing_is_loaded) -> None:
    code, output = call("train", "--resume", run, *options)
    assert code == 2 and len(output.splitlines()) == 1 and says in output


def test_a_recipe_beside_resume_is_refused(run, nothing_is_loaded) -> None:
    code, output = call("train", "demo", "--resume", run)
    assert code == 2 and "the recipe demo says otherwise" in output


def test_what_says_the_same_is_no_change(run, tiny_pipeline_path) -> None:
    config = resumed_config(run, [f"model.path={tiny_pipeline_path}", "seed=0", "threads=1"])
    assert config == resumed_config(run)
    assert resumed_config(run, ["async_rewards=true"]).async_rewards


def test_other_prompts_in_the_same_file_are_refused(run, settings, place) -> None:
    prompts = place / "prompts.txt"
    text = prompts.read_text()
    try:
        for changed in (text + "a house\n", text.replace("7 stars", "7 moons")):
            prompts.write_text(changed)
            code, output = call("train", "--resume", run)
            assert code == 2 and "are not those that the run began with" in output, output
            assert not (run / "summary.json").exists()
    finally:
        prompts.write_text(text)


def test_a_killed_final_evaluation_trains_nothing_again(
    settings, whole, tmp_path, monkeypatch
) -> None:
    folder = tmp_path / "run"
    inner = Trainer.evaluate

    def killed(self, *arguments, **options):
        if self.iteration == 4:
            raise KeyboardInterrupt
        return inner(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "evaluate", killed)
    code, output = call("train", "demo", *settings, "--out", folder)
    assert code == 75 and "Stopped at once" in output
    monkeypatch.setattr(Trainer, "evaluate", inner)
    monkeypatch.setattr(Trainer, "train_once", lambda self: pytest.fail("trained again"))
    trained("--resume", folder)
    assert results(folder) == results(whole)
    assert metrics(folder) == metrics(whole)


def test_a_base_that_is_damaged_or_of_something_else_is_evaluated_again(run, whole) -> None:
    base = run / "evaluation" / "base.npz"
    content = bytearray(base.read_bytes())
    content[len(content) // 2] ^= 1
    base.write_bytes(content)
    output = trained("--resume", run)
    assert "is damaged: its SHA-256 is not that of base.json; the base is evaluated again" in output
    assert results(run) == results(whole)


# --- the checkpoints are used ---------------------------------------------------------------------


def images_of(policy):
    from chunkgrpo.core import make_sigmas
    from chunkgrpo.evaluate import sample_images

    return sample_images(policy, ["a picture of 3 stars"] * 2, make_sigmas(3), [0, 1])


def test_the_last_checkpoint_is_the_finished_model(whole) -> None:
    """Of a finished run, model/ and the checkpoint of its last iteration draw the same bits."""
    said = []
    plain = images_of(load_tuned(whole, None, said.append)[1])
    assert said == []
    for which in ("last", "4"):
        assert torch.equal(images_of(load_tuned(whole, which)[1]), plain)
    assert not torch.equal(images_of(load_tuned(whole, "3")[1]), plain)


def test_a_stopped_run_is_drawn_judged_and_exported(cut_short, tmp_path, whole) -> None:
    run = Path(shutil.copytree(cut_short, tmp_path / "run"))
    line = f"{run} is not finished: this is its checkpoint of 2 iterations"
    for command, more in (
        ("sample", ["a star", "--images", "1"]),
        ("evaluate", []),
        ("export", []),
    ):
        code, output = call(command, run, *more)
        assert code == 0 and line in output, output
    assert (run / "drawn" / "a-star-000002.png").exists()
    assert (run / "pipeline-000002" / "model_index.json").exists()
    code, output = call("evaluate", run, "--checkpoint", "2")
    assert code == 0 and line not in output
    # The evaluation of its second iteration was given up, so no checkpoint has a score.
    code, output = call("export", run, "--checkpoint", "best", "--out", tmp_path / "best")
    assert code == 2 and "has no checkpoint with a score; there are 1, 2" in output
    code, output = call("export", whole, "--checkpoint", "best", "--out", tmp_path / "best")
    assert code == 0 and weights(tmp_path / "best" / "transformer")
    for which, says in (
        ("7", "has no checkpoint 7; there are 1, 2"), ("x", "unknown checkpoint 'x'"),
        ("-1", "unknown checkpoint '-1'"), ("", "unknown checkpoint ''"),
    ):  # fmt: skip
        code, output = call("evaluate", run, "--checkpoint", which)
        assert code == 2 and says in output and len(output.splitlines()) == 1
    code, output = call("evaluate", run, "--base", "--checkpoint", "2")
    assert code == 2 and "--base" in output


def test_a_run_that_went_on_beyond_its_model_gives_the_newer_checkpoint(
    whole, tmp_path, monkeypatch
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    stopped(5, "--resume", run, "--set", "iterations=6")
    said = []
    tuned = find_tuned(run, None, said.append)
    assert tuned.label == "000005" and "checkpoint of 5 iterations" in said[0]


def test_a_run_without_a_checkpoint_says_so(settings, tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config("demo", settings[1::2])
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for command in (["sample", folder, "a star"], ["evaluate", folder], ["export", folder]):
        code, output = call(*command)
        assert code == 2 and "no tuned model and no checkpoint yet" in output


def test_a_full_fine_tune_gives_its_weights_while_it_goes_on(settings, tmp_path) -> None:
    """In the middle of a run, whose folder is locked; the weights are the averaged ones."""
    seen = {}

    def look(record):
        if record["iteration"] == 3:  # the checkpoint of 2 is there, that of 3 is not yet
            policy = load_tuned(tmp_path / "run", "last")[1]
            own = dict(policy.pipe.transformer.named_parameters())
            held = tuned_weights(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
            seen["same"] = all(torch.equal(own[name], value) for name, value in held.items())
            seen["number"], seen["images"] = len(held), images_of(policy)

    config = load_config("demo", [*settings[1::2], "model.adaptation=full", "iterations=3"])
    train_run(config, tmp_path / "run", look, lambda text: lambda done, total: None)
    assert seen["same"] and seen["number"] > 10
    final = load_tuned(tmp_path / "run")[1]
    assert torch.equal(images_of(load_tuned(tmp_path / "run", "3")[1]), images_of(final))
    assert torch.equal(images_of(load_tuned(tmp_path / "run", "2")[1]), seen["images"])
    assert not torch.equal(images_of(final), seen["images"])
    code, output = call("export", tmp_path / "run", "--checkpoint", "3")
    assert code == 0, output
    exported = weights(tmp_path / "run" / "pipeline-000003" / "transformer")
    assert exported == weights(tmp_path / "run" / "model" / "transformer")


def test_a_run_works_from_any_directory(
    settings, tiny_pipeline_path, tmp_path, monkeypatch
) -> None:
    """Every path of the settings was relative to where it was started."""
    here, away = tmp_path / "here", tmp_path / "away" / "deep"
    here.mkdir()
    away.mkdir(parents=True)
    os.symlink(tiny_pipeline_path, here / "model")
    (here / "prompts.txt").write_text("a star\na moon\ntwo suns\na tree\n")
    monkeypatch.chdir(here)
    given = [*settings, "--set", "model.path=model"]
    given += ["--set", "prompts.train=prompts.txt", "--set", "prompts.held_out=./prompts.txt"]
    given += ["--out", "runs/x"]
    stopped(1, "demo", *given)
    monkeypatch.chdir(away)
    run = "../../here/runs/x"
    config = yaml.safe_load(Path(run, "config.yaml").read_text())
    assert config["model"]["path"] == str(here / "model")
    assert config["prompts"]["train"] == str(here / "prompts.txt")
    assert call("sample", run, "a star", "--images", "1")[0] == 0
    trained("--resume", run)
    assert call("evaluate", run)[0] == 0
    assert json.loads(Path(run, "summary.json").read_text())["prompts"] == 4
    assert read_history(here / "runs/x").records[0]["directory"] == str(here)


def test_edited_settings_are_said_by_what_reads_them(whole, tmp_path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("steps: 3", "steps: 4"))
    code, output = call("evaluate", run)
    assert code == 0 and "was edited since the run last went on: sampling.steps 3 -> 4" in output


def test_a_missing_configuration_comes_back_from_the_history(run, whole) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    trained("--resume", run)
    assert (run / "config.yaml").read_text() == text
    assert results(run) == results(whole)


def test_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        resumed_config(tmp_path)
