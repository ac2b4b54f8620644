# SPDX-License-Identifier: Apache-2.0
"""What is told before a run against what is counted and measured in it."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from chunkgrpo.cli import app
from chunkgrpo.cli.estimates import geometry, print_estimate, sharing
from chunkgrpo.config import ConfigError, parse_config
from chunkgrpo.config.build import build_policy, build_trainer
from chunkgrpo.estimate import ACCELERATORS, make_estimate
from chunkgrpo.policies.architecture import Architecture, build_network, read_architecture
from chunkgrpo.policies.counting import NetworkUse, decoder_work, network_work
from chunkgrpo.policies.network_inputs import (
    conditioning_bytes,
    network_inputs,
    rows_of_guidance,
    text_rows,
)
from chunkgrpo.policies.pipeline import Adaptation, PipelinePolicy
from chunkgrpo.policies.sd3 import StableDiffusion3Policy
from chunkgrpo.runtime.attention import plain_attention
from chunkgrpo.runtime.memory import peak_memory
from chunkgrpo.shapes.build import PipelineSize, build_pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
           "to_add_out")  # fmt: skip


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def settings(path, **sections):
    values = {
        "iterations": 6,
        "model": {
            "path": str(path), "device": "cpu", "max_sequence_length": 4,
            "adaptation": {"rank": 4},
            "precision": "fp32", "embedding_cache": None,
        },
        "rewards": [{"name": "test_estimate:brightness"}],
        "sampling": {"steps": 5, "prompts": 2, "group_size": 3},
        "objective": {
            "plan": {"kind": "explicit", "sizes": [1, 3]},
            "selection": {"kind": "uniform", "fraction": 1.0},
            "updates": 2, "micro_batch": 8, "trust": {"low": 1.0, "high": 10.0},
        },
        "evaluation": {
            "reward": {"name": "test_estimate:brightness"}, "every": 3, "prompts": 4,
            "final_prompts": 5, "final_seeds": 2,
        },
    }  # fmt: skip
    for name, changes in sections.items():
        values[name] = values[name] | changes if isinstance(changes, dict) else changes
    return parse_config(values)


# --- operations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"adaptation": "full", "guidance": 4.0}},
        {"objective": {
            "kl": {"kind": "transition", "weight": 0.1}, "updates": 1, "anchor": "replay",
        }},
        {"sampling": {"same_noise": False},
         "objective": {"window": {"kind": "fixed", "start": 1, "size": 2}, "plan": {"sizes": [2]}}},
    ],
    ids=["lora", "full", "kl-replay", "window"],
)  # fmt: skip
def test_an_iteration_does_the_operations_that_were_planned(
    sections, tiny_pipeline_path, tmp_path, monkeypatch
):
    """Rollout, decoding and training of a whole iteration, counted while it runs."""
    monkeypatch.syspath_prepend(str(__file__).rpartition("/")[0])
    values = settings(tiny_pipeline_path).model_dump()
    for name, changes in sections.items():
        for key, value in changes.items():
            values[name][key] = values[name][key] | value if isinstance(value, dict) else value
    config = parse_config(values)
    plan = make_estimate(config)
    trainer = build_trainer(config, tmp_path)
    trainer.policy.encode(trainer.prompts_of(0))
    with FlopCounterMode(display=False) as counted:
        record = trainer.train_once()
    assert record["idle_pairs"] == 0
    assert plan.iteration_flops == pytest.approx(counted.get_total_flops(), rel=0.05)


VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4, "norm_num_groups": 4,
}  # fmt: skip
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
FAMILIES = {
    "StableDiffusion3Pipeline": {
        "_class_name": "SD3Transformer2DModel", "sample_size": 16, "patch_size": 2,
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 24,
        "caption_projection_dim": 32, "pooled_projection_dim": 20, "pos_embed_max_size": 32,
        **HEADS,
    },
    "FluxPipeline": {
        "_class_name": "FluxTransformer2DModel", "in_channels": 16, "num_layers": 1,
        "num_single_layers": 1, "joint_attention_dim": 24, "pooled_projection_dim": 20,
        "guidance_embeds": True, "axes_dims_rope": [4, 6, 6], **HEADS,
    },
    "Flux2Pipeline": {
        "_class_name": "Flux2Transformer2DModel", "in_channels": 16, "num_layers": 1,
        "num_single_layers": 1, "joint_attention_dim": 24, "timestep_guidance_channels": 32,
        "axes_dims_rope": [4, 4, 4, 4], **HEADS,
    },
    "QwenImagePipeline": {
        "_class_name": "QwenImageTransformer2DModel", "in_channels": 16, "out_channels": 4,
        "num_layers": 1, "joint_attention_dim": 24, "axes_dims_rope": [4, 6, 6], **HEADS,
    },
    "ZImagePipeline": {
        "_class_name": "ZImageTransformer2DModel", "in_channels": 4, "dim": 32, "n_layers": 1,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6], "axes_lens": [128, 64, 64],
    },
    "SanaPipeline": {
        "_class_name": "SanaTransformer2DModel", "in_channels": 4, "out_channels": 4,
        "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
        "cross_attention_dim": 32, "caption_channels": 24, "sample_size": 16, **HEADS,
    },
    "Lumina2Pipeline": {
        "_class_name": "Lumina2Transformer2DModel", "sample_size": 16, "in_channels": 4,
        "hidden_size": 32, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
        "num_kv_heads": 1, "cap_feat_dim": 24, "axes_dim_rope": [4, 6, 6],
        "axes_lens": [128, 64, 64],
    },
}  # fmt: skip
SIZE, TEXT = (64, 96), 6


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_every_transformer_is_counted_as_it_counts_itself(pipeline):
    """The same network with weights, forward and backward, plain attention."""
    from peft import LoraConfig

    architecture = Architecture(pipeline, FAMILIES[pipeline], VAE)
    planned = network_work(
        architecture,
        NetworkUse(SIZE, TEXT, 1, 2, rank=4, targets=TARGETS, precision="fp32", plain=True),
    )
    network = build_network(architecture.transformer).requires_grad_(False)
    assert planned.parameters == sum(p.numel() for p in network.parameters())
    network.add_adapter(LoraConfig(r=4, target_modules=list(TARGETS)))
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert planned.trainable == trainable > 0
    inputs = network_inputs(architecture, 2, SIZE, TEXT)
    with plain_attention(), FlopCounterMode(display=False) as counted:
        out = network(**inputs, return_dict=False)[0]
        forward = counted.get_total_flops()
        torch.stack([o.sum() for o in out]).sum().backward()
    assert planned.training.forward == pytest.approx(forward, rel=0.05)
    backward = counted.get_total_flops() - forward
    assert planned.training.backward == pytest.approx(backward, rel=0.05)
    assert planned.sampling.forward == pytest.approx(forward / 2, rel=0.05)


def test_checkpointing_computes_a_forward_again_and_keeps_less():
    """Against the measured peaks of the same network with weights."""
    from peft import LoraConfig

    config = {**FAMILIES["StableDiffusion3Pipeline"], "num_layers": 6}
    architecture = Architecture("StableDiffusion3Pipeline", config, VAE)
    network = build_network(config).requires_grad_(False)
    network.add_adapter(LoraConfig(r=16, target_modules=list(TARGETS)))
    inputs = network_inputs(architecture, 4, (256, 256), TEXT)

    def train():
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(**inputs, return_dict=False)[0].float().sum()
        loss.backward()

    train()
    held = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    measured = [peak_memory(train) + held]
    network.enable_gradient_checkpointing()
    measured.append(peak_memory(train) + held)
    kept, again = (
        network_work(
            architecture,
            NetworkUse((256, 256), TEXT, 1, 4, targets=TARGETS, checkpointing=checkpointing),
        ).training
        for checkpointing in (False, True)
    )
    assert again.forward == kept.forward
    extra = again.backward - kept.backward
    assert 0.9 * kept.forward < extra <= kept.forward
    assert kept.peak == pytest.approx(measured[0], rel=0.1)
    assert again.peak == pytest.approx(measured[1], rel=0.15)
    assert again.peak < 0.5 * kept.peak


def test_fused_and_plain_attention_differ_in_memory_alone():
    architecture = Architecture(
        "StableDiffusion3Pipeline", FAMILIES["StableDiffusion3Pipeline"], VAE
    )
    plain, fused = (
        network_work(
            architecture,
            NetworkUse((256, 256), TEXT, 1, 1, targets=TARGETS, precision="fp32", plain=plain),
        )
        for plain in (True, False)
    )
    assert plain.sampling.forward == pytest.approx(fused.sampling.forward, rel=0.01)
    # The fused backward computes the scores again instead of keeping them.
    assert plain.training.backward < fused.training.backward
    assert plain.training.peak > 1.5 * fused.training.peak


def test_an_unknown_transformer_is_named():
    architecture = Architecture("XPipeline", {"_class_name": "X2DModel"}, VAE)
    with pytest.raises(ValueError, match="how X2DModel is called is not known; known: SD3Tra"):
        network_inputs(architecture, 1, SIZE, TEXT)


def test_guidance_costs_a_row_where_it_is_not_embedded():
    def rows(pipeline, guidance, distilled=False):
        return rows_of_guidance(Architecture(pipeline, {}, {}, (), distilled), guidance)

    assert [rows("StableDiffusion3Pipeline", g) for g in (0.0, 1.0, 4.5)] == [1, 1, 2]
    assert rows("FluxPipeline", 3.5) == rows("Flux2Pipeline", 4.0) == 1
    flux = Architecture("FluxPipeline", {}, {})
    assert [rows_of_guidance(flux, 3.5, true_cfg) for true_cfg in (1.0, 2.0)] == [1, 2]
    assert rows("Flux2KleinPipeline", 4.0) == 2
    assert rows("Flux2KleinPipeline", 4.0, distilled=True) == 1
    assert [rows("ZImagePipeline", g) for g in (0.0, 0.5)] == [1, 2]


@pytest.mark.slow
def test_flux_at_its_true_size():
    """11.9 billion weights and 2 x weights x tokens at the least, without one of them in memory."""
    config = {
        "_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 19,
        "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }  # fmt: skip
    found = network_work(
        Architecture("FluxPipeline", config, VAE),
        NetworkUse((720, 720), 512, sampling_rows=1, training_rows=1, targets=TARGETS),
    )
    assert found.parameters == pytest.approx(11.9e9, rel=0.005)
    # 2,025 image and 512 text tokens; modulation weights see one vector a row, not every token.
    tokens = 2025 + 512
    assert 1.2 * 8e9 * tokens < found.sampling.forward < 2.4 * 11.9e9 * tokens


# --- memory -------------------------------------------------------------------------------------

# Activations that outweigh all else, as at real size.
MEDIUM = PipelineSize(
    width=64, layers=4, head_dim=16, clip_width=16, clip_layers=2, t5_width=32,
    vae_channels=(8, 8, 8, 8), latent_channels=4, latent_size=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    folder = tmp_path_factory.mktemp("medium") / "pipeline"
    build_pipeline(MEDIUM).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planned_memory_is_the_measured_peak(medium, method, precision):
    """One forward without gradient, one forward and backward, one image decoded."""
    architecture = read_architecture(medium)
    size = architecture.size(None, None)
    use = NetworkUse(
        size, 4, sampling_rows=6, training_rows=6, method=method, rank=4,
        targets=TARGETS if method == "lora" else None, precision=precision, plain=True,
        lower=method == "lora",
    )  # fmt: skip
    planned = network_work(architecture, use)
    policy = StableDiffusion3Policy.from_options(
        build_pipeline(MEDIUM), Adaptation(method, rank=4), precision=precision,
        max_sequence_length=4,
    )  # fmt: skip
    conditioning = policy.encode(["a star"]).repeat_interleave(6)
    x, sigma = torch.randn(6, *policy.latent_shape), torch.full((6,), 0.5)

    def train():
        policy.velocity(x, sigma, conditioning).sum().backward()

    train()  # gradients, as the micro-batches before leave them
    held = sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    assert planned.training.peak == pytest.approx(peak_memory(train) + held, rel=0.1)
    with torch.no_grad():
        measured = peak_memory(lambda: policy.velocity(x, sigma, conditioning))
    # Kernels take workspaces of their own, which weigh more where nothing else is kept.
    assert planned.sampling.peak == pytest.approx(measured, rel=0.25)
    _, decoding = decoder_work(architecture, size, precision)
    measured = peak_memory(lambda: policy.decode(x[:1]))
    assert decoding.peak == pytest.approx(measured, rel=0.25)


def test_the_run_holds_what_was_planned_to_stay(tiny_pipeline_path):
    plan = make_estimate(settings(tiny_pipeline_path, model={"adaptation": "full"}))
    pipe = build_pipeline_of_tests()
    sizes = {n: sum(p.nbytes for p in m.parameters()) for n, m in modules(pipe).items()}
    assert plan.resident["transformer"] == sizes["transformer"]
    assert plan.resident["VAE"] == sizes["vae"]
    encoders = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    assert plan.resident["text encoders"] == encoders
    assert plan.resident["optimizer and averaged weights"] == 3 * sizes["transformer"]
    assert plan.resident["copy of the base"] == sizes["transformer"]
    # 6 images of 5 states of 4 x 4 x 4 numbers.
    assert plan.resident["trajectories"] == 6 * 5 * 64 * 4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_encoded_prompts_are_counted_as_a_rollout_holds_them(guidance, tiny_pipeline_path):
    """A row for each prompt, and the negative prompt's beside it where guidance is on."""
    config = settings(tiny_pipeline_path, model={"guidance": guidance})
    policy = build_policy(config)
    rows = policy.encode(["a star", "two circles"])  # as rollout does
    held = sum(tensor.nbytes for tensor in rows.tensors.values())
    planned = make_estimate(config)
    assert planned.resident["encoded prompts"] == held > 0
    assert planned.memory["rollout"] == (
        sum(planned.resident.values()) + planned.network.sampling.peak
    )


