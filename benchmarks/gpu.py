# SPDX-License-Identifier: Apache-2.0
"""Time training iterations of FLUX.1-dev and Stable Diffusion 3.5 medium, and print one table.

Both at their true architecture with random weights, made on the device: nothing is downloaded, and
text encoders are replaced by random embeddings of the true shape. Without a CUDA device, tiny
networks go through the same code: a check, not a measurement.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.chunk_loss import ChunkLoss
from chunkgrpo.core import (
    FlowDiffusion,
    Transition,
    UniformSelection,
    make_sigmas,
    paper_plan,
    whole_plan,
)
from chunkgrpo.credit import Credit
from chunkgrpo.estimate import ACCELERATORS
from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.architecture import Architecture, build_network
from chunkgrpo.policies.counting import NetworkUse, decoder_work, network_work
from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards.scoring import Scorer
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.ema import Averaging
from chunkgrpo.runtime.optimizers import Optimization
from chunkgrpo.train.evaluating import Evaluator
from chunkgrpo.train.loop import Budget, Trainer
from chunkgrpo.types import Conditioning, Prompt

VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024,
    "scaling_factor": 1.0, "shift_factor": 0.0, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19,
    "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16,
    "out_channels": 16, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
# The same kinds of network, but next to nothing of each.
TINY = {
    "flux": {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 6, 6],
    },
    "sd3.5-medium": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
        "caption_projection_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
        "dual_attention_layers": [0],
    },
}  # fmt: skip
TINY_VAE = {
    "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 4, "sample_size": 64,
}  # fmt: skip
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
           "to_add_out")  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model to be measured.

    Attributes:
        name: Of the table.
        pipeline: Class of diffusers.
        policy: Module and class of ours.
        transformer, vae: Configurations.
        text: Rows of the longest text encoder.
        clip: Rows that come before them.
    """

    name: str
    pipeline: str
    policy: tuple[str, str]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: int
    clip: int = 0

    @property
    def architecture(self) -> Architecture:
        """For counting operations."""
        encoders = (("CLIP", {"max_position_embeddings": self.clip}),) if self.clip else ()
        return Architecture(self.pipeline, self.transformer, self.vae, encoders)

    def tiny(self) -> Model:
        """Return the check's version."""
        transformer = {**self.transformer, **TINY[self.name]}
        vae = {**self.vae, **TINY_VAE}
        return replace(self, transformer=transformer, vae=vae, text=4, clip=self.clip and 3)


