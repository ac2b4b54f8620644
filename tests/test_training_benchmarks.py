# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that train: finished runs are kept, budgets are equal, tables say what is true."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.cost import iteration_cost
from chunkgrpo.report.statistics import paired_difference
from chunkgrpo.train.loop import Trainer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(tiny_pipeline_path):
    """Settings of a run that takes a second."""
    settings = [
        f"model.path={tiny_pipeline_path}", "model.precision=fp32", "threads=1",
        "sampling.group_size=3", "rewards=[{name: brightness}]",
        "evaluation.reward={name: brightness}",
    ]  # fmt: skip
    return [part for each in settings for part in ("--set", each)]


# --- five minutes -------------------------------------------------------------------------------


@pytest.fixture
def judged_small():
    """Settings of a run on the embedded model that takes seconds."""
    settings = [
        "threads=1", "sampling.group_size=4", "sampling.prompts=2", "evaluation.final_prompts=6"
    ]  # fmt: skip
    return [part for each in settings for part in ("--set", each)]


@pytest.mark.parametrize("budget", [["--rows", "600"], ["--seconds", "0.2"]])
def test_the_race_keeps_what_is_finished_and_tells_it(budget, judged_small, tmp_path, capsys):
    benchmark = load("five_minutes")
    out, docs = tmp_path / "race.json", tmp_path / "page.md"
    docs.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    options = ["demo", "diffusion-nft", *budget, "--out", str(out), "--docs", str(docs)]
    benchmark.main([*options, "--seeds", "0", *judged_small])
    benchmark.main([*options, "--seeds", "0", "1", *judged_small])
    said = capsys.readouterr().out
    assert said.count("there already") == 2
    results = json.loads(out.read_text())
    assert {name: sorted(runs) for name, runs in results["runs"].items()} == {
        "demo": ["0", "1"], "diffusion-nft": ["0", "1"]
    }  # fmt: skip
    run = results["runs"]["diffusion-nft"]["0"]
    assert len(run["scores"]) == 12 and set(run["scores"]) <= {"0", "1"}
    assert run["images"] == 8 * run["iterations"] == 8 * len(run["rewards"])
    config = load_config("diffusion-nft", judged_small[1::2])
    cost = iteration_cost(config)
    each = cost.rollout + cost.measured + 3 * cost.trained
    assert run["rows"] == pytest.approx(run["iterations"] * each)
    if "--rows" in budget:
        assert abs(run["rows"] - 600) <= each / 2
        assert [part["rows"] for part in run["curve"]] == sorted(
            part["rows"] for part in run["curve"]
        )
    benchmark.main(["--table", "--out", str(out), "--docs", str(docs)])
    page = docs.read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "| demo | 2 |" in page
    assert (tmp_path / "images" / "page.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="another setup: "):
        benchmark.main([*options, *judged_small, "--set", "evaluation.final_prompts=8"])


def test_when_a_gain_is_reached_is_read_off_straight_lines():
    reached = load("five_minutes").reached
    curve = [(0, 0, 0.0), (10, 100, 4.0), (20, 200, 12.0), (30, 300, 8.0)]
    assert reached(curve, 2, 0) == 5 and reached(curve, 8, 1) == 150
    assert reached(curve, 12, 0) == 20 and reached(curve, 13, 0) is None


# --- methods ------------------------------------------------------------------------------------


def test_methods_share_a_budget_and_finished_runs_are_kept(small, tmp_path, capsys, monkeypatch):
    benchmark = load("methods")
    out, docs = tmp_path / "results.json", tmp_path / "page.md"
    docs.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    names = ["chunk-grpo", "e-grpo", "awm"]
    options = [
        *names, "--rows", "400", "--prompts", "6", "--out", str(out), "--docs", str(docs),
        "--set", "sampling.prompts=2", *small,
    ]  # fmt: skip

    # Stopped by Ctrl-C in the second method: the first one is there, and nothing of the second.
    inner, calls = Trainer.train_once, []

    def interrupted(self):
        calls.append(self)
        if len({id(trainer) for trainer in calls}) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self)

    monkeypatch.setattr(Trainer, "train_once", interrupted)
    with pytest.raises(SystemExit, match="stopped in e-grpo, seed 0; 1 finished runs are in"):
        benchmark.main(options)
    monkeypatch.setattr(Trainer, "train_once", inner)
    first = json.loads(out.read_text())
    assert {name: list(runs) for name, runs in first["runs"].items()} == {"chunk-grpo": ["0"]}

    capsys.readouterr()
    benchmark.main(options)
    printed = capsys.readouterr().out
    assert "[1/3] chunk-grpo, seed 0: there already" in printed
    results = json.loads(out.read_text())
    assert results["runs"]["chunk-grpo"] == first["runs"]["chunk-grpo"]
    assert results["base"] == first["base"]
    assert not list(tmp_path.glob("*-unfinished"))
    for name in names:
        run = results["runs"][name]["0"]
        spent = run["forward"] + 2 * run["backward"]
        assert abs(spent - 400) <= 0.5 * spent / run["iterations"], name
        assert run["images"] == 6 * run["iterations"] == 6 * len(run["rewards"])
        assert np.shape(run["scores"]) == np.shape(results["base"]) == (6, 2)
    # Without groups of equal rewards: 10 steps, the first of them shared by a prompt's 3 images;
    # two chunks of mean size 9/4 of each image are trained, half of them measured before.
    run = results["runs"]["chunk-grpo"]["0"]
    sizes = run["backward"] / run["iterations"]
    assert 6 * 3 - 6 <= sizes <= 6 * 6 and run["forward"] > run["iterations"] * (2 + 6 * 9)
    # The table, from the results alone.
    base, tuned = np.ravel(results["base"]), np.ravel(run["scores"])
    change = paired_difference(base, tuned, clusters=np.repeat(np.arange(6), 2))
    assert f"| {100 * change.estimate:+.1f} ({100 * change.low:+.1f} to" in printed
    capsys.readouterr()
    benchmark.main([*options, "--table"])
    text = docs.read_text()
    assert text.startswith(f"before\n{benchmark.BEGIN}\n| method |")
    assert text.endswith(f"a backward counted as two forwards; {text.split('forwards; ')[1]}")
    assert text.endswith(f"{benchmark.END}\nafter\n") and "old" not in text.split("after")[0][-200:]
    assert text.count("\n| ") == 4 and "brightness score of 6 held-out prompts x 2 images" in text
    benchmark.main([*options, "--table"])
    assert docs.read_text() == text

    # Results of another budget are not mixed in.
    with pytest.raises(SystemExit, match="rows 400 instead of 500; choose another --out"):
        benchmark.main([*options, "--rows", "500"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sequence-level", []),
        ("demo", []),
        ("flow-grpo", []),
        ("mixgrpo-flash", ["objective.window={kind: fixed, size: 4, start: 2}"]),
        ("tempflow-grpo", ["objective.window.indices=[3]"]),
        ("chunk-grpo", ["objective.selection.fraction=1", "objective.anchor=replay"]),
        ("awm", ["objective.kl=0.1"]),
        ("diffusion-nft", []),
    ],
)
def test_costs_are_what_an_iteration_does(name, settings, small, tmp_path):
    """The rows that the list of methods promises against those that go through the network.

    With one update and all chunks nothing is left to chance; no two images score the same.
    """
    benchmark = load("methods")
    more = ["sampling.prompts=2", "objective.updates=1", "evaluation.every=0", *settings]
    config = load_config(name, [*small[1::2], *more])
    trainer = build_trainer(config, tmp_path)
    counter = benchmark.RowCounter(trainer, 1)
    assert not trainer.run() and counter.done and counter.iterations == 1
    cost = iteration_cost(config)
    assert (counter.forward, counter.backward) == (cost.forwards, cost.trained)


