# SPDX-License-Identifier: Apache-2.0
"""An estimate of what a run will do and cost, before anything is loaded.

Only the ``config.json`` files of the model are read. Operations and memory come from the networks
themselves, called on tensors without data (``policies.counting``); time is operations over
the accelerator's peak rate times a stated utilisation.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkgrpo.config import Config
from chunkgrpo.config.build import embedding_folder, resolve_model
from chunkgrpo.config.derived import num_trained
from chunkgrpo.config.rules import check, check_training
from chunkgrpo.config.schema import ChunkGRPOObjective, LoraAdaptation
from chunkgrpo.cost import Cost, iteration_cost

if TYPE_CHECKING:
    from chunkgrpo.policies.counting import NetworkWork, Work

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """A GPU, by its manufacturer's specifications.

    Attributes:
        name: Short name.
        bf16: Peak dense bfloat16 rate with float32 accumulation, TFLOP/s.
        fp32: Peak float32 rate without tensor cores, TFLOP/s.
        memory: In units of 10^9 bytes.
    """

    name: str
    bf16: float
    fp32: float
    memory: float

    def rate(self, precision: str) -> float:
        """Return the peak rate of a precision, FLOP/s."""
        return 1e12 * (self.fp32 if precision == "fp32" else self.bf16)


ACCELERATORS = (
    Accelerator("H100", 989.4, 66.9, 80),
    Accelerator("H200", 989.4, 66.9, 141),
    Accelerator("A100", 312.0, 19.5, 80),
    Accelerator("RTX 4090", 165.2, 82.6, 24),
)
"""The SXM versions of H100, H200 and A100 (80 GB), and GeForce RTX 4090.

Sources: NVIDIA H100 Tensor Core GPU Architecture, table 2 (989.4 bf16, 66.9 fp32; the datasheet's
1,979 is with sparsity); NVIDIA H200 datasheet (the same rates, 141 GB); NVIDIA A100 datasheet (312,
19.5); NVIDIA Ada GPU Architecture, appendix A (165.2 for FP16/BF16 with FP32 accumulate, 82.6).
"""


@dataclass(frozen=True)
class Phase:
    """A part of an iteration.

    Attributes:
        name: Which part.
        rows: Number of latents or images.
        flops: Floating-point operations.
    """

    name: str
    rows: float
    flops: float


@dataclass(frozen=True)
class Estimate:
    """What a run will do and cost.

    Attributes:
        config: The run.
        size: Height and width of images in pixels.
        text: Text tokens of a prompt.
        network: The transformer's size, and the cost of a call.
        cost: Network rows of an iteration.
        phases: Phases of one iteration.
        evaluation: Operations of all evaluations of the run together.
        memory: Bytes at the peak of each phase.
        resident: Bytes that stay allocated, by what they hold.
        disk: What the run writes to disk.
    """

    config: Config
    size: tuple[int, int]
    text: int
    network: NetworkWork
    cost: Cost
    phases: tuple[Phase, ...]
    evaluation: float
    memory: dict[str, float]
    resident: dict[str, float]
    disk: Space

    @property
    def iteration_flops(self) -> float:
        """Operations of one iteration."""
        return sum(phase.flops for phase in self.phases)

    @property
    def run_flops(self) -> float:
        """Operations of the whole run, evaluations included."""
        return self.config.iterations * self.iteration_flops + self.evaluation

    @property
    def peak(self) -> float:
        """Bytes at the highest peak."""
        return max(self.memory.values())

    @property
    def images(self) -> int:
        """Images per iteration."""
        return self.config.sampling.images

    def seconds(self, accelerator: Accelerator, utilisation: float, gpus: int = 1) -> float:
        """Return the seconds of one iteration on GPUs that share its images."""
        share = math.ceil(self.images / gpus) / self.images
        rate = accelerator.rate(self.config.model.precision) * utilisation
        return self.iteration_flops * share / rate

    def hours(self, accelerator: Accelerator, utilisation: float, gpus: int = 1) -> float:
        """Return the GPU-hours of the run, those of idle GPUs included."""
        seconds = self.seconds(accelerator, utilisation, gpus) * self.config.iterations * gpus
        rate = accelerator.rate(self.config.model.precision) * utilisation
        return (seconds + self.evaluation / rate) / 3600


@dataclass(frozen=True)
class Space:
    """What a run writes to disk, in bytes.

    Attributes:
        each: One checkpoint.
        kept: Checkpoints that are there at once, the one that is being written among them.
        model: The tuned model at the end.
    """

    each: float
    kept: int
    model: float

    @property
    def in_all(self) -> float:
        """All of it together."""
        return self.each * self.kept + self.model


def moment_bytes(config: Config) -> float:
    """Return the bytes of the optimizer's two moments of a weight."""
    # In 8 bits two bytes, and two float32 scales for each block of 256.
    return 8 if config.optimizer.name == "adamw" else 2 + 8 / 256