MODELS = {
    "flux": Model(
        "flux", "FluxPipeline", ("chunkgrpo.policies.flux", "FluxPolicy"), FLUX, VAE, 512
    ),
    "sd3.5-medium": Model(
        "sd3.5-medium", "StableDiffusion3Pipeline",
        ("chunkgrpo.policies.sd3", "StableDiffusion3Policy"), SD35_MEDIUM, VAE, 256, 77,
    ),
}  # fmt: skip


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Make networks on a device and in a type, without a copy elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_policy(model: Model, size: int, rank: int, device: str) -> PipelinePolicy:
    """Build a policy of random weights: frozen ones in bfloat16 on CUDA, the LoRA in float32."""
    import diffusers

    frozen = torch.float32 if device == "cpu" else torch.bfloat16
    with made_on(device, frozen):
        parts = {"transformer": build_network(model.transformer), "vae": build_network(model.vae)}
    absent = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    if model.clip:
        absent |= dict.fromkeys(["text_encoder_3", "tokenizer_3"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = getattr(diffusers, model.pipeline)(scheduler=scheduler, **parts, **absent)
    base = getattr(importlib.import_module(model.policy[0]), model.policy[1])

    class Textless(base):
        """Answers prompts with random embeddings."""

        def encode_texts(self, prompts: list[str], negative_prompts: list[str]) -> Conditioning:
            """Draw embeddings of the true shape."""
            c, rows, length = model.transformer, len(prompts), model.clip + model.text
            tensors: dict[str, Tensor] = {
                "joint": torch.randn(rows, length, c["joint_attention_dim"], device=self.device),
                "pooled": torch.randn(rows, c["pooled_projection_dim"], device=self.device),
            }
            if model.pipeline == "FluxPipeline":
                tensors["ids"] = torch.zeros(rows, length, 3, device=self.device)
            return Conditioning(tensors)

    return Textless.from_options(
        pipe, Adaptation(rank=rank, alpha=float(rank), targets=TARGETS), size=(size, size),
        max_sequence_length=model.text, decode_batch=2,
        precision="fp32" if device == "cpu" else "bf16",
    )  # fmt: skip


class Brightness:
    """A reward that costs nothing."""

    name = "brightness"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images."""
        return images.flatten(1).float().mean(1).cpu()


@dataclass(frozen=True)
class Row:
    """A line of the table; times in seconds, memory in bytes, utilisation as a share."""

    name: str
    rank: int
    size: int
    batch: int
    rolled: float
    trained: float
    iteration: float
    rollout_use: float
    train_use: float
    use: float
    memory: int

    def cells(self) -> list[str]:
        """Return the line."""
        times = [f"{t:.4g}" for t in (self.rolled, self.trained, self.iteration)]
        shares = [f"{100 * u:.1f}" for u in (self.rollout_use, self.train_use, self.use)]
        head = [self.name, str(self.rank), str(self.size), str(self.batch)]
        return [*head, *times, *shares, f"{self.memory / 2**30:.1f}"]


HEADS = ("model", "LoRA", "px", "batch", "s / rolled-out image", "s / trained image-step",
         "s / image, iteration", "rollout %", "train %", "all %", "peak GiB")  # fmt: skip


def measure(
    model: Model, policy: PipelinePolicy, rank: int, size: int, batch: int, steps: int,
    images: int, peak_rate: float,
) -> Row:  # fmt: skip
    """Time one iteration after a short warm-up.

    Model FLOPs are those of the networks as counted; what attention kernels compute again is not
    among them. Training holds the forwards that find the second update's ratios.
    """
    device = policy.device
    chosen = paper_plan(16) if steps == 17 else whole_plan(steps - 1)
    sampler = Sampler(
        Transition(FlowDiffusion(0.7)), make_sigmas(steps), same_noise=True, batch_size=batch
    )
    algorithm = ChunkGRPO(
        chosen,
        sampler.transition,
        ChunkLoss(updates=2, micro_batch=batch),
        UniformSelection(0.5 if steps == 17 else 1.0),
    )
    prompts, reward = PromptSet((Prompt("a prompt"),)), Brightness()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            policy, sampler, algorithm, Credit(), Scorer([(reward, 1.0)]), prompts,
            Evaluator(prompts, reward, sampler.sigmas), Path(folder),
            Budget(prompts=1, group_size=images), Optimization(), Averaging(decay=0.0),
        )  # fmt: skip
        warm_up(policy, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        record = trainer.train_once()
        seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    use = NetworkUse(
        (size, size), model.text, sampling_rows=1, training_rows=1, rank=rank, targets=TARGETS,
        precision="fp32", plain=True,
    )  # fmt: skip
    work = network_work(model.architecture, use)
    _, decoding = decoder_work(model.architecture, (size, size))
    pairs, phases = record["trained_pairs"], record["phase_seconds"]
    rolled = record["rollout_evaluations"] * work.sampling.forward
    # Ratios of the second update: a forward for each of its pairs, also those then found idle.
    again = (pairs + record["idle_pairs"]) / 2 * work.training.forward
    trained = again + pairs * (work.training.forward + work.training.backward)
    total = rolled + trained + images * decoding.forward
    return Row(
        model.name, rank, size, batch,
        phases["rollout"] / images, phases["train"] / max(pairs, 1), seconds / images,
        rolled / phases["rollout"] / peak_rate, trained / phases["train"] / peak_rate,
        total / seconds / peak_rate, memory,
    )  # fmt: skip


def warm_up(policy: PipelinePolicy, batch: int) -> None:
    """Choose kernels and fill the allocator, at the batch that is measured."""
    conditioning = policy.encode(["a prompt"]).repeat_interleave(batch)
    x = torch.randn(batch, *policy.latent_shape, device=policy.device)
    for _ in range(2):
        sigma = torch.full((batch,), 0.5, device=policy.device)
        policy.velocity(x, sigma, conditioning).square().mean().backward()
        with torch.no_grad():
            policy.velocity(x, sigma, conditioning)
    policy.decode(x[:1])
    for parameter in policy.parameters():
        parameter.grad = None


def fitting(run: Callable[[int], Row], batch: int) -> Row | None:
    """Halve the batch until it fits into memory; None where a single row does not."""
    while batch:
        with suppress(torch.cuda.OutOfMemoryError):
            return run(batch)
        # Not while the error is handled: its traceback holds the tensors that did not fit.
        gc.collect()
        torch.cuda.empty_cache()
        batch //= 2
    return None


def peak_rate_of(device: str, given: float | None) -> tuple[float, str]:
    """Return the peak rate in FLOP/s, and where it is from: given, a table, or measured."""
    if given:
        return 1e12 * given, "given"
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
        for accelerator in ACCELERATORS:
            if accelerator.name.removeprefix("RTX ") in name:
                return accelerator.rate("bf16"), f"of {accelerator.name}, dense bf16"
    side = 512 if device == "cpu" else 8192
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, a)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best, "of a large matrix product here"


def main() -> None:
    """Measure what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 720])
    parser.add_argument("--batch", type=int, default=8, help="rows a forward; halved until it fits")
    parser.add_argument("--steps", type=int, default=17, help="sampler steps")
    parser.add_argument("--images", type=int, default=8, help="images of the one prompt")
    parser.add_argument("--peak", type=float, help="peak rate in TFLOP/s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, check = options.device, options.device == "cpu"
    rate, source = peak_rate_of(device, options.peak)
    where = "CPU: a check, not a measurement" if check else torch.cuda.get_device_name(device)
    sizes = [64] if check else options.sizes
    ranks = [4] if check else options.ranks
    steps, images = (3, 2) if check else (options.steps, options.images)
    batches = [1, 2] if check else [1, options.batch]
    notes = [f"{where}; torch {torch.__version__}; {steps} steps, {images} images an iteration",
             f"peak rate {rate / 1e12:.3g} TFLOP/s ({source})"]  # fmt: skip
    rows: list[Row] = []
    for name in options.models:
        model = MODELS[name].tiny() if check else MODELS[name]
        if importlib.util.find_spec(model.policy[0]) is None:
            notes.append(f"{name} is left out: this installation has no {model.policy[0]}")
            continue
        for rank in ranks:
            for size in sizes:
                policy = build_policy(model, size, rank, device)
                for batch in batches:

                    def run(batch: int, m: Model = model, p: PipelinePolicy = policy,
                            r: int = rank, s: int = size) -> Row:  # fmt: skip
                        return measure(m, p, r, s, batch, steps, images, rate)

                    found = fitting(run, batch)
                    if found is None:
                        notes.append(f"{name}, rank {rank}, {size} px does not fit at batch 1")
                    else:
                        rows.append(found)
                        print(*found.cells(), flush=True)
                del policy
                if not check:
                    torch.cuda.empty_cache()
    print("\n" + "\n".join(notes) + "\n")
    print("| " + " | ".join(HEADS) + " |")
    print("|" + "---|" * len(HEADS))
    for row in rows:
        print("| " + " | ".join(row.cells()) + " |")


if __name__ == "__main__":
    main()
