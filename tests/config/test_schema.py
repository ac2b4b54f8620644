# SPDX-License-Identifier: Apache-2.0
"""The tree of settings: every key described, read by something, and known to editors."""

import functools
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from chunkgrpo import prompts
from chunkgrpo.config import ConfigError, load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.config.describe import json_schema, undescribed
from chunkgrpo.config.files import Assignment
from chunkgrpo.config.keys import every_key
from chunkgrpo.policies import loading
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.recipes import FOLDER, FOLDERS, SCHEMA_LINE


def test_every_key_has_a_description():
    assert undescribed() == []


def test_descriptions_are_sentences():
    short = [key.name for key in every_key() if not key.description.rstrip().endswith((".", ":"))]
    assert short == []


# --- any change shows ---------------------------------------------------------------------------

ELSEWHERE = {
    "name": "names the run's folder, outside of what is trained",
    "threads": "is a setting of torch",
    "doctor.skip": "is read before the trainer runs, tests/doctor",
    "doctor.thorough": "is read before the trainer runs, tests/doctor",
}
"""Settings that are not in the trainer, and where they are."""

# Another value for each setting, where adding to a number or turning a switch does not give one.
OTHERS = {
    "model.path": "elsewhere", "model.device": "cuda", "model.precision": "fp32",
    "model.text_encoder_precision": "bf16", "model.offload": ["vae"],
    "model.attention_backend": "native", "model.timestep": "floor1000",
    "model.options": {"true_cfg": 2.0}, "model.embedding_cache": "somewhere",
    "model.negative_prompt": "blurry", "model.max_sequence_length": 7,
    "model.adaptation.targets": ["norm1"], "model.adaptation.alpha": 3.0,
    "model.compile.backend": "eager",
    "prompts.train": "PROMPTS", "prompts.held_out": "PROMPTS", "prompts.tasks": ["position"],
    "evaluation.tasks": ["position"],
    "rewards": [{"name": "brightness"}], "watched_rewards": [{"name": "jpeg_compressibility"}],
    "evaluation.reward.name": "brightness", "evaluation.reward.options": {"mode": "soft"},
    "scoring.combine": "advantage", "scoring.on_error": "drop",
    "sampling.steps": 11, "sampling.prefix": "sde", "sampling.store.place": "host",
    "sampling.store.dtype": "bfloat16",
    "credit.convention": "flow_grpo", "credit.assign": "gain", "credit.keep": 0.7,
    "credit.project_out": [],
    "objective.ratio": "guard", "objective.inner_weights": "equal_kappa",
    "objective.anchor": "replay", "objective.mode": "sum_first", "objective.old": "nft2",
    "objective.average": "nft1", "objective.plan.sizes": [2, 1], "objective.plan.difference":
    "central", "objective.plan.distance": "l2", "objective.plan.num_chunks": 2,
    "objective.plan.explained": 0.5, "objective.selection.indices": [1],
    "objective.selection.usefulness": "reward", "objective.window.decay": "linear",
    "objective.window.rate": 0.2, "objective.window.after": 3, "objective.window.high": 6,
    "objective.window.indices": [0], "objective.outer_weights.sizes": [2, 1],
    "sampling.merge.sizes": [2, 1, 1, 1, 1, 1, 1, 1, 1],
    "optimizer.name": "adamw8bit", "optimizer.betas": [0.8, 0.9], "optimizer.fall": 0.5,
    "ema.decay": 0.5, "objective.times.fraction": 0.25, "objective.times.sizes": [4],
    "objective.times.numbers": [3],
    "objective.selection.fraction": 0.25,
    "sampling.transition.eta": 0.6, "sampling.tail.fraction": 0.9,
    "objective.selection.floor": 0.3, "objective.selection.decay": 0.3,
    "sampling.merge.least": 0.7, "objective.trust.path": "smooth_trust:other",
    "objective.trust.options": {"threshold": 0.5}, "objective.trust.low": 2e-3,
    "objective.log_prob.power": 0.5,
}  # fmt: skip

