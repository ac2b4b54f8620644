# SPDX-License-Identifier: Apache-2.0
"""The command line, as a person meets it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from chunkgrpo.cli import app
from chunkgrpo.config import Config, ConfigError, load_config, parse_config
from chunkgrpo.config.keys import every_key
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.recipes import recipe_names
from chunkgrpo.runs import loading
from chunkgrpo.shapes.build import PipelineSize, build_pipeline

# 64 x 64 pixels, as the verifier wants, but next to no weights.
SIZE = PipelineSize(
    width=32, layers=1, head_dim=16, clip_width=16, clip_layers=2, t5_width=32,
    vae_channels=(4, 4, 4, 4), latent_channels=4, latent_size=8,
)  # fmt: skip
SMALL = [
    "--set", "iterations=3", "--set", "sampling.prompts=3", "--set", "sampling.group_size=4",
    "--set", "objective.window=all", "--set", "sampling.tail=euler", "--set", "sampling.steps=5",
    "--set", "objective.plan.sizes=[1,3]", "--set", "objective.selection.indices=[0]",
    "--set", "evaluation.every=2", "--set", "evaluation.prompts=6",
    "--set", "evaluation.final_prompts=12", "--set", "checkpoints.every=1",
]  # fmt: skip

ENTROPY = ["--set", "sampling.merge={kind: entropy, least: 0}"]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline(SIZE).save_pretrained(folder)
    return folder


def call(*arguments: str, code: int = 0) -> str:
    """Run the command line in this process; return what it prints."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(request, small_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished small run and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    output = call(
        "train", "demo", *SMALL, "--out", str(folder),
        "--set", f"model.path={small_model}", "--set", f"model.adaptation={request.param}",
    )  # fmt: skip
    return folder, output


def test_a_run_leaves_everything_it_promises(finished) -> None:
    folder, output = finished
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "curves.png", "samples.png",
                 "report.html", "model", "checkpoints"):  # fmt: skip
        assert (folder / name).exists(), name
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [1, 2, 3]
    assert {
        "reward_mean", "advantage_spread", "zero_spread_groups", "ratio_mean", "ratio_std",
        "step_ratio_mean", "chunk_ratio_mean", "clip_fraction", "kl", "grad_norm", "l1_rel",
        "phase_seconds", "rollout_evaluations", "trained_pairs", "images_per_second",
    } <= set(records[0])  # fmt: skip
    # The stronger half of 12 samples trains the first of two chunks, one step long.
    assert records[0]["trained_pairs"] + records[0]["idle_pairs"] == 6
    # The shared first velocity is computed once for each of 3 prompts, then 4 steps of 12.
    assert records[0]["rollout_evaluations"] == 3 + 4 * 12
    assert "accuracy" in records[1]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["prompts"] == 12
    assert summary["difference"] == pytest.approx(summary["tuned"] - summary["base"])
    assert set(summary["by_task"]) >= {"counting", "position", "all"}
    last = output.strip().splitlines()[-1]
    assert str(folder / "model") in " ".join(output.split()) and "%" in last + output
    assert Image.open(folder / "samples.png").size[0] > 200
    assert "<script" not in (folder / "report.html").read_text()


def test_the_resolved_configuration_reproduces_the_run(finished, tmp_path: Path) -> None:
    folder, _ = finished
    again = tmp_path / "again"
    call("train", str(folder / "config.yaml"), "--out", str(again))
    first = json.loads((folder / "summary.json").read_text())
    second = json.loads((again / "summary.json").read_text())
    assert first["tuned"] == second["tuned"]
    assert first["health_tuned"] == second["health_tuned"]


def test_sample_draws_both_models(finished) -> None:
    folder, _ = finished
    output = call("sample", str(folder), "a red square left of a blue circle", "--images", "2")
    path = folder / "drawn" / "a-red-square-left-of-a-blue-circle.png"
    assert str(path) in " ".join(output.split()) or path.name in output.replace("\n", "")
    assert np.asarray(Image.open(path)).std() > 0


