# SPDX-License-Identifier: Apache-2.0
"""Every model family against its own stock pipeline: sampling, saving, loading, reference."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from chunkgrpo.core import OdeDiffusion, Transition, make_sigmas
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.policies.pipeline import Adaptation
from chunkgrpo.rollout import rollout

STEPS = 4
SIGMAS = make_sigmas(STEPS)
PROMPTS = ["a red star", "two circles", "a photo of a blue square left of a cross"]
SEEDS = [7, 8, 9]


@dataclass(frozen=True)
class Family:
    """One pipeline class: how a tiny one is made and how its stock sampler is called."""

    name: str
    build: Callable[[], Any]
    sizes: tuple[tuple[int, int], ...]
    guidances: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


def build_sd3() -> Any:
    from chunkgrpo.shapes.build import TEST_SIZE, build_pipeline

    return build_pipeline(TEST_SIZE)


FAMILIES = [
    Family(
        "sd3", build_sd3, ((32, 32), (32, 48), (56, 40)), (1.0, 4.0),
        {"max_sequence_length": 8}, {"max_sequence_length": 8},
    ),
]  # fmt: skip
CASES = [
    pytest.param(family, guidance, size, id=f"{family.name}-{guidance}-{size[0]}x{size[1]}")
    for family in FAMILIES
    for guidance in family.guidances
    for size in family.sizes
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines by family, as ``save_pretrained`` writes them."""
    found = {}
    for family in FAMILIES:
        found[family.name] = tmp_path_factory.mktemp("pipelines") / family.name
        family.build().save_pretrained(found[family.name])
    return found


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


def load(family, folders, adaptation=None, **options):
    adaptation = adaptation or Adaptation(rank=4, alpha=4.0)
    return load_policy(
        folders[family.name], adaptation, **({"precision": "fp32"} | family.options | options)
    )


def stock_arguments(family, guidance=1.0):
    """Arguments of the stock pipeline: unshifted sigmas, which its scheduler shifts once."""
    return {
        "sigmas": np.linspace(1, 1 / STEPS, STEPS).tolist(),
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        **family.call,
    }


def ours(policy):
    return rollout(policy, PROMPTS, Transition(OdeDiffusion()), SIGMAS, 1, seeds=SEEDS)


def assert_close(actual, expected, tolerance=1e-5):
    assert expected.abs().max() > 0.1
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "guidance", "size"), CASES)
def test_the_ode_is_the_stock_pipeline(family, guidance, size, folders):
    from diffusers import DiffusionPipeline

    policy = load(family, folders, guidance=guidance, size=size)
    trajectory = ours(policy)
    pipe = DiffusionPipeline.from_pretrained(folders[family.name])
    pipe.set_progress_bar_config(disable=True)
    arguments = stock_arguments(family, guidance) | {"height": size[0], "width": size[1]}
    noise = trajectory.states[:, 0]
    expected = pipe(PROMPTS, latents=noise.clone(), output_type="latent", **arguments).images
    assert_close(trajectory.final, expected)
    images = pipe(PROMPTS, latents=noise.clone(), output_type="pt", **arguments).images
    decoded = policy.decode(trajectory.final)
    assert decoded.shape == (3, 3, *size)
    assert decoded.min() >= 0 and decoded.max() <= 1 and decoded.std() > 0
    assert_close(decoded, images)
    policy.decode_batch = 2
    assert_close(policy.decode(trajectory.final), images)


def test_guidance_changes_the_sample(family, folders):
    finals = [ours(load(family, folders, guidance=g)).final for g in family.guidances]
    assert len(finals) < 2 or (finals[0] - finals[1]).abs().max() > 1e-3


def test_rows_may_have_different_sigmas(family, folders):
    policy = load(family, folders)
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
    policy = load(family, folders, guidance=family.guidances[-1])
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
        assert torch.equal(tensor[0], first.tensors[name][1])
        assert torch.equal(tensor[1], first.tensors[name][3])
        assert not tensor.requires_grad
    policy.encode(["a new prompt"])
    assert calls


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


FRESH = """
import json, sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    pipe = DiffusionPipeline.from_pretrained(job["base"])
    if job["lora"]:
        pipe.load_lora_weights(job["lora"])
    pipe.set_progress_bar_config(disable=True)
    noise = torch.load(job["noise"])
    call = lambda kind: pipe(
        job["prompts"], latents=noise.clone(), output_type=kind, **job["arguments"]
    ).images
    torch.save([call("latent"), call("pt")], job["answer"])
assert "chunkgrpo" not in sys.modules
"""


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """Train and save every family in every way, and let stock diffusers sample the results."""
    found, jobs = {}, []
    for family in FAMILIES:
        for kind, adaptation in ADAPTATIONS.items():
            folder = tmp_path_factory.mktemp(f"{family.name}_{kind}")
            policy = load(family, folders, adaptation)
            before = ours(policy).final
            train(policy)
            trajectory = ours(policy)
            policy.save(folder / "saved")
            torch.save(trajectory.states[:, 0].clone(), folder / "noise.pt")
            job = {
                "base": str(folder / "saved" if kind == "full" else folders[family.name]),
                "lora": "" if kind == "full" else str(folder / "saved"),
                "prompts": PROMPTS,
                "noise": str(folder / "noise.pt"),
                "arguments": stock_arguments(family),
                "answer": str(folder / "answer.pt"),
            }
            jobs.append(job)
            images = policy.decode(trajectory.final)
            found[family.name, kind] = (before, trajectory.final, images, folder)
    listing = tmp_path_factory.mktemp("jobs") / "jobs.json"
    listing.write_text(json.dumps(jobs))
    subprocess.run([sys.executable, "-c", FRESH, listing], check=True, timeout=300)
    return found


@pytest.mark.parametrize("kind", ADAPTATIONS)
def test_stock_diffusers_reproduces_what_was_saved(family, kind, saved):
    before, final, images, folder = saved[family.name, kind]
    assert (final - before).abs().max() > 0.05  # training did something
    latents, stock_images = torch.load(folder / "answer.pt")
    assert_close(latents, final)
    assert_close(stock_images, images)


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
    assert "StableDiffusion3Pipeline" in message

    def offline(*_):
        raise OSError("cannot reach the hub\nand much more")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", offline)
    assert "cannot reach the hub" in refusal("owner/name")


def test_what_does_not_fit_is_refused(family, folders):
    folder = folders[family.name]
    with pytest.raises(ValueError, match="32 x 33 must be divisible by 8"):
        load_policy(folder, size=(32, 33))
    with pytest.raises(ValueError, match="unknown method 'lokr'; known: lora, full, none"):
        Adaptation("lokr")
    with pytest.raises(ValueError, match="no_such_module"):
        load_policy(folder, Adaptation(targets=("no_such_module",)))
    with pytest.raises(
        ValueError, match="unknown precision 'fp8'; known: bf16, bf16-pure, fp16, fp32"
    ):
        load_policy(folder, precision="fp8")
