# SPDX-License-Identifier: Apache-2.0
"""Types and places of frozen weights, kernels, decoding: what they change and what not."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

import tiny_pipelines
from chunkgrpo.config import ConfigError, parse_config
from chunkgrpo.config.build import build_execution, build_policy
from chunkgrpo.config.rules import check_training
from chunkgrpo.policies.execution import Execution, spare_decoder
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.policies.pipeline import Adaptation
from chunkgrpo.runs import encode_ahead
from chunkgrpo.runtime.offload import Offloaded

PROMPTS = ["a red star", "two circles"]
FLUX = {"precision": "fp32", "max_sequence_length": 8, "size": (16, 24)}


@pytest.fixture(scope="module")
def flux_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "pipeline"
    tiny_pipelines.flux().save_pretrained(folder)
    return folder


def load(path, execution=None, method="lora", targets=None, **options):
    adaptation = Adaptation(method, rank=4, alpha=4.0, targets=targets)
    options = {"precision": "fp32", "max_sequence_length": 4, **options}
    return load_policy(path, adaptation, execution=execution, **options)


def answers(policy):
    """A velocity of moved weights, the reference's, an image and a gradient."""
    x = torch.randn(2, *policy.latent_shape, generator=Generator().manual_seed(0))
    sigma, conditioning = torch.tensor([0.9, 0.3]), policy.encode(PROMPTS)
    with torch.no_grad():
        for index, parameter in enumerate(policy.parameters()):
            noise = torch.randn(parameter.shape, generator=Generator().manual_seed(index))
            parameter.add_(0.02 * noise)
        with policy.reference():
            reference = policy.velocity(x, sigma, conditioning)
    v = policy.velocity(x, sigma, conditioning)
    v.square().mean().backward()
    grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return [v.detach(), reference, policy.decode(x), torch.cat(grads)]


# --- which weights are trained ------------------------------------------------------------------


def test_full_fine_tuning_of_some_modules_leaves_the_others(tiny_pipeline_path):
    whole = load(tiny_pipeline_path, method="full")
    policy = load(tiny_pipeline_path, method="full", targets=("norm1", "norm_out.linear"))
    expected = [
        name
        for name, _ in policy.pipe.transformer.named_parameters()
        if ".norm1." in name or name.startswith("norm_out.linear.")
    ]
    trained = [n for n, p in policy.pipe.transformer.named_parameters() if p.requires_grad]
    assert trained == expected and 0 < len(trained) < len(whole.parameters())
    answers(policy)  # moves what is trained
    for (name, old), new in zip(
        whole.pipe.transformer.named_parameters(),
        policy.pipe.transformer.parameters(),
        strict=True,
    ):
        assert torch.equal(old, new) == (name not in expected)
    low = load(tiny_pipeline_path, method="full", targets=("norm1",), precision="bf16")
    assert {p.dtype for p in low.pipe.transformer.parameters()} == {torch.float32}  # all is saved
    with pytest.raises(ValueError, match="no module of the transformer is named 'norm'"):
        load(tiny_pipeline_path, method="full", targets=("norm",))


# --- offloading ---------------------------------------------------------------------------------


class Copied(Offloaded):
    """A device of its own: tensors that lie elsewhere than at home, and are counted."""

    def fetch(self, home):
        return home.clone()


@pytest.fixture
def copied(monkeypatch):
    monkeypatch.setattr("chunkgrpo.policies.pipeline.Offloaded", Copied)


def addresses(module):
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers())]


@pytest.mark.usefixtures("copied")
def test_offloaded_parts_are_away_except_while_they_work(tiny_pipeline_path):
    plain = answers(load(tiny_pipeline_path, method="full"))
    execution = Execution(offload=("text_encoders", "vae", "reference"))
    policy = load(tiny_pipeline_path, execution, method="full")
    encoders = [policy.pipe.text_encoder, policy.pipe.text_encoder_2, policy.pipe.text_encoder_3]
    parts = {"text_encoders": encoders, "vae": [policy.pipe.vae]}
    home = {name: [addresses(m) for m in members] for name, members in parts.items()}
    seen = []
    for name, members in parts.items():
        for module, at_home in zip(members, home[name], strict=True):

            def look(part, *_, name=name, at_home=at_home):
                seen.append(name)
                assert not set(addresses(part)) & set(at_home)

            target = module.decoder if name == "vae" else module
            target.register_forward_hook(look)
    found = answers(policy)
    assert set(seen) == {"text_encoders", "vae"}
    # Both prompts on one visit; a second call needs none.
    assert {name: part.visits for name, part in policy.offloaded.items()} == {
        "text_encoders": 1, "vae": 1,
    }  # fmt: skip
    policy.encode(PROMPTS)
    assert policy.offloaded["text_encoders"].visits == 1
    assert {n: [addresses(m) for m in members] for n, members in parts.items()} == home
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("copied")
def test_encoding_ahead_is_one_visit_and_releases(tiny_pipeline_path, tmp_path):
    policy = load(
        tiny_pipeline_path, Execution(offload=("text_encoders",)), embedding_cache=tmp_path
    )
    assert "text_encoders" not in policy.offloaded  # not even loaded
    visits = []

    def on_phase(text):
        return lambda done, total: visits.append(policy.offloaded["text_encoders"].visits)

    encode_ahead(policy, [*PROMPTS, "a cross"], on_phase)
    assert visits == [1, 1, 1] and not policy.offloaded
    assert len(policy.encode(PROMPTS)) == 2


