# SPDX-License-Identifier: Apache-2.0
"""Three iterations of every recipe on the embedded model, against figures kept beside this file.

They change when, and only when, a method, the shipped weights or their reward changes. To accept a
change on purpose, run

    python tests/golden/test_methods.py --write            # all recipes
    python tests/golden/test_methods.py --write demo awm   # these alone

and look at the difference before committing it. Without ``--write`` it prints what it found.

Each optimizer step pins its loss, the gradient's norm and the mean absolute log-ratio; each
iteration the mean reward, how far the weights have moved, what was trained and how much of it was
cut. All runs on one thread of a CPU. Learning rate and trust regions are set so that the regions
bind in the second update: a method that differs in them alone shows.

Processors add in another order, and training amplifies the difference: AdamW's first steps follow
the sign of every gradient, however small, and a verifier's verdict may flip with one pixel. In
float32, with that reward, nine of 29 recipes left a tolerance of a thousandth from one processor
to another. So networks compute in float64, which processors agree on once it is rounded to
float32, and the reward has no jumps (``smooth_reward``): with AVX2 and with AVX-512 figures and
losses then agree to about 1e-5. A changed method changes them by more than a hundredth. Counts and
shares of pairs are exact.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from chunkgrpo.algorithms.awm import AWM
from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.nft import DiffusionNFT
from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.config.files import Assignment
from chunkgrpo.policies import loading
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.recipes import method_names, recipe_names
from chunkgrpo.shapes import pipeline_path

KEPT = Path(__file__).with_name("methods.json")
NAMES = [*recipe_names(), *method_names()]
COMMAND = "python tests/golden/test_methods.py --write"

SMALL = {
    "iterations": 3,
    "threads": 1,
    "model.device": "cpu",
    "model.precision": "fp32",
    "sampling.prompts": 2,
    "sampling.group_size": 4,
    "evaluation.every": 0,
    "optimizer.learning_rate": 1e-3,
    "rewards": [{"name": "smooth_reward:smooth"}],
}
"""What makes a recipe small, and its policy move far in one update."""

# Among the chunks' log-ratios of the second update, so that the widths matter, each side's own.
CLIP = {"low": 2e-3, "high": 3e-3}
# What these are multiplied with where ratios have another scale: windows leave few pairs, often
# of noisy steps, and a whole trajectory averages; guarded ratios and those of squared errors are
# log-ratios times a standard deviation or two variances.
FEW, FORMS = 0.05, {"guard": 0.1, "squared_error": 0.3}
# And where long or early chunks, or a LoRA, move less in one update.
MILD = {"paper": 0.002, "chunk-grpo-adaptive": 0.02, "chunk-grpo-weighted": 0.1}
KL_THRESHOLD = 1e-6

COUNTS = ("trained_pairs", "idle_pairs", "rollout_evaluations", "chunks", "window", "clip_fraction")

RELATIVE = 1e-3
LOSS = 1e-4


def settings_of(name):
    """Return the changes that make a recipe small and let its trust region bind."""
    config, changes = load_config(name), dict(SMALL)
    objective = config.objective
    if objective.kind != "chunk_grpo":
        pass
    elif objective.trust.kind == "clip":
        few = objective.window.kind != "all" or objective.plan.kind == "whole"
        scale = (FEW if few else 1) * FORMS.get(objective.ratio, 1) * MILD.get(name, 1)
        changes |= {f"objective.trust.{side}": width * scale for side, width in CLIP.items()}
    elif objective.trust.kind == "kl_mask":
        changes["objective.trust.threshold"] = KL_THRESHOLD
    return [Assignment(key, value, "golden figures") for key, value in changes.items()]


def watched(losses, updates):
    """Wrap an algorithm's ``losses``: note every update's loss and mean absolute log-ratio."""

    def wrapped(self, policy, experience, generator):
        value, ratios = 0.0, []
        for part in losses(self, policy, experience, generator):
            value += float(part.loss.detach())
            if "log_ratio" in part.diagnostics:
                ratios.append(part.diagnostics["log_ratio"].detach().abs().flatten())
            if part.ends_update:
                updates.append({"loss": value})
                if ratios:
                    updates[-1]["log_ratio"] = float(torch.cat(ratios).mean())
                value, ratios = 0.0, []
            yield part

    return wrapped


def in_float64(value):
    """Cast tensors of floating-point numbers up, also within lists."""
    if isinstance(value, list):
        return [in_float64(each) for each in value]
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def compute_in_float64(patch):
    """Let networks compute in float64, so that processors agree on what is rounded to float32."""
    load, network = loading.load_pipeline, PipelinePolicy.network

    def load_in_float64(*args, **kwargs):
        pipe = load(*args, **kwargs)
        pipe.transformer.double()
        pipe.vae.double()
        return pipe

    def network_in_float64(self, **inputs):
        return network(self, **{name: in_float64(value) for name, value in inputs.items()})

    patch.setattr(loading, "load_pipeline", load_in_float64)
    patch.setattr(PipelinePolicy, "network", network_in_float64)


def run(name, folder, patch):
    """Train a recipe; return one record an iteration. ``patch`` is pytest's monkeypatch."""
    compute_in_float64(patch)
    threads = torch.get_num_threads()
    updates, records = [], []
    for kind in (ChunkGRPO, AWM, DiffusionNFT):
        patch.setattr(kind, "losses", watched(kind.losses, updates))
    trainer = build_trainer(load_config(name, settings_of(name)), folder)
    start = [p.detach().clone() for p in trainer.parameters]
    step = trainer.update

    def update(log):
        step(log)
        updates[-1]["grad_norm"] = float(log.norms[-1])

    def finished(record):
        moved = [
            (p.detach() - s).double().square().sum() for p, s in zip(trainer.parameters, start)
        ]
        figures = {key: record[key] for key in COUNTS if key in record}
        figures["reward_mean"] = record["reward_mean"]
        figures["moved"] = float(torch.stack(moved).sum().sqrt())
        records.append(figures | {"updates": list(updates)})
        updates.clear()

    trainer.update, trainer.on_iteration = update, finished
    trainer.run()
    torch.set_num_threads(threads)
    return records


