# SPDX-License-Identifier: Apache-2.0
"""Every model family against its own stock pipeline: sampling, saving, loading, reference."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

import stock_sampling
import tiny_pipelines
from chunkgrpo.core import (
    ChunkPlan,
    FlowDiffusion,
    OdeDiffusion,
    Transition,
    UniformSelection,
    make_sigmas,
)
from chunkgrpo.core.schedules import exact_timestep, floor1000_timestep
from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.execution import PRODUCTS, Execution
from chunkgrpo.policies.loading import FAMILIES as POLICIES
from chunkgrpo.policies.loading import export_fused, load_policy
from chunkgrpo.policies.sana import SanaPolicy
from chunkgrpo.types import Experience, Prompt
from compose import chunk_grpo, rollout
from stock_sampling import sample

STEPS = 4
PROMPTS = ["a red star", "two circles", "a photo of a blue square left of a cross"]
SEEDS = [7, 8, 9]


@dataclass(frozen=True)
class Guidance:
    """One way to guide: the policy's options, and the stock pipeline's arguments."""

    name: str
    options: dict[str, Any]
    call: dict[str, Any]


def scale(name, value):
    """Guidance where the pipeline takes ``guidance_scale``."""
    return Guidance(name, {"guidance": value}, {"guidance_scale": value})


@dataclass(frozen=True)
class Family:
    """One pipeline class: how a tiny one is made and how its stock sampler is called.

    Attributes:
        name: Of the tests.
        build: Makes the tiny pipeline.
        sizes: Heights and widths, one of them not square.
        guidances: Off first, on last.
        options: Of the policy.
        call: Arguments of the stock pipeline that say the same.
        stock_noise: From the loop's first latents and the size in latent pixels to what the
            pipeline takes as ``latents``.
    """

    name: str
    build: Callable[[], Any]
    sizes: tuple[tuple[int, int], ...]
    guidances: tuple[Guidance, ...]
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    stock_noise: Callable[[torch.Tensor, Any], torch.Tensor] = lambda noise, policy: noise


def patches(noise, policy):
    """FLUX.2 pipelines take first latents that are not packed yet."""
    height, width = (side // policy.size_step for side in policy.size)
    return noise.transpose(1, 2).reshape(len(noise), -1, height, width)


SHORT = {"max_sequence_length": 8}
LONG = {"max_sequence_length": 160}  # room for the system prompt
FLUX2 = {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)}
FAMILIES = [
    Family(
        "sd3", tiny_pipelines.sd3, ((32, 32), (32, 48), (56, 40)),
        (scale("off", 1.0), scale("on", 4.0)), SHORT, SHORT,
    ),
    Family(
        "flux", tiny_pipelines.flux, ((16, 16), (16, 24)),
        (
            scale("embedded", 4.0),  # 3.5 is 3504 thousandths in bfloat16, not 3500
            Guidance(
                "true_cfg",
                {"guidance": 2.0, "true_cfg": 3.0, "negative_prompt": "green"},
                {"guidance_scale": 2.0, "true_cfg_scale": 3.0, "negative_prompt": ["green"] * 3},
            ),
        ),
        SHORT, SHORT,
    ),
    Family(
        "qwen_image", tiny_pipelines.qwen_image, ((16, 16), (16, 24)),
        (
            Guidance("off", {"guidance": 1.0}, {}),
            Guidance(
                "on",
                {"guidance": 4.0, "negative_prompt": "a green cross"},
                {"true_cfg_scale": 4.0, "negative_prompt": ["a green cross"] * 3},
            ),
        ),
    ),
    Family(
        "z_image", tiny_pipelines.z_image, ((16, 16), (16, 24)),
        (scale("off", 0.0), scale("on", 3.0)),
        {"max_sequence_length": 48}, {"max_sequence_length": 48},
    ),
    Family(
        "lumina2", tiny_pipelines.lumina2, ((32, 32), (32, 48)),
        (scale("off", 1.0), scale("on", 4.0)),
        {"system_prompt": "Describe"}, {"system_prompt": "Describe"},
    ),
    Family(
        "sana", tiny_pipelines.sana, ((32, 32), (32, 64)),
        (scale("off", 1.0), scale("on", 4.5)),
        SHORT | {"instruction": False},
        SHORT | {"complex_human_instruction": None, "use_resolution_binning": False},
    ),
    Family(
        "flux2_klein", tiny_pipelines.flux2_klein, ((16, 16), (16, 24)),
        (scale("off", 1.0), scale("on", 4.0)), FLUX2, FLUX2, patches,
    ),
    Family(
        "flux2", tiny_pipelines.flux2, ((16, 16), (16, 24)),
        (scale("embedded", 4.0),), FLUX2 | LONG, FLUX2 | LONG, patches,
    ),
]  # fmt: skip
TWO_STREAMS = ("sd3", "flux", "qwen_image", "flux2_klein", "flux2")
"""Families whose text tokens have weights of their own."""
VARIANTS = [
    Family(
        "schnell", lambda: tiny_pipelines.flux(guidance_embeds=False, dynamic=False),
        ((16, 24),), (scale("none", 1.0),), SHORT, SHORT,
    ),
    Family(
        "z_image_bounded", tiny_pipelines.z_image, ((16, 24),), (scale("on", 3.0),),
        {"max_sequence_length": 48, "cfg_normalization": 0.9},
        {"max_sequence_length": 48, "cfg_normalization": 0.9},
    ),
    Family(
        "lumina2_plain", tiny_pipelines.lumina2, ((32, 48),), (scale("on", 4.0),),
        {"cfg_normalization": False}, {"cfg_normalization": False},
    ),
    Family(
        "sana_instructed", tiny_pipelines.sana, ((32, 64),), (scale("on", 4.5),),
        SHORT, SHORT | {"use_resolution_binning": False},
    ),
    Family(
        "flux2_klein_distilled", lambda: tiny_pipelines.flux2_klein(is_distilled=True),
        ((16, 24),), (scale("ignored", 4.0),), FLUX2, FLUX2, patches,
    ),
]  # fmt: skip
"""Checked for sampling only: what differs from a family in its configuration alone."""
CASES = [
    pytest.param(family, guidance, size, id=f"{family.name}-{guidance.name}-{size[0]}x{size[1]}")
    for family in [*FAMILIES, *VARIANTS]
    for guidance in family.guidances
    for size in family.sizes
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines by family, as ``save_pretrained`` writes them; built when asked for."""

    class Folders(dict):
        def __missing__(self, name):
            family = next(f for f in [*FAMILIES, *VARIANTS] if f.name == name)
            self[name] = tmp_path_factory.mktemp("pipelines") / name
            family.build().save_pretrained(self[name])
            return self[name]

    return Folders()


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