# What must be chosen for a key to exist, or to be read.
PREPARED = {
    "lora": ["model.adaptation=lora"],
    "full": ["model.adaptation=full"],
    "blocks": ["model.compile=blocks", "model.precision=bf16"],
    "explicit": ["objective.plan={kind: explicit, sizes: [1, 2]}"],
    "equal": ["objective.plan=equal", "objective.plan.size=1", "objective.selection=uniform"],
    "adaptive": ["objective.plan=adaptive", "objective.selection=uniform"],
    "optimal": ["objective.plan={kind: optimal, min_size: 1}", "objective.selection=uniform"],
    "uniform": ["objective.selection=uniform"],
    "weighted": ["objective.selection=weighted"],
    "listed": ["objective.selection={kind: listed, indices: [0]}"],
    "learned": ["objective.selection=learned", "objective.kl=none"],
    "fixed": ["objective.window={kind: fixed, start: 3, size: 3}"],
    "random": ["objective.window={kind: random, size: 3}"],
    "sliding": ["objective.window={kind: sliding, size: 3}"],
    "chunk": ["objective.window=chunk", "objective.plan=equal", "objective.plan.size=3",
              "objective.selection=uniform"],
    "implicit": ["objective.plan=steps", "objective.selection=uniform",
                 "objective.outer_weights={kind: implicit, sizes: [1, 2]}"],
    "clip": ["objective.trust={kind: clip, low: 1e-3, high: 1e-3}"],
    "kl_mask": ["objective.trust=kl_mask"],
    "imported": ["objective.trust={kind: imported, path: 'smooth_trust:one'}"],
    "transition": ["objective.kl={kind: transition, weight: 0.1}"],
    "rate": ["objective.kl={kind: rate, weight: 0.1}"],
    "shifted": ["sampling.schedule=shifted"],
    "sizes": ["sampling.merge={kind: sizes, sizes: [1, 1, 1, 1, 1, 1, 1, 1, 2]}"],
    "entropy": ["sampling.merge={kind: entropy, least: 0.1}", "objective.window=all",
                "sampling.tail=euler", "objective.plan=whole", "objective.selection=uniform"],
    "flow": ["sampling.transition=flow"],
    "dance": ["sampling.transition=dance"],
    "cps": ["sampling.transition=cps"],
    "dpm": ["sampling.tail=dpm"],
    "ghuber": ["objective.log_prob=ghuber"],
    "shuffled": ["objective.times=shuffled"],
    "stratified": ["objective.times=stratified"],
    "chunks": ["objective.times=chunks"],
}  # fmt: skip
EXTRA = {
    "objective.window.rate": ["objective.window.decay=exponential", "objective.window.after=3"],
    "objective.window.after": ["objective.window.decay=exponential", "objective.window.after=2"],
    "model.height": ["model.height=64", "model.width=64"],
    "model.width": ["model.height=64", "model.width=64"],
}
OWN_PROMPTS = ("prompts.train", "prompts.held_out", "prompts.column")
"""Settings that are tried with prompts that the embedded world's verifier does not know."""
RECIPE_OF = {"diffusion_nft": "diffusion-nft", "awm": "awm"}