def test_every_method_is_judged_by_one_sampler(small):
    """E-GRPO samples on merged steps; its images are judged on the others' ten."""
    benchmark = load("methods")
    settings = small[1::2]
    assert load_config(benchmark.REFERENCE, settings).sampling.steps == 10
    assert load_config("e-grpo", settings).sampling.steps == 16


def test_wrong_calls_of_the_benchmark_are_one_line(tmp_path, capsys):
    benchmark = load("methods")
    for arguments, says in (
        (["chunk-grpoo"], "did you mean 'chunk-grpo'"),
        (["--rows", "0"], "must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert says in capsys.readouterr().err
    missing = tmp_path / "missing.json"
    with pytest.raises(SystemExit, match="does not exist"):
        benchmark.main(["--table", "--out", str(missing)])
    missing.write_text(json.dumps({"setup": {}, "runs": {}}))
    with pytest.raises(SystemExit, match="no finished run"):
        benchmark.main(["--table", "--out", str(missing)])


def test_the_page_has_a_place_for_the_table():
    benchmark = load("methods")
    text = (BENCHMARKS.parent / "docs" / "methods.md").read_text()
    assert text.count(benchmark.BEGIN) == text.count(benchmark.END) == 1


# --- consistency --------------------------------------------------------------------------------


def test_consistency_benchmark_measures_both_arms(small, tmp_path, capsys):
    benchmark = load("consistency")
    out = tmp_path / "results.json"
    options = [
        "--weights", "0", "1e4", "--seeds", "2", "--iterations", "2", "--prompts", "2",
        "--probe", "4", "--images", "2", "--out", str(out),
        "--set", "optimizer.learning_rate=1e-3", "--set", "watched_rewards=[]",
        "--set", "credit.project_out=[]", "--set", "credit.keep=1", *small,
    ]  # fmt: skip
    benchmark.main(options)
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert set(results["runs"]) == {"0", "10000"}
    for seed in "01":
        without, with_term = (results["runs"][weight][seed] for weight in ("0", "10000"))
        # Nothing has moved before training, and both arms start from the same model and noise.
        assert without["before"] == with_term["before"] and without["before"]["drift"] == 0
        assert without["before"]["disagreement"] > 0
        # The first rollout is the same; the first update, where the term is 0, too.
        assert without["training"][0] == with_term["training"][0]
        assert without["term"][0] == pytest.approx(with_term["term"][0], rel=1e-4)
        assert without["term"][0] > 0
        # A pull this strong is what the second update and all after it follow.
        assert with_term["after"]["drift"] < without["after"]["drift"]
    assert "| 10000 less 0 |" in printed and "2 training seeds" in printed
    kept = out.read_text()
    benchmark.main(options)
    assert out.read_text() == kept and "..." not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="choose another --out"):
        benchmark.main([*options, "--iterations", "3"])


def test_apart_by_hand():
    import torch

    clean = torch.tensor([[[0.0, 0.0], [1.0, 3.0], [1.0, 1.0]]])
    assert load("consistency").apart(clean).tolist() == [(1 + 9 + 0 + 4) / 4]
    assert load("consistency").interval([1.0, 3.0]) == f"2 ({2 - 12.7062:.4g} to {2 + 12.7062:.4g})"


# --- gradient noise -----------------------------------------------------------------------------


def test_signal_and_alignment_of_gradients_with_known_ones():
    benchmark = load("gradient_noise")
    generator = torch.Generator().manual_seed(0)
    signal = torch.zeros(400)
    signal[0] = 2.0
    found, errors = [], []
    for _ in range(200):
        g = signal + torch.randn(12, 400, generator=generator)
        value, error, power = benchmark.signal_of(g @ g.T)
        assert power == pytest.approx(404, rel=0.1)
        found.append(value)
        errors.append(error)
    mean, spread = np.mean(found), np.std(found)
    assert abs(mean - 4) < 4 * spread / 200**0.5
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    cosine, error = benchmark.aligned(signal + torch.randn(4000, 400, generator=generator), signal)
    assert abs(cosine - 2 / 404**0.5) < 4 * error
    assert error == pytest.approx(404**-0.5 / 4000**0.5, rel=0.1)
    exact = torch.eye(3) + 1.0  # by hand
    assert benchmark.signal_of(exact) == pytest.approx((1.0, 0.0, 2.0))


def test_gradient_noise_compares_cases_without_moving_the_model(small, capsys):
    benchmark = load("gradient_noise")
    settings = ["--set", "sampling.prompts=2", "--set", "watched_rewards=[]"]
    settings += ["--set", "credit.project_out=[]", "--rollouts", "3", *small]
    cases = ("low sampling.transition.eta=0.5", "high sampling.transition.eta=1")
    benchmark.main([*settings, *(part for case in cases for part in ("--case", case))])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["low:", "high:"]
    assert lines[-2].startswith("| low |") and lines[-2].endswith("| 1.00 |")
    assert lines[-1].startswith("| high |")
    with pytest.raises(SystemExit):
        benchmark.main([*settings, "--case", "alone"])