def load(family, folders, adaptation=None, **options):
    adaptation = adaptation or Adaptation(rank=4, alpha=4.0)
    options = {
        "precision": "fp32",
        "size": family.sizes[-1],
        **family.options,
        **family.guidances[0].options,
        **options,
    }
    return load_policy(folders[family.name], adaptation, **options)


def stock_arguments(family, guidance, size):
    """Arguments of the stock pipeline: its own schedule, which the policy is asked for."""
    return {
        "num_inference_steps": STEPS,
        "height": size[0],
        "width": size[1],
        **family.call,
        **guidance.call,
    }


def ours(policy, sigmas=None):
    sigmas = policy.native_sigmas(STEPS) if sigmas is None else sigmas
    return rollout(policy, PROMPTS, Transition(OdeDiffusion()), sigmas, 1, seeds=SEEDS)


def assert_close(actual, expected, tolerance=1e-5):
    assert expected.abs().max() > 0.1
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "guidance", "size"), CASES)
def test_the_ode_is_the_stock_pipeline(family, guidance, size, folders):
    from diffusers import DiffusionPipeline

    policy = load(family, folders, size=size, **guidance.options)
    trajectory = ours(policy)
    pipe = DiffusionPipeline.from_pretrained(folders[family.name])
    noise = family.stock_noise(trajectory.states[:, 0], policy)
    arguments = stock_arguments(family, guidance, size)
    latents, images = sample(pipe, PROMPTS, noise, arguments)
    assert_close(trajectory.final, latents)
    decoded = policy.decode(trajectory.final)
    assert decoded.shape == (3, 3, *size)
    assert decoded.min() >= 0 and decoded.max() <= 1 and decoded.std() > 0
    assert_close(decoded, images)
    policy.decode_batch = 2
    assert_close(policy.decode(trajectory.final), images)


