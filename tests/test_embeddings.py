# SPDX-License-Identifier: Apache-2.0
"""Encoded prompts on disk: the same bits without text encoders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import tiny_pipelines
from chunkgrpo.config import Config, parse_config
from chunkgrpo.config.build import embedding_folder
from chunkgrpo.policies.architecture import read_architecture
from chunkgrpo.policies.embeddings import EmbeddingCache, model_identity, text_encoder_names
from chunkgrpo.policies.loading import family, load_policy
from chunkgrpo.policies.pipeline import Adaptation
from chunkgrpo.runs import encode_ahead, train_run
from chunkgrpo.types import Conditioning

PROMPTS = ["a red star", "two circles", "a cross"]
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def load(path, cache=None, **options):
    options = {"precision": "fp32", "max_sequence_length": 4, "guidance": 4.0} | options
    adaptation = options.pop("adaptation", Adaptation(rank=4, alpha=4.0))
    return load_policy(path, adaptation, embedding_cache=cache, **options)


def equal(a: Conditioning | None, b: Conditioning) -> bool:
    assert a is not None
    assert set(a.tensors) == set(b.tensors)
    return all(torch.equal(t, b.tensors[n]) and t.dtype == b.tensors[n].dtype
               for n, t in a.tensors.items())  # fmt: skip


@pytest.fixture
def loads(monkeypatch):
    """Names of the text encoders that are read from disk, in order."""
    from transformers import PreTrainedModel

    found = []
    original = PreTrainedModel.from_pretrained.__func__

    def counted(cls, path, *args, **kwargs):
        found.append(str(path).rstrip("/").rpartition("/")[2])
        return original(cls, path, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    return found


def test_cold_and_warm_starts_give_the_same_bits(tiny_pipeline_path, tmp_path, loads):
    plain = load(tiny_pipeline_path)
    assert sorted(loads) == sorted(ENCODERS)
    loads.clear()

    cold = load(tiny_pipeline_path, tmp_path)
    assert not loads and all(getattr(cold.pipe, name) is None for name in ENCODERS)
    first = cold.encode([*PROMPTS, PROMPTS[0]])
    assert sorted(loads) == sorted(ENCODERS)  # once, for three prompts
    assert equal(first, plain.encode([*PROMPTS, PROMPTS[0]]))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    loads.clear()

    warm = load(tiny_pipeline_path, tmp_path)
    assert equal(warm.encode([*PROMPTS, PROMPTS[0]]), first)
    assert not loads and all(getattr(warm.pipe, name) is None for name in ENCODERS)
    warm.encode(["a new prompt"])
    assert sorted(loads) == sorted(ENCODERS)


def test_the_text_encoders_are_called_once_a_prompt(tiny_pipeline_path, tmp_path):
    policy = load(tiny_pipeline_path, tmp_path, guidance=1.0)
    policy.encode(PROMPTS[:1])
    calls = []
    for name in ENCODERS:
        getattr(policy.pipe, name).register_forward_hook(lambda *_: calls.append(1))
    policy.encode(PROMPTS[:1])
    assert not calls
    policy.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert len(calls) == 3  # one each encoder


def test_a_run_says_what_it_encoded_and_what_it_found(tiny_pipeline_path, tmp_path):
    said = []

    def on_phase(text):
        said.append(text)
        return lambda done, total: said.append((done, total))

    for texts in (PROMPTS[:2], PROMPTS, PROMPTS):
        policy = load(tiny_pipeline_path, tmp_path)
        encode_ahead(policy, [*texts, texts[0]], on_phase)
        assert not policy.has_text_encoders
    folder = policy.embeddings.folder
    assert said == [
        f"encoding 2 prompts into {folder}", (1, 2), (2, 2),
        f"encoding 1 prompt into {folder}, 2 are there", (1, 1),
        f"found 3 encoded prompts in {folder}, text encoders not loaded", (3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("cached", [True, False])
def test_released_text_encoders_leave_what_was_encoded(tiny_pipeline_path, tmp_path, cached):
    policy = load(tiny_pipeline_path, tmp_path if cached else None)
    before = policy.encode(PROMPTS)
    policy.release_text_encoders()
    assert all(getattr(policy.pipe, name) is None for name in ENCODERS)
    assert equal(policy.encode(PROMPTS), before)
    with pytest.raises(ValueError, match="'a new prompt' is not encoded, and the text encoders"):
        policy.encode([PROMPTS[0], "a new prompt"])


def test_settings_and_models_do_not_share_rows(tiny_pipeline_path, tmp_path):
    from safetensors.torch import load_file, save_file

    def folder(path=tiny_pipeline_path, **options):
        embeddings = load(path, tmp_path / "cache", **options).embeddings
        assert embeddings is not None
        return embeddings.folder

    first = folder()
    assert folder() == first
    assert folder(guidance=1.0) != first
    assert folder(max_sequence_length=5) != first
    assert folder(adaptation=Adaptation("full")) == first  # the text encoders are not trained
    copy = tmp_path / "copy"
    shutil.copytree(tiny_pipeline_path, copy)
    assert folder(copy) == first
    weights = copy / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, weights, {"format": "pt"})
    assert folder(copy) != first
    policy = load(tiny_pipeline_path, tmp_path / "cache")
    policy.encode(PROMPTS[:1])
    noted = json.loads((policy.embeddings.folder / "identity.json").read_text())
    assert noted["settings"] == {
        "guidance": 4.0, "guided": True, "negative_prompt": "", "max_sequence_length": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("build", "options", "key", "values"),
    [
        (tiny_pipelines.lumina2, {"size": (32, 32)}, "system_prompt", ["Describe", "Generate"]),
        (tiny_pipelines.sana, {"size": (32, 32)}, "instruction", [False, True]),
        (
            tiny_pipelines.flux2_klein,
            {"size": (16, 16), "max_sequence_length": 32},
            "text_encoder_out_layers",
            [(1, 2, 3), (3, 2, 1)],
        ),
    ],
    ids=["lumina2", "sana", "flux2_klein"],
)
def test_what_a_family_puts_before_prompts_tells_rows_apart(build, options, key, values, tmp_path):
    """Two values over one cache, cold and warm: each finds its own rows, as without a cache."""
    build().save_pretrained(tmp_path / "pipeline")

    def encode(value, cache):
        given = {"guidance": 1.0, "max_sequence_length": 300, **options, key: value}
        policy = load(tmp_path / "pipeline", cache, **given)
        return policy.encode(PROMPTS[:1]), policy.has_text_encoders

    plain = [encode(value, None)[0] for value in values]
    assert not equal(*plain)
    for loaded in (True, False):
        for value, expected in zip(values, plain, strict=True):
            found, has_text_encoders = encode(value, tmp_path / "cache")
            assert equal(found, expected)
            assert has_text_encoders == loaded


@pytest.fixture
def hub(tiny_pipeline_path, tmp_path, monkeypatch):
    """A hub whose one model, ``owner/name``, lies in a local folder; asks for files are noted."""
    snapshot = tmp_path / "snapshots" / "0a1b2c"
    shutil.copytree(tiny_pipeline_path, snapshot)
    asked = []

    def snapshot_download(model, allow_patterns=None, **_):
        asked.append((model, allow_patterns))
        return str(snapshot)

    def hf_hub_download(model, file, **_):
        asked.append((model, file))
        return str(snapshot / file)

    def load_config(model, **_):
        asked.append((model, "model_index.json"))
        return json.loads((snapshot / "model_index.json").read_text())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", load_config)
    return asked


def test_a_hub_model_is_known_by_its_commit_and_fetches_one_small_file(hub):
    assert model_identity("owner/name") == "owner/name@0a1b2c"
    assert hub == [("owner/name", ["model_index.json"])]


def test_a_hub_models_configurations_are_all_that_a_plan_fetches(hub, tiny_pipeline_path):
    assert read_architecture("owner/name") == read_architecture(tiny_pipeline_path)
    assert {model for model, _ in hub} == {"owner/name"}
    assert {file for _, file in hub} == {
        "model_index.json", "transformer/config.json", "vae/config.json",
        *(f"{encoder}/config.json" for encoder in ENCODERS),
    }  # fmt: skip
    assert family("owner/name") == ("chunkgrpo.policies.sd3", "StableDiffusion3Policy")


def test_large_files_are_told_apart_by_samples(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "model.safetensors"
    seen = set()
    for position in (None, 0, 1 << 20, (3 << 20) - 1):
        data = bytearray(3 << 20)
        if position is not None:
            data[position] = 1
        file.write_bytes(data)
        seen.add(model_identity(tmp_path))
    # The first, the last and one sampled byte; what lies between samples is not looked at.
    assert len(seen) >= 3


def test_a_row_comes_back_as_it_was(tmp_path):
    cache = EmbeddingCache(tmp_path, {"model": "m"})
    shared = torch.randn(1, 3, 4)
    row = Conditioning(
        {
            "half": shared.to(torch.bfloat16),
            "whole": shared,
            "view": shared[:, :2],
            "expanded": torch.randn(1, 1, 4).expand(1, 3, 4),
            "mask": torch.ones(1, 3).bool(),
        }
    )
    assert cache.load("größer\n") is None and "größer\n" not in cache
    cache.save("größer\n", row)
    assert "größer\n" in cache and equal(cache.load("größer\n"), row)
    assert cache.load("other") is None
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_file_is_encoded_again(tiny_pipeline_path, tmp_path):
    policy = load(tiny_pipeline_path, tmp_path)
    first = policy.encode(PROMPTS[:1])
    path = policy.embeddings.path_of(PROMPTS[0])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert equal(policy.encode(PROMPTS[:1]), first)
    assert path.read_bytes() == whole


def test_text_encoders_are_found_by_name():
    index = {
        "_class_name": "X", "text_encoder": ["transformers", "A"], "text_encoder_2": [None, None],
        "text_encoder_layers": 3, "tokenizer": ["transformers", "B"],
    }  # fmt: skip
    assert text_encoder_names(index) == ("text_encoder",)


def test_a_pipeline_from_nowhere_can_not_be_cached(tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="save the pipeline and load it"):
        tiny_policy().use_embeddings(tmp_path)


def test_where_the_cache_lies(tmp_path, monkeypatch):
    def folder(**model):
        return embedding_folder(parse_config({"model": model}).model)

    monkeypatch.setenv("CHUNKGRPO_CACHE", str(tmp_path))
    assert folder(path="owner/name") == tmp_path / "embeddings"
    assert folder(path="shapes") is None
    assert folder(path="owner/name", embedding_cache=None) is None
    assert folder(path="shapes", embedding_cache="/a/b").as_posix() == "/a/b"
    monkeypatch.delenv("CHUNKGRPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder(path="owner/name") == tmp_path / "xdg" / "chunkgrpo" / "embeddings"


def run_config(model, prompts, cache) -> Config:
    reward = {"name": "test_embeddings:brightness"}
    return parse_config(
        {
            "iterations": 2,
            "model": {
                "path": str(model),
                "adaptation": "full",
                "max_sequence_length": 4,
                "precision": "fp32",
                "embedding_cache": None if cache is None else str(cache),
            },
            "prompts": {"train": str(prompts), "held_out": str(prompts)},
            "rewards": [reward],
            "sampling": {"steps": 3, "prompts": 2, "group_size": 2},
            "objective": {"plan": "whole"},
            "evaluation": {
                "every": 1, "prompts": 2, "final_prompts": 3, "final_seeds": 1, "reward": reward,
            },
        }
    )  # fmt: skip


def brightness(images, prompts):
    return images.flatten(1).mean(1)


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_the_cache(
    tiny_pipeline_path, tmp_path, loads, monkeypatch
):
    """Cold, warm and uncached; a full fine-tune still saves a whole pipeline."""
    monkeypatch.syspath_prepend(str(__file__).rpartition("/")[0])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na cross\ntwo circles\na red star\ntwo squares\n")
    summaries, phases = [], []
    for name, cache in (("plain", None), ("cold", "cache"), ("warm", "cache")):
        loads.clear()
        config = run_config(tiny_pipeline_path, prompts, cache and tmp_path / cache)

        def phase(text, name=name):
            phases.append((name, text))
            return lambda done, total: None

        train_run(config, tmp_path / name, lambda record: None, phase)
        summaries.append((tmp_path / name / "metrics.jsonl").read_text())
        # Once to encode, once to be saved with the pipeline.
        times = {"plain": 1, "cold": 2, "warm": 1}[name]
        assert sorted(loads) == sorted(ENCODERS * times), name
    # One line says what was done about prompts; nothing where there is no cache.
    said = [(name, text) for name, text in phases if " prompts in" in text]
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert said == [
        ("cold", f"encoding 5 prompts into {folder}"),
        ("warm", f"found 5 encoded prompts in {folder}, text encoders not loaded"),
    ]

    def values(text):
        rows = [json.loads(line) for line in text.splitlines()]
        return [[r["reward_mean"], r["loss"], r["grad_norm"], r["accuracy"]] for r in rows]

    assert values(summaries[0]) == values(summaries[1]) == values(summaries[2])
    from diffusers import DiffusionPipeline

    for name in ("plain", "cold", "warm"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name / "model")
        assert all(getattr(pipe, encoder) is not None for encoder in ENCODERS)