def disk_space(config: Config, trainable: float, pipeline: float) -> Space:
    """Return what a run writes to disk.

    A checkpoint holds the trained weights, their average and the optimizer's moments; of a LoRA
    also a copy for diffusers, and of methods with a second policy its weights.

    Args:
        config: The run.
        trainable: Number of trained weights.
        pipeline: Bytes of the whole pipeline, which full fine-tuning saves; a LoRA is saved alone.
    """
    o = config.objective
    second = getattr(o, "old", None) or getattr(o, "average", None)
    full = config.model.adaptation.kind == "full"
    model = pipeline if full else 4 * trainable
    each = (4 + 4 + moment_bytes(config) + (4 if second else 0)) * trainable
    each += 0 if full else model
    return Space(each, kept_checkpoints(config) + 1, model)


def kept_checkpoints(config: Config) -> int:
    """Return how many finished checkpoints there are at once, at most."""
    c, iterations = config.checkpoints, config.iterations
    written = math.ceil(iterations / c.every)
    steady = iterations // c.keep_every if c.keep_every else 0
    best = int(c.keep_best and bool(config.evaluation.every))
    return min(c.keep_last + best, written + best) + steady


def make_estimate(config: Config) -> Estimate:
    """Estimate what a run will do and cost.

    Raises:
        ConfigError: If the run could not start; or another ValueError.
    """
    from chunkgrpo.policies import counting, network_inputs
    from chunkgrpo.policies.architecture import read_architecture

    m, s, o, e = config.model, config.sampling, config.objective, config.evaluation
    check(config)
    check_training(m)
    a = read_architecture(resolve_model(m.path))
    size, text = a.size(m.height, m.width), network_inputs.text_rows(a, m.max_sequence_length)
    cost, images, steps = iteration_cost(config), s.images, num_trained(config) + 1
    pairs = math.ceil(cost.pairs / o.updates)
    guidance_rows = network_inputs.rows_of_guidance(
        a, m.guidance, float(m.options.get("true_cfg", 1.0))
    )
    use = counting.NetworkUse(
        size,
        text,
        sampling_rows=min(s.batch_size, images),
        training_rows=max(1, min(o.micro_batch, pairs)),
        guidance_rows=guidance_rows,
        method=m.adaptation.kind,
        rank=m.adaptation.rank if isinstance(m.adaptation, LoraAdaptation) else 0,
        targets=trained_modules(config, a.pipeline),
        precision=m.precision,
        lower=m.lower_frozen and m.adaptation.kind != "full",
        checkpointing=m.gradient_checkpointing,
        plain=m.device == "cpu",  # 'auto' may be estimated on a laptop and run elsewhere
    )
    network = counting.network_work(a, use)
    vae_parameters, decoding = counting.decoder_work(a, size, m.precision)
    sampled = network.sampling.forward / network.sampling.rows
    measured = network.training.forward / network.training.rows
    backward = network.training.backward / network.training.rows
    phases = (
        Phase("rollout: forward", cost.rollout, cost.rollout * sampled),
        Phase("decode: VAE", cost.rewards, cost.rewards * decoding.forward),
        Phase("train: forward without gradient", cost.measured, cost.measured * measured),
        Phase("train: forward", cost.trained, cost.trained * measured),
        Phase("train: backward", cost.trained, cost.trained * backward),
    )
    small = config.iterations // e.every if e.every else 0
    judged = 2 * e.final_prompts * e.final_seeds + small * e.prompts
    evaluation = judged * (steps * sampled + decoding.forward)
    prompts = s.prompts * network_inputs.conditioning_bytes(a, text, guidance_rows)
    elements = a.latent_channels * (size[0] // a.vae_factor) * (size[1] // a.vae_factor)
    weights = Weights(network, decoding, 4 * vae_parameters, counting.text_encoder_parameters(a))
    kept = images * elements * cost.stored
    resident, memory = _memory(config, weights, kept, prompts)
    whole = 4 * (network.parameters + weights.text) + weights.vae
    disk = disk_space(config, network.trainable, whole)
    return Estimate(config, size, text, network, cost, phases, evaluation, memory, resident, disk)


def trained_modules(config: Config, pipeline: str) -> tuple[str, ...] | None:
    """Return the modules that are trained; for a LoRA without targets those of the family."""
    from importlib import import_module

    from chunkgrpo.policies.loading import FAMILIES

    adaptation = config.model.adaptation
    if adaptation.targets or adaptation.kind != "lora":
        return adaptation.targets
    module, name = FAMILIES[pipeline]
    return tuple(getattr(import_module(module), name).lora_targets)


@dataclass(frozen=True)
class Weights:
    """The networks of a run.

    Attributes:
        network: The transformer.
        decoding: Decoding of one image.
        vae: Bytes of the VAE.
        text: Number of weights of all text encoders.
    """

    network: NetworkWork
    decoding: Work
    vae: int
    text: int


def _memory(
    config: Config, weights: Weights, stored: float, prompts: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return resident memory by what it holds, and the peak of each phase, in bytes."""
    from chunkgrpo.policies.pipeline import PipelinePolicy

    m, s, o, network = config.model, config.sampling, config.objective, weights.network
    # 'auto' may be estimated on a laptop and run elsewhere; a CPU has one memory for all.
    on_cpu = m.device == "cpu"
    away = () if on_cpu else m.offload
    low_texts = m.text_encoder_precision == "bf16" or (
        m.text_encoder_precision == "auto" and not on_cpu
    )
    encoders = (2 if low_texts else 4) * weights.text
    vae, copy = weights.vae, 4 * network.trainable if m.adaptation.kind == "full" else 0
    moments = moment_bytes(config)
    resident: dict[str, float] = {
        "transformer": network.nbytes,
        "VAE": 0 if "vae" in away else vae,
        "text encoders": encoders
        if embedding_folder(m) is None and "text_encoders" not in away
        else 0,
        "optimizer and averaged weights": (moments + 4 * (config.ema.decay > 0))
        * network.trainable,
        "copy of the base": 0 if "reference" in away else copy,
        "trajectories": 0 if s.store.place == "host" and not on_cpu else stored,
        "encoded prompts": prompts,  # a row for each prompt, on the device always
    }
    total = sum(resident.values())
    most = inspect.signature(PipelinePolicy.__init__).parameters["decode_batch"].default
    most = 1 if m.vae_slicing else m.options.get("decode_batch", most)
    batch = min(most, s.batch_size, s.images)
    uses_reference = o.kl.weight if isinstance(o, ChunkGRPOObjective) else o.kl
    visiting_copy = copy - resident["copy of the base"] if uses_reference else 0
    memory = {
        "encode": resident["transformer"] + resident["VAE"] + encoders,
        "rollout": total + network.sampling.peak,
        "decode": total + (vae - resident["VAE"]) + weights.decoding.peak * batch,
        "train": total + visiting_copy + network.training.peak,
    }
    return resident, memory