def test_evaluate_repeats_the_final_score(finished) -> None:
    folder, _ = finished
    output = call("evaluate", str(folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{100 * summary['tuned']:.1f} % over 12 prompts" in " ".join(output.split())


def test_evaluate_takes_other_noises_and_the_base(finished) -> None:
    from chunkgrpo.runs import evaluate_run, find_base

    folder, _ = finished
    config = load_config(folder / "config.yaml")
    own, again, other, base = (
        evaluate_run(folder, lambda done, total: None, None, *options)[0]
        for options in ((), (config.evaluation.seed,), (99,), (None, find_base(folder)))
    )
    assert own.images.equal(again.images) and own.prompts == other.prompts == base.prompts
    assert not own.images.equal(other.images) and not own.images.equal(base.images)
    summary = json.loads((folder / "summary.json").read_text())
    output = " ".join(call("evaluate", str(folder), "--base").split())
    assert f"{100 * summary['base']:.1f} % over 12 prompts" in output


def test_models_are_drawn_one_after_the_other_in_batches_of_the_run(
    finished, tmp_path: Path, monkeypatch
) -> None:
    """Memory is that of one model, and of as many images at once as the run's own rollout."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["sampling"]["batch_size"] = 5
    config["model"]["precision"] = "fp32"
    config["model"]["gradient_checkpointing"] = True  # network and policy hold each other
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows, alive, policies = [], [], []
    velocity, load = PipelinePolicy.velocity, loading.load_untrained

    def counted(self, x, sigma, conditioning):
        rows.append(len(x))
        return velocity(self, x, sigma, conditioning)

    def loaded(*arguments):
        alive.append(sum(policy() is not None for policy in policies))
        policies.append(weakref.ref(policy := load(*arguments)))
        return policy

    monkeypatch.setattr(PipelinePolicy, "velocity", counted)
    monkeypatch.setattr(loading, "load_untrained", loaded)
    call("sample", str(folder), "a red square", "--images", "7", "--out", str(tmp_path / "a.png"))
    assert alive == [0, 0]
    steps = config["sampling"]["steps"]
    assert rows == 2 * ([5] * steps + [2] * steps)
    rows.clear()
    call("evaluate", str(folder))  # 12 prompts, two images each
    assert rows == [5] * 4 * steps + [4] * steps


def test_what_is_saved_loads_in_stock_diffusers(finished, small_model: Path) -> None:
    folder, _ = finished
    config = yaml.safe_load((folder / "config.yaml").read_text())
    code = (
        "import sys, diffusers\n"
        "model, base, method = sys.argv[1:]\n"
        "path = model if method == 'full' else base\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(path)\n"
        "if method == 'lora': pipe.load_lora_weights(model)\n"
        "image = pipe('a red circle', num_inference_steps=2, max_sequence_length=1,"
        " output_type='np').images\n"
        "assert image.shape == (1, 64, 64, 3)\n"
        "assert not any(name.startswith('chunkgrpo') for name in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(folder / "model"), str(small_model)]
    subprocess.run(
        [*command, config["model"]["adaptation"]["kind"]], check=True, capture_output=True
    )


def test_an_interrupted_run_says_how_to_go_on_and_does(small_model: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = [*SMALL, "--set", f"model.path={small_model}", "--set", "evaluation.every=0"]
    call("train", "demo", *settings, "--out", str(whole))
    code = (
        "import os, signal, sys\n"
        "from chunkgrpo.train import loop\n"
        "inner = loop.Trainer.train_once\n"
        "def train_once(self):\n"
        "    if self.iteration == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return inner(self)\n"
        "loop.Trainer.train_once = train_once\n"
        "from chunkgrpo.cli import main\n"
        "sys.argv = ['chunkgrpo', *sys.argv[1:]]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "demo", *settings, "--out", str(cut)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 75
    assert f"chunkgrpo train --resume {cut}" in " ".join(done.stdout.split())
    assert not (cut / "summary.json").exists()
    call("train", "--resume", str(cut))
    keys = ("tuned", "health_tuned", "iterations")
    first = json.loads((whole / "summary.json").read_text())
    second = json.loads((cut / "summary.json").read_text())
    assert [first[k] for k in keys] == [second[k] for k in keys]


def test_chunks_measures_and_proposes(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    output = call(
        "chunks", str(small_model), "--prompts", "3", "--seeds", "2", "--out", str(folder),
        "--set", "objective.selection.kind=listed", "--set", "objective.selection.indices=[0,1]",
    )  # fmt: skip
    with Image.open(folder / "dynamics.png") as picture:
        assert picture.size[0] > 1000
    words = " ".join(output.split())
    command = f"chunkgrpo train chunk-grpo --chunks {folder / 'chunks.yaml'} --model {small_model}"
    assert words.endswith(command)
    for name in ("flow SDE, eta 0.7", "Dance SDE, eta 0.3", "ODE"):
        assert f"{name}: the step explains" in words
    text = (folder / "chunks.yaml").read_text()
    assert text.startswith(f"# {small_model}, 10 steps, 3 prompts x 2 seeds, l1\n")
    section = yaml.safe_load(text)["objective"]
    plan, selection = section["plan"], section["selection"]
    assert plan["kind"] == "explicit" and sum(plan["sizes"]) == 9
    record = json.loads((folder / "dynamics.json").read_text())
    assert [len(sampler["mean"]) for sampler in record] == [9, 9, 9]
    assert record[0]["plans"]["optimal"] == plan["sizes"]
    # The file is what `train --chunks` takes, after the recipe and before --set.
    config = load_config("chunk-grpo", [], folder / "chunks.yaml")
    assert config.objective.selection.kind == "listed"
    assert list(config.objective.plan.sizes) == plan["sizes"]
    assert list(config.objective.selection.indices) == selection["indices"]
    config = load_config("chunk-grpo", ["objective.selection=uniform"], folder / "chunks.yaml")
    assert config.objective.selection.kind == "uniform"


@pytest.mark.parametrize(
    ("recipe", "trains", "rule", "sizes"),
    [
        ("demo", "steps 1 to 3", "equal", [1, 1, 1]),
        ("mixgrpo", "2 steps that begin at one of 3 places, step 0 to step 2", "optimal-4", [1, 1]),
    ],
)
def test_chunks_of_a_window_are_trained_as_the_last_line_says(
    recipe: str, trains: str, rule: str, sizes: list[int], small_model: Path, tmp_path: Path
) -> None:
    """From a recipe with a window to a run, with what is printed and nothing else."""
    folder = tmp_path / "profile"
    window = {"demo": "{kind: fixed, start: 1, size: 3}", "mixgrpo": "{kind: sliding, size: 2}"}
    output = call(
        "chunks", recipe, "--prompts", "2", "--seeds", "2", "--rule", rule, "--out", str(folder),
        "--set", f"model.path={small_model}", "--set", "sampling.steps=5",
        "--set", f"objective.window={window[recipe]}",
    )  # fmt: skip
    assert f"The recipe trains {trains};" in output
    text = (folder / "chunks.yaml").read_text()
    assert text.startswith(
        f"# {small_model}, 5 steps, 2 prompts x 2 seeds, l1; chunks of {trains}\n"
    )
    assert yaml.safe_load(text)["objective"]["plan"]["sizes"] == sizes
    record = json.loads((folder / "dynamics.json").read_text())
    assert [len(sampler["mean"]) for sampler in record] == [4, 4, 4]
    assert {len(curve) for curve in record[0]["inside"].values()} == {len(sizes)}
    # Others than the recipe's own sampler are measured once; the ODE needs no more.
    inside = {int(start): curve for start, curve in record[2]["inside"].items()}
    for start, curve in inside.items():
        assert curve == record[2]["mean"][start : start + len(sizes)]
    *_, last = output.strip().splitlines()
    said, _, command = last.partition(": chunkgrpo ")
    assert said == "Train with"
    few = ["iterations=1", "sampling.prompts=2", "sampling.group_size=3", "evaluation.every=0"]
    few += ["evaluation.final_prompts=2", "evaluation.final_seeds=1"]
    settings = [part for each in few for part in ("--set", each)]
    call(*shlex.split(command), *settings, "--out", str(tmp_path / "run"))
    (record,) = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert record["chunks"] == sizes
    assert record["window"] == [min(inside), min(inside) + sum(sizes)]


@pytest.mark.parametrize(
    ("recipe", "settings", "choice"),
    [
        # Carried over by their steps: chunk 0 of [1, 2, 2, 4] is in the first of [3, 3, 3].
        ("chunk-grpo", ["selection={kind: listed, indices: [0]}"], ("listed", [0])),
        ("chunk-grpo", ["selection={kind: listed, indices: [2,3]}"], ("listed", [1, 2])),
        # The recipe's sizes do not fit; all of them stay all, some of them are unknown.
        (
            "chunk-grpo",
            ["plan.sizes=[1,1]", "selection={kind: listed, indices: [1,0]}"],
            ("listed", [0, 1, 2]),
        ),
        (
            "chunk-grpo",
            ["plan.sizes=[1,1]", "selection={kind: listed, indices: [0]}"],
            ("uniform", None),
        ),
        (
            "chunk-grpo",
            ["plan=adaptive", "selection={kind: listed, indices: [0]}"],
            ("uniform", None),
        ),
        (
            "chunk-grpo",
            ["plan={kind: adaptive, refresh: 3}", "selection=weighted"],
            ("weighted", None),
        ),
        ("dance-grpo", [], ("uniform", None)),
    ],
)
def test_the_choice_of_chunks_fits_the_new_ones(recipe, settings, choice) -> None:
    from chunkgrpo.cli.cutting import selection_again
    from chunkgrpo.core.plans import ChunkPlan

    assignments = [f"objective.{each}" for each in settings]
    config = load_config(recipe, assignments, check_chunks=False)
    found = selection_again(config.objective, ChunkPlan((3, 3, 3)), 9)
    assert (found["kind"], found.get("indices")) == choice


def test_recipes_are_listed_and_valid() -> None:
    output = call("recipes")
    for name in recipe_names():
        assert name in output
        assert isinstance(load_config(name), Config)
    shown = yaml.safe_load(call("recipes", "demo"))
    assert parse_config(shown) == load_config("demo")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "demoo"], "did you mean 'demo'"),
        (["train", "--set", "optimizer.lerning_rate=1"], "'optimizer.learning_rate'"),
        (["train", "--set", "lr=1"], "unknown configuration key 'lr'"),
        (["train", "--set", "objective.plan.sizes=[2,3,4,8]"], "sum to 17"),
        (["train", "--set", "sampling.group_size=1"], "must be from 2 to 100,000"),
        (["train", "missing.yaml"], "does not exist"),
        (["train", "--set", "model.path=/nowhere/at/all"], "does not exist"),
        (["train", "--set", "model.path=TMP"], "no model_index.json"),
        (["train", "--set", "prompts.train=nowhere.txt"], "nowhere.txt does not exist"),
        (["train", "--set", "credit.convention=best"], "group_std"),
        (["train", "--set", "rewards.0.name=clipp"], "unknown reward 'clipp'"),
        (["train", "--set", "objective.plan=paper"], "needs sampling.steps = 17"),
        (["train", "awm", "--set", "objective.times.number=10"], "offers 1 to 9 times"),
        (["train", "--set", "nonsense"], "key=value"),
        (["train", "--chunks", "nowhere.yaml"], "chunks file nowhere.yaml does not exist"),
        (["train", "--resume", "TMP", "--chunks", "c.yaml"], "chunks file c.yaml does not exist"),
        (["train", "demo", "--resume", "TMP"], "the recipe demo says otherwise"),
        (["train", "--resume", "TMP", "--out", "other"], "--out other says otherwise"),
        (["train", "--resume", "TMP", "--async-rewards"], "no run folder"),
        (["train", "--set", "rewards=[{name: shapes},{name: shapes}]"], "two rewards are named"),
        (["train", "--set", "rewards=[]"], "at least 1 item"),
        (["serve-reward", "clipp"], "unknown reward 'clipp'"),
        (["serve-reward", "shapes", "--option", "mode"], "key=value"),
        (["serve-reward", "shapes", "--host", "0.0.0.0"], "there is no token"),
        (["chunks", "step-level", "--recipe", "demo"], "both recipes; name one"),
        (["chunks", "awm"], "on noised clean latents, and has no chunks"),
        (["chunks", "e-grpo"], "--set objective.window.indices=[]"),
        (["chunks", "step-level-reweighted"], "--set objective.outer_weights=none"),
        (["chunks", "demo", "--set", "objective.window.start=7"], "does not lie in the 9 trained"),
        (["chunks", "--rule", "best"], "known: optimal"),
        (["chunks", "--rule", "paper"], "needs 16 trained steps"),
        (["train", "--resume", "TMP"], "no run folder"),
        (["sample", "TMP", "a circle"], "no run folder"),
        (["evaluate", "TMP"], "no run folder"),
        (["export", "TMP"], "no run folder"),
        (["train", "--set", "sampling.schedule=nativ"], "'native'?; known: shifted, native"),
        (
            ["train", "--set", "sampling.schedule=native", *ENTROPY],
            "worked out before the model is loaded",
        ),
        (
            ["train", "--set", "model.offload=[reference]", "--set", "model.adaptation=lora"],
            "itself",
        ),
        (["train", "--set", "model.attention_backend=flsh"], "did you mean 'flash'"),
        (["train", "--set", "model.ofload=[vae]"], "did you mean 'model.offload'"),
    ],
)
def test_wrong_input_is_one_clear_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [a.replace("TMP", str(tmp_path)) for a in arguments])
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    assert says in lines[0]
    assert "Traceback" not in result.output


def test_every_flag_is_known() -> None:
    """The flags are an interface: changing one must change this test."""
    import typer.main

    group = typer.main.get_command(app)
    flags = {
        name: sorted(o for p in command.params for o in p.opts if o.startswith("--"))
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        if name != "shapes"
    }
    assert flags == {
        "train": ["--allow-code", "--async-rewards", "--chunks", "--model", "--out", "--prompts",
                  "--resume", "--reward", "--set"],
        "doctor": ["--allow-code", "--chunks", "--model", "--out", "--prompts", "--reward", "--set",
                   "--thorough"],
        "sample": ["--allow-code", "--checkpoint", "--images", "--out", "--seed"],
        "evaluate": ["--allow-code", "--base", "--checkpoint", "--seed", "--split"],
        "export": ["--allow-code", "--checkpoint", "--dtype", "--out"],
        "chunks": ["--allow-code", "--out", "--prompts", "--recipe", "--rule", "--seeds", "--set"],
        "recipes": [],
        "methods": [],
        "serve-reward": ["--allow-code", "--host", "--idle", "--max-batch", "--max-megabytes",
                         "--max-pixels", "--option", "--port", "--timeout", "--token"],
        "config": ["--allow-code", "--schema", "--set"],
        "estimate": ["--allow-code", "--chunks", "--gpus", "--price", "--set", "--utilisation"],
        "plan": ["--allow-code", "--chunks", "--gpus", "--price", "--set", "--utilisation"],
    }  # fmt: skip


def test_every_flag_of_the_embedded_world_is_known() -> None:
    import typer.main

    world = typer.main.get_command(app).commands["shapes"]  # type: ignore[attr-defined]
    flags = {
        name: sorted(o for p in command.params for o in p.opts if o.startswith("--"))
        for name, command in world.commands.items()
    }
    assert flags == {
        "pretrain": ["--guidance-steps", "--out", "--scenes", "--seed", "--transformer-steps",
                     "--vae-steps"],
        "train-clip": ["--out", "--seed", "--steps"],
    }  # fmt: skip


def test_known_keys_and_errors() -> None:
    keys = {key.name for key in every_key()}
    assert "sampling.steps" in keys and "evaluation.reward.name" in keys
    with pytest.raises(ConfigError, match="optimizer"):
        parse_config({"optimiser": {}})


def test_help_answers_at_once() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "chunkgrpo", "--help"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    code = (
        "import sys; from chunkgrpo import cli; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'diffusers', 'pydantic')))"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert time.perf_counter() - started < 30  # a hang, not a speed


def test_quickstart_runs_as_printed_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    root = Path(__file__).resolve().parents[2]
    code = (root / "examples" / "quickstart.py").read_text()
    body = code.split('"""\n\n', 1)[1]
    assert body.strip() in (root / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    short = code.replace("range(40)", "range(2)").replace("pipeline_path()", repr(str(small_model)))
    torch.manual_seed(0)
    exec(compile(short, "quickstart.py", "exec"), {"__name__": "quickstart"})
    assert (tmp_path / "runs/quickstart/pytorch_lora_weights.safetensors").is_file()


def test_pretraining_takes_the_shipped_settings_unless_told(tmp_path, monkeypatch):
    from chunkgrpo.shapes import pretrain as package

    seen: list[package.PretrainSettings] = []

    def remember(out: Path, settings: package.PretrainSettings) -> Path:
        seen.append(settings)
        return out / "pipeline"

    monkeypatch.setattr(package, "pretrain", remember)
    text = call("shapes", "pretrain", "--out", str(tmp_path))
    assert str(tmp_path / "pipeline") in "".join(text.split("\n"))
    call("shapes", "pretrain", "--out", str(tmp_path), "--scenes", "200", "--guidance-steps", "0")
    shipped = package.PretrainSettings()
    assert seen[0] == shipped
    assert (seen[1].num_scenes, seen[1].guidance_steps) == (200, 0)
    assert seen[1].transformer_steps == shipped.transformer_steps
    shown = call("shapes", "pretrain", "--help")
    for number in (shipped.num_scenes, shipped.vae_steps, shipped.transformer_steps):
        assert str(number) in shown


@pytest.mark.parametrize("reward", ["clip", "jpeg_compressibility"])
def test_rewards_that_are_no_shares_run_to_their_report(
    reward: str, small_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    text = call(
        "train", "--reward", reward, "--out", str(folder), *SMALL, "--set", "iterations=2",
        "--set", f"model.path={small_model}", "--set", "evaluation.every=1",
    )  # fmt: skip
    assert f"{reward} score on 12 held-out prompts" in " ".join(text.split())
    assert "%" not in text.split("score on 12")[1].split("Image health")[0].replace("95 %", "")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [record["rewards"][reward] for record in records]
    summary = json.loads((folder / "summary.json").read_text())
    assert len(scores) == 2 and not summary["share"]
    for value in (*scores, *(r["accuracy"] for r in records), summary["base"], summary["tuned"]):
        assert -1 < value < 1 if reward == "clip" else value < -0.5
    assert all(record["accuracy_low"] < record["accuracy"] for record in records)


def test_prompts_that_a_reward_can_not_score_are_refused_before_anything_is_drawn(
    small_model: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("a red star\na lighthouse at dusk\n")
    given = ["--model", str(small_model), "--prompts", str(listed), "--out", str(tmp_path / "run")]
    for reward, says in [
        ("clip", "'lighthouse', 'at', 'dusk' of the prompt 'a lighthouse at dusk'"),
        ("shapes", "the prompt 'a lighthouse at dusk' is not one of the embedded world's"),
    ]:
        assert says in call("train", *given, "--reward", reward, code=2)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_compares_images_can_not_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "comparing.py").write_text(
        "def rank(images, prompts, group_size): ...\nrank.groupwise = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ("train", "--reward", "comparing:rank", "--out", str(tmp_path / "run"))
    assert "start with --allow-code" in call(*arguments, code=2)
    text = call(*arguments, "--allow-code", code=2)
    assert "reward 'rank' compares the images of a group" in text
    assert "evaluation.reward.name" in text


def test_a_model_prompts_and_a_reward_are_enough(small_model: Path, tmp_path: Path) -> None:
    """Everything else comes from the recipe of the published settings."""
    listed = tmp_path / "prompts.txt"
    listed.write_text("a red star\ntwo circles\na blue cross\n")
    text = call(
        "train", "--model", str(small_model), "--prompts", str(listed), "--reward", "brightness",
        "--out", str(tmp_path / "run"), *SMALL[:6], "--set", "sampling.steps=5",
        "--set", "objective.plan=equal", "--set", "objective.plan.size=2",
        "--set", "model.max_sequence_length=1",
    )  # fmt: skip
    assert "brightness score on 3 held-out prompts" in " ".join(text.split())
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["name"] == "paper" and config["model"]["adaptation"]["kind"] == "lora"
    assert config["model"]["gradient_checkpointing"]  # without it FLUX.1-dev fits no GPU
    assert [reward["name"] for reward in config["rewards"]] == ["brightness"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward_mean"] for line in lines]
    assert len(rewards) == 3 and all(0 < reward < 1 for reward in rewards)
    call("train", "--resume", str(tmp_path / "run"), "--reward", "shapes", code=2)