def test_visits_may_be_nested_and_end_with_errors():
    module = torch.nn.Linear(2, 2).requires_grad_(False)
    before = module.weight.clone()
    part = Copied([module], torch.device("cpu"))
    at_home = addresses(module)
    with pytest.raises(RuntimeError, match="stop"), part.at_work():
        assert addresses(module) != at_home
        with part.at_work():
            pass
        assert addresses(module) != at_home
        raise RuntimeError("stop")
    assert addresses(module) == at_home and part.visits == 1
    assert torch.equal(module.weight, before)


def test_text_encoders_are_told_their_device(family_path, monkeypatch):
    """With parts in host memory a pipeline can no longer guess where it runs."""
    from diffusers import DiffusionPipeline

    path, options = family_path
    policy = load(path, **options)

    def guess(self):
        raise AssertionError("the pipeline guessed its device")

    monkeypatch.setattr(DiffusionPipeline, "_execution_device", property(guess))
    assert len(policy.encode(PROMPTS)) == 2


SHORT = {"max_sequence_length": 8}
FAMILIES = {
    "sd3": (tiny_pipelines.sd3, {"guidance": 4.0}),
    "flux": (tiny_pipelines.flux, SHORT | {"true_cfg": 3.0}),
    "qwen_image": (tiny_pipelines.qwen_image, SHORT | {"guidance": 4.0}),
    "z_image": (tiny_pipelines.z_image, {"max_sequence_length": 48, "guidance": 3.0}),
    "lumina2": (tiny_pipelines.lumina2, {"max_sequence_length": 64, "guidance": 4.0}),
    "sana": (tiny_pipelines.sana, SHORT | {"guidance": 4.0, "instruction": False}),
    "flux2_klein": (
        tiny_pipelines.flux2_klein,
        {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3), "guidance": 4.0},
    ),
    "flux2": (
        tiny_pipelines.flux2,
        {"max_sequence_length": 160, "text_encoder_out_layers": (1, 2, 3)},
    ),
}


@pytest.fixture(params=FAMILIES)
def family_path(request, tmp_path):
    build, options = FAMILIES[request.param]
    build().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline", options


# --- text encoders ------------------------------------------------------------------------------


def test_text_encoders_in_bfloat16_are_the_stock_pipelines(tiny_pipeline_path, tmp_path):
    from diffusers import DiffusionPipeline

    execution = Execution(text_dtype=torch.bfloat16)
    policy = load(tiny_pipeline_path, execution, embedding_cache=tmp_path / "cache")
    exact = load(tiny_pipeline_path, embedding_cache=tmp_path / "cache")
    assert policy.embeddings and exact.embeddings
    assert policy.embeddings.folder != exact.embeddings.folder  # they do not share rows
    rows, exact_rows = policy.encode(PROMPTS[:1]).tensors, exact.encode(PROMPTS[:1]).tensors
    assert {t.dtype for t in rows.values()} == {torch.float32}
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline_path, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        joint, _, pooled, _ = pipe.encode_prompt(
            PROMPTS[0], None, None, do_classifier_free_guidance=False, max_sequence_length=4
        )
    assert torch.equal(rows["joint"], joint.float())
    assert torch.equal(rows["pooled"], pooled.float())
    error = (rows["joint"] - exact_rows["joint"]).norm() / exact_rows["joint"].norm()
    assert 1e-4 < error < 2e-2


def test_a_full_fine_tune_saves_text_encoders_as_they_were(tiny_pipeline_path, tmp_path):
    from safetensors.torch import load_file

    policy = load(tiny_pipeline_path, Execution(text_dtype=torch.bfloat16), method="full")
    policy.encode(PROMPTS)
    policy.save(tmp_path / "saved")
    assert policy.pipe.text_encoder.dtype == torch.bfloat16
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        for file in (tiny_pipeline_path / name).glob("*.safetensors"):
            kept, written = load_file(file), load_file(tmp_path / "saved" / name / file.name)
            assert all(torch.equal(kept[key], written[key]) for key in kept)
            assert {t.dtype for t in written.values() if t.is_floating_point()} == {torch.float32}


# --- kernels ------------------------------------------------------------------------------------


def test_an_attention_backend_is_used(flux_path):
    plain = answers(load(flux_path, **FLUX))
    for name, exact in (("_native_math", True), ("native", False)):
        policy = load(flux_path, Execution(attention_backend=name), **FLUX)
        chosen = {
            m.processor._attention_backend.value
            for m in policy.pipe.transformer.modules()
            if hasattr(getattr(m, "processor", None), "_attention_backend")
        }
        assert chosen == {name}
        for a, b in zip(plain, answers(policy), strict=True):
            assert torch.equal(a, b) if exact else (a - b).norm() <= 1e-5 * a.norm()