def weights_digest():
    """Identify the shipped weights, which all figures depend on."""
    digest = hashlib.sha256()
    for path in sorted(pipeline_path().rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="module")
def kept():
    """Read the figures; refuse those of other weights with one line instead of many."""
    content = json.loads(KEPT.read_text())
    assert content.get("weights") == weights_digest(), f"figures of other weights: {COMMAND}"
    return content["recipes"]


@pytest.mark.parametrize("name", NAMES)
def test_three_iterations(name, kept, tmp_path, monkeypatch):
    assert name in kept, f"no figures of {name!r}: {COMMAND} {name}"
    records = run(name, tmp_path, monkeypatch)
    assert len(records) == len(kept[name]) == SMALL["iterations"]
    for record, expected in zip(records, kept[name], strict=True):
        for update, known in zip(record.pop("updates"), expected["updates"], strict=True):
            assert update.pop("loss") == pytest.approx(known["loss"], rel=0, abs=LOSS)
            known = {key: value for key, value in known.items() if key != "loss"}
            assert update == pytest.approx(known, rel=RELATIVE, abs=1e-7)
        for key in COUNTS:
            assert record.pop(key, None) == expected.get(key), key
        assert record == pytest.approx({key: expected[key] for key in record}, rel=RELATIVE)


def test_every_recipe_is_pinned(kept):
    assert sorted(kept) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_say_something(name, kept):
    """Each recipe learns from some iteration, and its trust region cuts some pairs and not all."""
    records, objective = kept[name], load_config(name).objective
    assert max(update["grad_norm"] for r in records for update in r["updates"]) > 1e-4
    assert records[-1]["moved"] > 0
    if objective.kind == "chunk_grpo" and objective.trust.kind != "none":
        assert 0 < max(record["clip_fraction"] for record in records) < 1