def test_the_papers_schedule_in_the_stock_pipeline(family, folders):
    """With a static shift and unshifted sigmas, stock pipelines sample ``make_sigmas``."""
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    policy = load(family, folders)
    trajectory = ours(policy, make_sigmas(STEPS, 3.0))
    pipe = DiffusionPipeline.from_pretrained(folders[family.name])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    arguments = stock_arguments(family, family.guidances[0], family.sizes[-1])
    arguments["sigmas"] = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    noise = family.stock_noise(trajectory.states[:, 0], policy)
    assert_close(trajectory.final, sample(pipe, PROMPTS, noise, arguments)[0])


@pytest.mark.parametrize("name", ["sd3", "z_image", "lumina2", "sana"])
def test_one_seed_is_the_stock_pipelines(name, folders):
    """Where latents are not packed, seeds are those of the generators the pipeline is given."""
    from diffusers import DiffusionPipeline

    family = next(f for f in FAMILIES if f.name == name)
    guidance, size = family.guidances[-1], family.sizes[-1]
    policy = load(family, folders, **guidance.options)
    trajectory = rollout(
        policy, PROMPTS, Transition(OdeDiffusion()), policy.native_sigmas(STEPS), 1, seeds=SEEDS,
        same_noise=True,  # of a group, which is one image here: its seed is that of its first noise
    )  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(folders[name])
    arguments = stock_arguments(family, guidance, size)
    generators = [Generator().manual_seed(seed) for seed in SEEDS]
    latents, _ = sample(pipe, PROMPTS, None, arguments | {"generator": generators})
    assert_close(trajectory.final, latents)


def test_time_is_rounded_as_the_scheduler_rounds_it(folders):
    """Multistep DPM, which released Sana models come with, truncates to whole thousandths."""
    from diffusers import DPMSolverMultistepScheduler

    family = next(f for f in FAMILIES if f.name == "sana")
    exact = load(family, folders)
    assert exact.timestep is exact_timestep
    exact.pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    truncating = SanaPolicy(exact.pipe, Adaptation("none"))
    assert truncating.timestep is floor1000_timestep
    sigmas, scheduler = truncating.native_sigmas(5), truncating.native_scheduler(5)
    assert scheduler.timesteps.tolist() == (1000 * sigmas[:-1]).floor().tolist()
    assert sigmas[0] > 0.999 and sigmas[-1] == 0


def test_guidance_changes_the_sample(family, folders):
    finals = [ours(load(family, folders, **g.options)).final for g in family.guidances]
    assert len(finals) < 2 or (finals[0] - finals[1]).abs().max() > 1e-3