def test_an_attention_backend_that_can_not_be_used_is_refused(flux_path, tiny_pipeline_path):
    with pytest.raises(
        ValueError, match="unknown attention backend 'nativ'; did you mean 'native'"
    ):
        Execution(attention_backend="nativ")
    with pytest.raises(ValueError, match="'flash' cannot run here"):
        load(flux_path, Execution(attention_backend="flash"), **FLUX)
    with pytest.raises(ValueError, match="would change nothing: the attention of SD3Transformer"):
        load(tiny_pipeline_path, Execution(attention_backend="native"))


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_compiled_blocks_give_the_same_gradients(name, flux_path, tiny_pipeline_path):
    """Blocks that diffusers names for compilation, and those it names for sharding only."""
    path, options = (flux_path, FLUX) if name == "flux" else (tiny_pipeline_path, {})
    plain = answers(load(path, gradient_checkpointing=True, **options))
    policy = load(path, Execution(compile="aot_eager"), gradient_checkpointing=True, **options)
    compiled = [m for m in policy.pipe.transformer.modules() if m._compiled_call_impl is not None]
    assert compiled and all(type(m).__name__.endswith("Block") for m in compiled)
    for a, b in zip(plain, answers(policy), strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_compilation_that_can_not_be_is_refused(tiny_pipeline_path):
    with pytest.raises(ValueError, match="unknown compile backend 'inducter'; did you mean"):
        Execution(compile="inducter")
    with pytest.raises(ValueError, match="'bf16-pure' excludes compiled blocks"):
        load(tiny_pipeline_path, Execution(compile="eager"), precision="bf16-pure")


# --- the VAE ------------------------------------------------------------------------------------


def test_slicing_decodes_one_image_at_a_time(tiny_pipeline_path):
    plain = load(tiny_pipeline_path)
    policy = load(tiny_pipeline_path, Execution(vae_slicing=True))
    sizes = []
    policy.pipe.vae.decoder.register_forward_hook(lambda m, given, out: sizes.append(len(out)))
    x = torch.randn(3, *policy.latent_shape, generator=Generator().manual_seed(0))
    assert (policy.decode(x) - plain.decode(x)).abs().max() < 1e-5
    assert sizes == [1, 1, 1]


def test_tiling_decodes_in_tiles(tiny_pipeline_path):
    policy = load(tiny_pipeline_path, Execution(vae_tiling=True))
    plain = load(tiny_pipeline_path)
    vae = policy.pipe.vae
    tiles = []
    vae.decoder.register_forward_hook(lambda m, given, out: tiles.append(given[0].shape[-1]))
    x = torch.randn(1, *policy.latent_shape, generator=Generator().manual_seed(0))
    assert torch.equal(policy.decode(x), plain.decode(x))  # one tile holds it
    vae.tile_overlap_factor = 0.5
    vae.tile_latent_min_size, vae.tile_sample_min_size = 2, 2 * policy.pipe.vae_scale_factor
    tiles.clear()
    assert 0 < (policy.decode(x) - plain.decode(x)).abs().mean() < 0.2
    assert len(tiles) > 1 and max(tiles) == 2


def test_a_vae_without_them_is_refused():
    class Plain:
        """A VAE of a class that can do neither."""

    for what in ("slicing", "tiling"):
        with pytest.raises(ValueError, match=f"vae_{what} is on, but Plain has no {what}"):
            spare_decoder(Plain(), what == "slicing", what == "tiling")


# --- settings -----------------------------------------------------------------------------------


def test_settings_become_execution(tiny_pipeline_path):
    def found(training=True, **model):
        return build_execution(parse_config({"model": model}).model, training)

    assert found(device="cpu") == Execution(text_dtype=torch.float32)
    assert found(device="cuda").text_dtype == torch.bfloat16
    assert found(device="cuda", text_encoder_precision="fp32").text_dtype == torch.float32
    everything = found(
        device="cpu", adaptation="full", offload=["reference", "vae"], lower_frozen=False,
        compile={"kind": "blocks", "backend": "eager"}, vae_slicing=True, vae_tiling=True,
        attention_backend="native",
    )  # fmt: skip
    assert everything == Execution(
        False, torch.float32, ("reference", "vae"), "native", "eager", True, True
    )
    sampling = found(training=False, device="cpu", adaptation="full", offload=["reference"])
    assert sampling.offload == ()
    with pytest.raises(ConfigError, match="the reference of a LoRA is the model itself"):
        check_training(parse_config({"model": {"offload": ["reference"]}}).model)
    with pytest.raises(ConfigError, match="the reference of a LoRA is the model itself"):
        build_policy(parse_config({"model": {"offload": ["reference"], "path": "/nowhere"}}))
    with pytest.raises(ConfigError, match="offload"):
        parse_config({"model": {"offload": ["transformer"]}})
    model = {
        "path": str(tiny_pipeline_path), "adaptation": "full", "offload": ["reference", "vae"],
        "max_sequence_length": 4, "embedding_cache": None,
    }  # fmt: skip
    policy = build_policy(parse_config({"model": model}))
    assert list(policy.offloaded) == ["vae"]