def fingerprint(value, depth=0):
    """Everything a built run is made of, as nested tuples that can be compared."""
    assert depth < 12
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.detach().flatten().tolist())
    if isinstance(value, dict):
        return tuple((str(k), fingerprint(v, depth + 1)) for k, v in value.items())
    if isinstance(value, list | tuple | range):
        return tuple(fingerprint(each, depth + 1) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        inner = {each.name: getattr(value, each.name) for each in fields(value)}
        return (type(value).__name__, fingerprint(inner, depth + 1))
    if isinstance(value, BaseModel):
        return (type(value).__name__, fingerprint(dict(value), depth + 1))
    if isinstance(value, str | int | float | bool | type(None) | Path):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if callable(value) and not hasattr(value, "__dict__"):
        return repr(value)
    if type(value).__module__.startswith(("chunkgrpo", "tests", "smooth")):
        known = vars(value) if hasattr(value, "__dict__") else {}
        return (type(value).__name__, fingerprint(
            {k: v for k, v in known.items() if not k.startswith("_")}, depth + 1))  # fmt: skip
    return type(value).__name__


SHAPES = functools.cache(prompts.shapes_prompts)


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Return what builds a run without a model, and lists everything it is made of."""
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"text": f"a {i}", "other": f"b {i}"}) + "\n" for i in range(4))
    )
    loaded = {}

    def load_policy(model, adaptation, device, embedding_cache=None, **options):
        loaded.update(
            model=str(model), adaptation=adaptation, device=device, cache=embedding_cache, **options
        )
        policy = GaussianPolicy(torch.zeros(3))
        policy.native_sigmas = lambda steps: torch.linspace(1, 0, steps + 1)
        return policy

    monkeypatch.setattr(loading, "load_policy", load_policy)
    monkeypatch.setattr(prompts, "shapes_prompts", SHAPES)

    def build(recipe, assignments):
        file = str(tmp_path / "prompts.jsonl")
        changed = []
        for each in assignments:
            each = Assignment.parse(each) if isinstance(each, str) else each
            value = file if each.value == "PROMPTS" else each.value
            changed.append(Assignment(each.key, value, "test"))
        config = load_config(recipe, changed)
        loaded.clear()
        trainer = build_trainer(config, tmp_path / "run")
        parts = {each.name: getattr(trainer, each.name) for each in fields(trainer)}
        parts.pop("policy")
        parts["final"] = (
            config.evaluation.final_prompts, config.evaluation.final_seeds, config.evaluation.seed
        )  # fmt: skip
        return fingerprint(parts | {"loaded": dict(loaded)})

    return build


LEAVES = [key for key in every_key() if key.name not in ELSEWHERE and ".0." not in key.name]
LEAVES = [
    key for key in LEAVES
    if not any(other.name.startswith(key.name + ".") for other in every_key())
    and not key.name.endswith(".kind")
]  # fmt: skip


def other_value(key, value):
    if key.name in OTHERS:
        return OTHERS[key.name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 if value else 0.1
    raise AssertionError(f"give {key.name} (now {value!r}) another value in OTHERS")


def value_at(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("key", LEAVES, ids=lambda key: f"{key.name}-{key.kind}")
def test_changing_any_setting_changes_the_run_or_is_refused(key, built, tmp_path):
    section = key.name.split(".")[0]
    top = key.kind if key.kind in RECIPE_OF and section == "objective" else None
    if key.name.startswith(("objective.log_prob", "objective.times")):
        top = "awm"
    recipe = RECIPE_OF.get(top, "demo")
    prepared = [*PREPARED.get(key.kind or "", []), *EXTRA.get(key.name, [])]
    prepared = [each for each in prepared if not (recipe != "demo" and "selection" in each)]
    if key.name in OWN_PROMPTS:
        prepared += ["rewards=[{name: jpeg_compressibility}]",
                     "evaluation.reward={name: brightness, options: {name: judge}}"]  # fmt: skip
        prepared += ["prompts.train=PROMPTS"] if key.name == "prompts.column" else []
    changes = [Assignment.parse(each) for each in prepared]
    try:
        plain = [a for a in changes if a.value != "PROMPTS"]
        before = value_at(load_config(recipe, plain), key.name)
        first = built(recipe, changes)
    except ConfigError as error:
        raise AssertionError(f"{key.name} cannot be prepared: {error}") from error
    value = "other" if key.name == "prompts.column" else other_value(key, before)
    try:
        second = built(recipe, [*changes, Assignment(key.name, value, "test")])
    except (ConfigError, ValueError, ImportError) as error:
        assert str(error)  # refused, with a reason
        return
    assert first != second, f"{key.name}: {before!r} -> {value!r} changes nothing"


# --- for editors --------------------------------------------------------------------------------


def test_the_shipped_schema_is_the_present_one():
    shipped = json.loads((FOLDER / "schema.json").read_text())
    assert shipped == json_schema(), "chunkgrpo config --schema > src/chunkgrpo/recipes/schema.json"


def test_every_recipe_names_the_schema():
    for folder in FOLDERS.values():
        for path in folder.glob("*.yaml"):
            first = path.read_text().splitlines()[0]
            assert first.startswith(SCHEMA_LINE)
            named = (path.parent / first.split("$schema=")[1]).resolve()
            assert named == (FOLDER / "schema.json").resolve()


def test_the_schema_accepts_every_recipe():
    jsonschema = pytest.importorskip("jsonschema")
    import yaml

    schema = json_schema()
    for folder in FOLDERS.values():
        for path in folder.glob("*.yaml"):
            jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"objective": {"kind": "chunk_grpo", "plan": "stepz"}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"optimizer": {"learningrate": 1.0}}, schema)