def test_encoded_prompts_of_every_family_have_their_bytes():
    """Text rows of width 24, pooled ones of 20, ids and masks; both halves with guidance."""
    expected = {
        "StableDiffusion3Pipeline": (77 + TEXT) * 24 + 20,  # CLIP's rows come first
        "FluxPipeline": TEXT * (24 + 3) + 20,
        "Flux2Pipeline": TEXT * (24 + 4),
        "QwenImagePipeline": TEXT * 24,
        "ZImagePipeline": TEXT * 24,
        "SanaPipeline": TEXT * (24 + 1),
        "Lumina2Pipeline": TEXT * (24 + 0.25),
    }
    for pipeline, config in FAMILIES.items():
        architecture = Architecture(pipeline, config, VAE)
        assert conditioning_bytes(architecture, TEXT) == 4 * expected[pipeline], pipeline
        assert conditioning_bytes(architecture, TEXT, 2) == 8 * expected[pipeline]


def test_images_are_decoded_as_many_at_once_as_the_settings_say(tiny_pipeline_path):
    """At most a rollout's batch, and at most what the policy is told."""
    _, one = decoder_work(read_architecture(tiny_pipeline_path), (32, 32), "fp32")

    def images(model=None, **sampling):
        plan = make_estimate(settings(tiny_pipeline_path, model=model or {}, sampling=sampling))
        return (plan.memory["decode"] - sum(plan.resident.values())) / one.peak

    assert images() == 6  # all of them: batches hold 96
    assert images(batch_size=4) == 4
    assert images({"options": {"decode_batch": 2}}) == 2
    assert images({"options": {"decode_batch": 5}}, batch_size=4) == 4
    assert images({"options": {"decode_batch": 2}, "vae_slicing": True}) == 1