def test_no_two_recipes_have_the_same_figures(kept):
    """What tells two methods apart shows: the trust region of chunk-dppo from chunk-grpo's."""
    # Measured boundaries may turn out as those that are given.
    alike = {"chunk-grpo", "chunk-grpo-adaptive", "chunk-grpo-optimal"}
    norms = {
        name: torch.tensor([update["grad_norm"] for r in records for update in r["updates"]])
        for name, records in kept.items()
    }
    for first, second in itertools.combinations(sorted(norms), 2):
        a, b = norms[first], norms[second]
        if not {first, second} <= alike and a.shape == b.shape:
            apart = ((a - b).abs() / torch.maximum(a, b).clamp(min=1e-9)).max()
            assert apart > 10 * RELATIVE, (first, second)


def differences(before, after):
    """What changed, a line each: recipe, iteration, key, old -> new, relative change."""
    for name in sorted({*before, *after}):
        if name not in before or name not in after:
            yield f"{name}: {'new' if name in after else 'gone'}"
            continue
        if len(before[name]) != len(after[name]):
            yield f"{name}: {len(before[name])} -> {len(after[name])} iterations"
        for number, (old, new) in enumerate(zip(before[name], after[name], strict=False), 1):
            for key in sorted({*old, *new}):
                a, b = old.get(key), new.get(key)
                if a == b:
                    continue
                numbers = isinstance(a, int | float) and isinstance(b, int | float) and a
                more = f" ({(b - a) / abs(a):+.2e})" if numbers else ""
                yield f"{name}, iteration {number}, {key}: {a} -> {b}{more}"


def write(kept, before, yes):
    """Say what would change, ask, and write; without a terminal only where ``yes`` was given."""
    changed = list(differences(before, kept["recipes"]))
    print(*changed or ["nothing has changed"], sep="\n")
    if changed and not yes:
        if not sys.stdin.isatty():
            sys.exit("not written: look at the differences, then give --yes")
        if input(f"Write {len(changed)} changes to {KEPT.name}? [y/N] ").strip().lower() != "y":
            sys.exit("not written")
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def test_figures_are_written_after_a_look_at_what_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "KEPT", tmp_path / "kept.json")
    before = {"a": [{"loss": 2.0, "kl": None}], "b": [{"loss": 1.0}]}
    kept = {"weights": "w", "recipes": {"a": [{"loss": 1.0, "kl": None}], "c": [{"loss": 1.0}]}}
    told = ["a, iteration 1, loss: 2.0 -> 1.0 (-5.00e-01)", "b: gone", "c: new"]
    assert list(differences(before, kept["recipes"])) == told
    with pytest.raises(SystemExit, match="--yes"):  # no terminal
        write(kept, before, yes=False)
    assert capsys.readouterr().out.splitlines() == told
    assert not KEPT.exists()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "")
    with pytest.raises(SystemExit, match="not written"):
        write(kept, before, yes=False)
    assert not KEPT.exists()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    write(kept, before, yes=False)
    assert json.loads(KEPT.read_text()) == kept
    write({"weights": "w", "recipes": before}, kept["recipes"], yes=True)
    assert json.loads(KEPT.read_text())["recipes"] == before


def main():
    """Print or write the figures of some recipes, or of all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="those alone; all by default")
    parser.add_argument(
        "--write", action="store_true", help=f"keep them in {KEPT.name}, after a question"
    )
    parser.add_argument("--yes", action="store_true", help="answer the question with yes")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    digest, before = weights_digest(), json.loads(KEPT.read_text()) if KEPT.exists() else {}
    # Figures of other weights, or of recipes that are gone, are not carried along.
    found = before.get("recipes", {}) if before.get("weights") == digest else {}
    found = {name: records for name, records in found.items() if name in NAMES}
    for name in options.names or NAMES:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            found[name] = run(name, Path(folder), patch)
        if not options.write:
            print(name, json.dumps(found[name]))
    if options.write:
        kept = {"weights": digest, "recipes": dict(sorted(found.items()))}
        write(kept, before.get("recipes", {}), options.yes)


if __name__ == "__main__":
    sys.exit(main())