def test_prompts_change_the_sample(family, folders):
    policy = load(family, folders)
    x = torch.randn(1, *policy.latent_shape, generator=Generator().manual_seed(0))
    with torch.no_grad():
        v = policy.velocity(
            x.expand(3, *x.shape[1:]), torch.full((3,), 0.5), policy.encode(PROMPTS)
        )
    assert min((v[i] - v[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


def test_rows_may_have_different_sigmas(family, folders):
    policy = load(family, folders, **family.guidances[-1].options)
    x = torch.randn(3, *policy.latent_shape, generator=Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.5, 0.1])
    conditioning = policy.encode(PROMPTS)
    with torch.no_grad():
        together = policy.velocity(x, sigma, conditioning)
        for i in range(3):
            rows = slice(i, i + 1)
            alone = policy.velocity(x[rows], sigma[rows], conditioning[rows])
            assert_close(together[rows], alone)
    assert together.dtype == torch.float32


def test_low_precision_is_near_and_float32_outside(family, folders):
    x, sigma = torch.randn(3, *load(family, folders).latent_shape), torch.full((3,), 0.5)
    answers = []
    for precision in ("fp32", "bf16"):
        policy = load(family, folders, precision=precision)
        v = policy.velocity(x, sigma, policy.encode(PROMPTS))
        assert v.dtype == torch.float32 and v.requires_grad
        assert policy.decode(x).dtype == torch.float32
        answers.append(v.detach())
    assert 0 < (answers[0] - answers[1]).norm() < 0.05 * answers[0].norm()


def test_each_prompt_is_encoded_once(family, folders):
    policy = load(family, folders, **family.guidances[-1].options)
    calls = []
    for name, module in policy.pipe.components.items():
        if name.startswith("text_encoder") and module is not None:
            module.register_forward_hook(lambda *_: calls.append(1))
    first = policy.encode([*PROMPTS, PROMPTS[0]])
    assert len(first) == 4 and calls
    calls.clear()
    second = policy.encode([PROMPTS[1], PROMPTS[0]])
    assert not calls
    for name, tensor in second.tensors.items():
        for row, earlier in zip(tensor, first.tensors[name][[1, 3]], strict=True):
            assert torch.equal(row, earlier[: len(row)])
            assert not earlier[len(row) :].any()  # padding to the longest of its batch
        assert not tensor.requires_grad
    policy.encode(["a new prompt"])
    assert calls


def test_a_records_negative_prompt_counts_as_the_policys_own(family, folders):
    """Also beside records whose negative prompts have other lengths."""
    options = family.guidances[-1].options
    negatives = ["a small green circle", None, "red"]
    records = [Prompt(p, negative_prompt=n) for p, n in zip(PROMPTS, negatives, strict=True)]
    policy = load(family, folders, **options)
    x = torch.randn(3, *policy.latent_shape, generator=Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        found = policy.velocity(x, sigma, policy.encode(records))
        for i, negative in enumerate(negatives):
            rows = slice(i, i + 1)
            given = options if negative is None else {**options, "negative_prompt": negative}
            own = load(family, folders, **given)
            assert_close(found[rows], own.velocity(x[rows], sigma[rows], own.encode(PROMPTS[rows])))
        plain = policy.velocity(x, sigma, policy.encode(PROMPTS))
    assert policy.guided == bool((plain[0] - found[0]).abs().max() > 1e-6)


# --- what is trained ----------------------------------------------------------------------------

ADAPTATIONS = {
    "lora_same": Adaptation("lora", rank=4, alpha=4.0),
    "lora_other": Adaptation("lora", rank=4, alpha=16.0),
    "full": Adaptation("full"),
}


def train(policy, steps=2):
    """Push the velocity about; large steps, so that a wrong scale shows."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)
    generator = Generator().manual_seed(3)
    conditioning = policy.encode(PROMPTS)
    for _ in range(steps):
        x = torch.randn(3, *policy.latent_shape, generator=generator)
        target = torch.randn(3, *policy.latent_shape, generator=generator)
        v = policy.velocity(x, torch.tensor([0.9, 0.5, 0.1]), conditioning)
        (v - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """Train and save every family in every way, and let stock diffusers sample the results."""
    found, jobs = {}, []
    for family in FAMILIES:
        for kind, adaptation in ADAPTATIONS.items():
            folder = tmp_path_factory.mktemp(f"{family.name}_{kind}")
            base = folders[family.name]
            policy = load(family, folders, adaptation)
            before = ours(policy).final
            train(policy)
            trajectory = ours(policy)
            policy.save(folder / "saved")
            noise = family.stock_noise(trajectory.states[:, 0].clone(), policy)
            torch.save(noise, folder / "noise.pt")
            ways = {"full": (folder / "saved", "")}.get(kind, (base, folder / "saved"))
            answers = {"saved": ways}
            if kind == "lora_other":
                export_fused(base, folder / "saved", folder / "fused")
                answers["fused"] = (folder / "fused", "")
            for answer, (model, lora) in answers.items():
                jobs.append({
                    "base": str(model),
                    "lora": str(lora),
                    "prompts": PROMPTS,
                    "noise": str(folder / "noise.pt"),
                    "arguments": stock_arguments(family, family.guidances[0], family.sizes[-1]),
                    "answer": str(folder / f"{answer}.pt"),
                })  # fmt: skip
            images = policy.decode(trajectory.final)
            found[family.name, kind] = (before, trajectory.final, images, folder)
    listing = tmp_path_factory.mktemp("jobs") / "jobs.json"
    listing.write_text(json.dumps(jobs))
    script = Path(stock_sampling.__file__)
    subprocess.run([sys.executable, script, listing], check=True, timeout=1800)
    return found


@pytest.mark.parametrize("kind", ADAPTATIONS)
def test_stock_diffusers_reproduces_what_was_saved(family, kind, saved):
    before, final, images, folder = saved[family.name, kind]
    assert (final - before).abs().max() > 0.05  # training did something
    for answer in ("saved", "fused") if kind == "lora_other" else ("saved",):
        latents, stock_images = torch.load(folder / f"{answer}.pt")
        assert_close(latents, final)
        assert_close(stock_images, images)


def test_a_fused_pipeline_needs_no_adapter(family, saved):
    *_, folder = saved[family.name, "lora_other"]
    assert not list((folder / "fused").rglob("*lora*"))
    assert (folder / "fused" / "model_index.json").is_file()


@pytest.mark.parametrize("kind", ADAPTATIONS)
def test_the_reference_is_the_base_model_exactly(family, kind, folders):
    policy = load(family, folders, ADAPTATIONS[kind])
    x = torch.randn(3, *policy.latent_shape, generator=Generator().manual_seed(0))
    sigma, conditioning = torch.tensor([0.9, 0.5, 0.1]), policy.encode(PROMPTS)

    @torch.no_grad()
    def answer():
        return policy.velocity(x, sigma, conditioning)

    base = answer()
    train(policy)
    moved = answer()
    assert (moved - base).abs().max() > 1e-2
    with policy.reference():
        assert torch.equal(answer(), base)
    assert torch.equal(answer(), moved)
    with pytest.raises(RuntimeError, match="stop"), policy.reference():
        raise RuntimeError("stop")
    assert torch.equal(answer(), moved)
    # A reference in between leaves a graph that was built before it intact.
    policy.velocity(x, sigma, conditioning).square().mean().backward()
    plain = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    for p in policy.parameters():
        p.grad = None
    loss = policy.velocity(x, sigma, conditioning).square().mean()
    with policy.reference():
        answer()
    loss.backward()
    again = [p.grad for p in policy.parameters() if p.grad is not None]
    assert plain and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_only_the_transformer_is_trained(family, folders):
    for kind, adaptation in ADAPTATIONS.items():
        policy = load(family, folders, adaptation)
        trained = {id(p) for p in policy.parameters()}
        for name, module in policy.pipe.components.items():
            if not isinstance(module, torch.nn.Module):
                continue
            for key, parameter in module.named_parameters():
                wanted = name == "transformer" and (kind == "full" or "lora" in key)
                assert (id(parameter) in trained) == parameter.requires_grad == wanted, key


def test_a_loras_first_weights_follow_its_seed(family, folders):
    first, again, other = (
        load(family, folders, Adaptation(rank=4, seed=seed)).parameters() for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_lora_goes_to_the_weights_of_text_where_there_are_any(family, folders):
    """The projections of text are the half of attention that reads the prompt."""
    policy = load(family, folders)
    names = [name for name, _ in policy.pipe.transformer.named_modules()]
    ours = {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}
    ends = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    of_text = {n for n in names if n.endswith(ends)}
    assert of_text <= ours and any(name.endswith("to_q") for name in ours)
    assert {n.rpartition(".")[2] for n in of_text} == (
        set(ends) if family.name in TWO_STREAMS else set()
    )


@pytest.mark.parametrize("kind", ["lora_other", "full"])
def test_gradient_checkpointing_changes_no_gradient(family, kind, folders):
    found = []
    for checkpointing in (False, True):
        policy = load(
            family, folders, ADAPTATIONS[kind], gradient_checkpointing=checkpointing,
            **family.guidances[-1].options,
        )  # fmt: skip
        train(policy, 1)  # or the gradient of half of each LoRA is 0
        runs = []
        for module in policy.pipe.transformer.modules():
            if type(module).__name__.endswith(("TransformerBlock", "JointTransformerBlock")):
                module.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        x = torch.randn(3, *policy.latent_shape, generator=Generator().manual_seed(0))
        sigma = torch.tensor([0.9, 0.5, 0.1])
        policy.velocity(x, sigma, policy.encode(PROMPTS)).square().mean().backward()
        grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        found.append((len(runs), torch.cat(grads)))
    (plain_runs, plain), (runs, grad) = found
    assert 0 < plain_runs < runs  # blocks did run again
    assert plain.norm() > 0
    assert (plain - grad).norm() <= 1e-6 * plain.norm()


def test_pure_low_precision_excludes_checkpointing(family, folders):
    with pytest.raises(ValueError, match="excludes gradient checkpointing"):
        load(family, folders, precision="bf16-pure", gradient_checkpointing=True)


# --- ratios before any update -------------------------------------------------------------------


def first_log_ratios(policy, anchor, micro_batch, group_size=2):
    """Log-ratios of the first update's steps, trained in batches other than the rollout's."""
    transition, plan = Transition(FlowDiffusion(0.7)), ChunkPlan((1, 2))
    generator = Generator().manual_seed(1)
    trajectory = rollout(
        policy, PROMPTS, transition, policy.native_sigmas(STEPS), group_size, generator
    )
    advantages = torch.linspace(-1, 1, trajectory.num_samples)
    algorithm = chunk_grpo(
        plan, transition, UniformSelection(1.0), updates=1, micro_batch=micro_batch,
        anchor=anchor,
    )  # fmt: skip
    parts = algorithm.losses(policy, Experience(trajectory, advantages), generator)
    return torch.cat([part.diagnostics["log_ratio"] for part in parts])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ratios_start_at_one(family, precision, folders):
    policy = load(family, folders, precision=precision, **family.guidances[-1].options)
    replayed = first_log_ratios(policy, "replay", 5)
    assert len(replayed) == 6 * (STEPS - 1)
    assert torch.equal(replayed, torch.zeros_like(replayed))
    # Other batches, other roundings; the figures are in docs/models.md.
    rolled = max(first_log_ratios(policy, "rollout", rows).abs().max() for rows in (1, 5))
    print(f"{family.name} {precision}: largest |log-ratio| {float(rolled):.1e}")
    assert rolled <= {"fp32": 1e-6, "bf16": 1e-3}[precision]


# --- types and places of frozen weights ---------------------------------------------------------


def answers(policy):
    """A velocity, an image and, of a policy that is trained, gradients with a LoRA not zero."""
    with torch.no_grad():
        for index, parameter in enumerate(policy.parameters()):
            parameter.normal_(std=0.02, generator=Generator().manual_seed(index))
    x = torch.randn(3, *policy.latent_shape, generator=Generator().manual_seed(0))
    v = policy.velocity(x, torch.tensor([0.9, 0.5, 0.1]), policy.encode(PROMPTS))
    with torch.no_grad(), policy.reference():
        reference = policy.velocity(x, torch.tensor([0.9, 0.5, 0.1]), policy.encode(PROMPTS))
    assert v.dtype == torch.float32
    if policy.parameters():
        v.square().mean().backward()
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert bool(grads) == bool(policy.parameters())
    return [v.detach(), reference, policy.decode(x), *grads]


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure", "fp16"])
def test_frozen_weights_in_low_precision_change_no_bit(family, precision, folders):
    """Autocast casts the weights of matrix products anyway: here it was done once."""
    found = []
    adaptation = Adaptation("none") if precision == "fp16" else None  # which samples alone
    for lower in (False, True):
        policy = load(
            family, folders, adaptation, precision=precision,
            execution=Execution(lower_frozen=lower), **family.guidances[-1].options,
        )  # fmt: skip
        found.append(answers(policy))
        low = high = 0
        for module in policy.pipe.transformer.modules():
            for parameter in module.parameters(recurse=False):
                product = isinstance(module, PRODUCTS) and not parameter.requires_grad
                wanted = policy.dtype if lower and product else torch.float32
                assert parameter.dtype == wanted
                low, high = low + product * parameter.numel(), high + parameter.numel()
        assert low > 0.6 * high
    for plain, lowered in zip(*found, strict=True):
        assert torch.equal(plain, lowered)


def test_float32_lowers_nothing(family, folders):
    policy = load(family, folders, precision="fp32")
    assert {p.dtype for p in policy.pipe.transformer.parameters()} == {torch.float32}


def test_a_family_is_a_small_file():
    """As docs/models.md says: what is common lives once."""
    for module, _ in set(POLICIES.values()):
        source = Path(str(import_module(module).__file__)).read_text()
        assert len(source.splitlines()) < 120, module


# --- refusals -----------------------------------------------------------------------------------


def refusal(*arguments, **options):
    with pytest.raises(ValueError) as caught:
        load_policy(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_known_pipeline_is_refused_in_one_line(tmp_path, monkeypatch):
    missing = tmp_path / "nowhere"
    assert f"model folder {missing} does not exist" in refusal(missing)
    assert "does not exist" in refusal("nowhere_at_all")
    (tmp_path / "empty").mkdir()
    assert "it has no model_index.json" in refusal(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "UnknownPipeline"}')
    message = refusal(tmp_path / "other")
    assert "is a UnknownPipeline, which has no policy yet" in message
    assert "StableDiffusion3Pipeline, FluxPipeline" in message
    assert "docs/models.md says how to add one" in message

    def offline(*_):
        raise OSError("cannot reach the hub\nand much more")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", offline)
    assert "cannot reach the hub" in refusal("owner/name")


def test_what_does_not_fit_is_refused(family, folders):
    folder = folders[family.name]
    with pytest.raises(ValueError, match="32 x 33 must be divisible by"):
        load_policy(folder, size=(32, 33))
    with pytest.raises(ValueError, match="unknown method 'lokr'; known: lora, full, none"):
        Adaptation("lokr")
    with pytest.raises(ValueError, match="no_such_module"):
        load_policy(folder, Adaptation(targets=("no_such_module",)))
    with pytest.raises(
        ValueError, match="unknown precision 'fp8'; known: bf16, bf16-pure, fp16, fp32"
    ):
        load_policy(folder, precision="fp8")
    for method in ("lora", "full"):
        with pytest.raises(ValueError, match=r"'fp16' is for sampling alone .* choose 'bf16'"):
            load_policy(folder, Adaptation(method), precision="fp16")