def test_a_precision_that_can_not_train_is_refused(tiny_pipeline_path):
    config = settings(tiny_pipeline_path, model={"precision": "fp16"})
    with pytest.raises(ConfigError, match=r"'fp16' is for sampling alone: .* set it to 'bf16'"):
        make_estimate(config)
    with pytest.raises(ConfigError, match="'fp16' is for sampling alone"):
        build_policy(config)


def build_pipeline_of_tests():
    from chunkgrpo.shapes.build import TEST_SIZE

    return build_pipeline(TEST_SIZE)


def modules(pipe):
    return {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def test_cached_embeddings_leave_no_text_encoder(tiny_pipeline_path):
    plan = make_estimate(settings(tiny_pipeline_path, model={"embedding_cache": "auto"}))
    assert plan.resident["text encoders"] == 0
    assert plan.memory["encode"] > plan.resident["transformer"] + plan.resident["VAE"]


def test_frozen_weights_offloading_and_stores_are_counted(tiny_pipeline_path):
    """Bytes of the transformer against a real policy's; the rest against its own arithmetic."""

    def plan(model=None, **sections):
        return make_estimate(settings(tiny_pipeline_path, model=model or {}, **sections))

    for lower in (True, False):
        model = {"precision": "bf16", "lower_frozen": lower, "max_sequence_length": 4}
        policy = build_policy(settings(tiny_pipeline_path, model=model))
        real = sum(p.nbytes for p in policy.pipe.transformer.parameters())
        assert plan(model).resident["transformer"] == real
    plain = plan()
    encoders = plain.resident["text encoders"]
    low = plan({"text_encoder_precision": "bf16"})
    assert low.resident["text encoders"] == encoders / 2 > 0
    model = {"offload": ["text_encoders", "vae"], "device": "cuda"}
    model |= {"text_encoder_precision": "fp32"}
    away = plan(model)
    assert away.resident["text encoders"] == away.resident["VAE"] == 0
    assert away.memory["encode"] >= encoders + away.resident["transformer"]
    here = plan({"device": "cuda", "text_encoder_precision": "fp32"})
    vae = here.resident["VAE"]
    assert here.memory["train"] - away.memory["train"] == encoders + vae
    assert here.memory["decode"] - away.memory["decode"] == encoders
    assert plan(model | {"device": "cpu"}).resident == plain.resident
    full = {"adaptation": "full", "device": "cuda", "offload": ["reference"]}
    moved, kept = plan(full), plan(full | {"offload": []})
    copy = kept.resident["copy of the base"]
    assert moved.resident["copy of the base"] == 0 < copy
    with_kl = plan(full, objective={"kl": {"kind": "transition", "weight": 0.1}})
    assert with_kl.memory["train"] - moved.memory["train"] == copy
    stored = plain.resident["trajectories"]
    store = {"store": {"dtype": "bfloat16"}}
    assert plan(sampling=store).resident["trajectories"] == stored / 2
    store = {"store": {"place": "host"}}
    assert plan({"device": "cuda"}, sampling=store).resident["trajectories"] == 0
    assert plan(sampling=store).resident["trajectories"] == stored  # a CPU has one memory
    assert plan({"vae_slicing": True}).memory["decode"] < plain.memory["decode"]
    values = settings(tiny_pipeline_path).model_dump() | {"optimizer": {"name": "adamw8bit"}}
    eight = make_estimate(parse_config(values)).resident["optimizer and averaged weights"]
    assert eight / plain.resident["optimizer and averaged weights"] == pytest.approx(
        6.03 / 12, 0.01
    )


# --- what is said -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_pipeline_of_tests().save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):  # nothing but configurations is read
        path.unlink()
    for path in [*folder.glob("tokenizer*/*"), *folder.glob("scheduler/*")]:
        path.unlink()
    return make_estimate(settings(folder))


def test_the_geometry_is_said_in_plain_words(plan):
    said = geometry(plan)
    assert said[0] == (
        "Each iteration draws 2 prompts x 3 images = 6 images of 32 x 32 pixels in 5 sampler steps."
    )
    assert said[1] == (
        "4 of 4 trainable steps are stochastic and form 2 chunks of 1 and 3 steps; 4 steps of each "
        "image are trained, in the mean."
    )
    assert said[2].startswith(
        "An iteration takes 2 optimizer steps of 3 images = 12 (image, step) pairs each, in 2 "
        "micro-batches of at most 8."
    )
    assert said[3] == (
        "The run: 6 iterations = 12 optimizer steps and 36 images from 12 draws of a prompt."
    )


def test_sharing_says_what_a_gpu_holds(plan):
    assert sharing(plan, 1) == ("1", "6", "12", "2", "")
    assert sharing(plan, 3) == ("3", "2", "4", "1", "micro-batches not full")
    assert sharing(plan, 4) == ("4", "2", "3", "1", "uneven: some wait")
    assert sharing(plan, 64)[-1] == "58 of them idle: raise sampling.prompts"


def test_time_is_operations_over_rate(plan):
    h100 = ACCELERATORS[0]
    # float32 runs without tensor cores.
    assert plan.seconds(h100, 0.5) == pytest.approx(plan.iteration_flops / (66.9e12 * 0.5))
    assert plan.seconds(h100, 0.5, 6) == pytest.approx(plan.seconds(h100, 0.5) / 6)
    assert plan.seconds(h100, 0.5, 4) == pytest.approx(plan.seconds(h100, 0.5) / 3)
    assert plan.hours(h100, 0.5) * 3600 == pytest.approx(plan.run_flops / (66.9e12 * 0.5))
    # 2 x 5 x 2 images judged, and 4 watched twice; 5 steps and a decoding each.
    sampled = plan.network.sampling.forward / plan.network.sampling.rows
    decoded = plan.phases[1].flops / plan.phases[1].rows
    assert plan.evaluation == pytest.approx(28 * (5 * sampled + decoded))


def test_the_plan_is_printed_whole(plan):
    console = Console(width=120, record=True, file=io.StringIO())
    print_estimate(console, plan, 0.4, price=2.5)
    text = console.export_text()
    names = ("H100", "H200", "A100", "RTX 4090", "rollout: forward", "train: backward")
    for wanted in (*names, "GPU-hours a run", "cost at 2.5 an hour", "8 GPUs", "64 GPUs", "fits"):
        assert wanted in text, wanted
    with pytest.raises(ConfigError, match="utilisation 40 must lie in"):
        print_estimate(console, plan, 40)
    with pytest.raises(ConfigError, match="price -1 must not be negative"):
        print_estimate(console, plan, 0.4, -1)
    with pytest.raises(ConfigError, match="GPUs must be at least 1, got 0"):
        print_estimate(console, plan, 0.4, None, (1, 0))


def test_the_command_reads_configurations_alone(monkeypatch):
    """The embedded model's plan, with nothing loaded."""

    def forbidden(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", forbidden)
    for command in ("estimate", "plan"):
        result = CliRunner().invoke(
            app, [command, "demo", "--price", "2", "--gpus", "1", "--gpus", "2"]
        )
        assert result.exit_code == 0, result.output
        assert "16 prompts x 12 images = 192 images" in result.output
        assert "64 GPUs" not in result.output
    result = CliRunner().invoke(app, ["estimate", "demo", "--set", "model.path=/nowhere/at/all"])
    assert result.exit_code == 2
    assert "does not exist" in result.output and len(result.output.strip().splitlines()) == 1


def test_a_folder_that_lacks_a_part_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"has no transformer/config\.json"):
        read_architecture(tmp_path)


def test_text_rows_follow_the_family():
    for pipeline, rows in (("FluxPipeline", 512), ("SanaPipeline", 300)):
        architecture = Architecture(pipeline, FAMILIES[pipeline], VAE)
        assert text_rows(architecture, None) == rows
        assert text_rows(architecture, 77) == 77


def test_the_default_of_images_decoded_at_once_is_known():
    import inspect

    assert "decode_batch" in inspect.signature(PipelinePolicy.__init__).parameters
