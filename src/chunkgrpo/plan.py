# SPDX-License-Identifier: Apache-2.0
"""What a run will do and cost, told before anything is loaded.

Only the ``config.json`` files of the model are read. Operations and memory come from the networks
themselves, called on tensors without content (``policies.counting``); time is operations over
the accelerator's peak rate times a stated utilisation.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chunkgrpo.config import (
    Config,
    ConfigError,
    check_algorithm,
    check_plan,
    check_precision,
    embedding_folder,
    num_kept,
    num_planned,
    num_trained,
    resolve_model,
)
from chunkgrpo.methods import Cost, chunk_sizes, iteration_cost

if TYPE_CHECKING:
    from rich.console import Console

    from chunkgrpo.policies.counting import NetworkWork, Work

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """A GPU as its maker describes it.

    Attributes:
        name: Short.
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
        name: What is done.
        rows: How many latents or images it is done to.
        flops: Floating-point operations.
    """

    name: str
    rows: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost.

    Attributes:
        config: The run.
        size: Height and width of images in pixels.
        text: Text rows of a prompt.
        network: The transformer's size, and its cost a call.
        cost: Latents an iteration passes through it.
        phases: Of one iteration.
        evaluation: Operations of all evaluations of the run together.
        memory: Bytes at the peak of each phase.
        resident: Bytes that stay, by what they are.
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
        """Images an iteration."""
        return self.config.sampling.prompts * self.config.sampling.group_size

    def seconds(self, accelerator: Accelerator, utilisation: float, gpus: int = 1) -> float:
        """Return the time of one iteration on GPUs that share its images out."""
        share = math.ceil(self.images / gpus) / self.images
        rate = accelerator.rate(self.config.model.precision) * utilisation
        return self.iteration_flops * share / rate

    def hours(self, accelerator: Accelerator, utilisation: float, gpus: int = 1) -> float:
        """Return the GPU-hours of the run: those that idle count as well."""
        seconds = self.seconds(accelerator, utilisation, gpus) * self.config.iterations * gpus
        rate = accelerator.rate(self.config.model.precision) * utilisation
        return (seconds + self.evaluation / rate) / 3600


def make_plan(config: Config) -> Plan:
    """Work out what a run will do and cost.

    Raises:
        ConfigError: Or another ValueError, if the run could not start.
    """
    from chunkgrpo.policies import counting, network_inputs
    from chunkgrpo.policies.architecture import read_architecture

    m, s, o, e = config.model, config.sampling, config.objective, config.evaluation
    check_algorithm(config)
    if o.algorithm == "chunk_grpo":
        check_plan(config)
    if (m.height is None) != (m.width is None):
        raise ConfigError("model.height and model.width must be given together")
    check_precision(m)
    a = read_architecture(resolve_model(m.path))
    size, text = a.size(m.height, m.width), network_inputs.text_rows(a, m.max_sequence_length)
    cost, images, steps = iteration_cost(config), s.prompts * s.group_size, num_trained(config) + 1
    pairs = math.ceil(cost.pairs / o.updates)
    true_cfg = float(m.options.get("true_cfg", 1.0))
    guidance_rows = network_inputs.rows_of_guidance(a, m.guidance, true_cfg)
    use = counting.NetworkUse(
        size,
        text,
        sampling_rows=min(s.batch_size, images),
        training_rows=max(1, min(o.micro_batch, pairs)),
        guidance_rows=guidance_rows,
        method=m.method,
        rank=m.rank,
        targets=trained_modules(config, a.pipeline),
        precision=m.precision,
        lower=m.lower_frozen and m.method != "full",
        checkpointing=m.gradient_checkpointing,
        plain=m.device == "cpu",  # 'auto' may be planned on a laptop and run elsewhere
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
    looks = config.iterations // e.every if e.every else 0
    judged = 2 * e.final_prompts * e.final_seeds + looks * e.prompts
    evaluation = judged * (steps * sampled + decoding.forward)
    prompts = images * network_inputs.conditioning_bytes(a, text, guidance_rows)
    resident, memory = _memory(config, network, decoding, vae_parameters, size, prompts, a)
    return Plan(config, size, text, network, cost, phases, evaluation, memory, resident)


def trained_modules(config: Config, pipeline: str) -> tuple[str, ...] | None:
    """Return the modules that are trained; for a LoRA the family's where the user names none."""
    from importlib import import_module

    from chunkgrpo.policies.loading import FAMILIES

    if config.model.targets or config.model.method != "lora":
        return config.model.targets
    module, name = FAMILIES[pipeline]
    return tuple(getattr(import_module(module), name).lora_targets)


def _memory(
    config: Config,
    network: NetworkWork,
    decoding: Work,
    vae_parameters: int,
    size: tuple[int, int],
    prompts: int,
    architecture: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what stays in memory, and the peak of each phase, in bytes."""
    from chunkgrpo.policies.counting import text_encoder_parameters
    from chunkgrpo.policies.pipeline import PipelinePolicy

    m, s, o = config.model, config.sampling, config.objective
    images = s.prompts * s.group_size
    elements = (
        architecture.latent_channels
        * (size[0] // architecture.vae_factor)
        * (size[1] // architecture.vae_factor)
    )
    states = num_planned(config) + 1
    compared = o.trust == "kl_mask" or o.ratio == "guard" or o.consistency or o.credit == "gain"
    velocities = num_planned(config) if compared else 0
    # 'auto' may be planned on a laptop and run elsewhere; a CPU has one memory for all.
    on_cpu = m.device == "cpu"
    away = () if on_cpu else m.offload
    low_texts = m.text_encoder_precision == "bf16" or (
        m.text_encoder_precision == "auto" and not on_cpu
    )
    encoders = (2 if low_texts else 4) * text_encoder_parameters(architecture)
    vae, copy = 4 * vae_parameters, 4 * network.trainable if m.method == "full" else 0
    stored = images * elements * (states * (2 if s.store.dtype == "bfloat16" else 4))
    stored += 4 * images * elements * velocities
    # Two bytes a weight, and two float32 scales for each block of 256.
    moments = 8 if config.optimizer.kind == "adamw" else 2 + 8 / 256
    resident: dict[str, float] = {
        "transformer": network.nbytes,
        "VAE": 0 if "vae" in away else vae,
        "text encoders": encoders
        if embedding_folder(m) is None and "text_encoders" not in away
        else 0,
        "optimizer and averaged weights": (moments + 4 * (config.optimizer.ema > 0))
        * network.trainable,
        "copy of the base": 0 if "reference" in away else copy,
        "trajectories": 0 if s.store.place == "host" and not on_cpu else stored,
        "encoded prompts": prompts,  # a row for each image, on the device always
    }
    total = sum(resident.values())
    most = inspect.signature(PipelinePolicy.__init__).parameters["decode_batch"].default
    most = 1 if m.vae_slicing else m.options.get("decode_batch", most)
    batch = min(most, s.batch_size, images)
    visiting_copy = copy - resident["copy of the base"] if o.kl else 0
    memory = {
        "encode": resident["transformer"] + resident["VAE"] + encoders,
        "rollout": total + network.sampling.peak,
        "decode": total + (vae - resident["VAE"]) + decoding.peak * batch,
        "train": total + visiting_copy + network.training.peak,
    }
    return resident, memory


# --- telling ------------------------------------------------------------------------------------


def geometry(plan: Plan) -> list[str]:
    """Return what happens in an iteration, in plain words, a sentence or two a line."""
    config, cost = plan.config, plan.cost
    s, c, o = config.sampling, config.chunks, config.objective
    lines = [
        f"Each iteration draws {s.prompts} prompts x {s.group_size} images = {plan.images} images "
        f"of {plan.size[0]} x {plan.size[1]} pixels in {num_trained(config) + 1} sampler steps."
    ]
    if o.algorithm == "chunk_grpo":
        planned = num_planned(config)
        sizes = chunk_sizes(config)
        about = "about " if c.plan in ("adaptive", "optimal") else ""
        kept = num_kept(config)
        each = "each image" if kept == plan.images else f"the {kept} images of largest advantage"
        lines.append(
            f"{planned} of {num_trained(config)} trainable steps are stochastic and form {about}"
            f"{_count(len(sizes), 'chunk')} of {_listed(sizes)}; "
            f"{_number(cost.pairs / kept)} steps of {each} are trained, in the mean."
        )
    else:
        lines.append(
            f"{_number(cost.pairs / plan.images)} noised copies of each image are trained."
        )
    pairs, trained = cost.pairs / o.updates, num_kept(config) / o.updates
    lines += [
        f"An iteration takes {_count(o.updates, 'optimizer step')} of "
        f"{_number(trained)} images = {_number(pairs)} (image, step) pairs each, "
        f"in {_count(math.ceil(pairs / o.micro_batch), 'micro-batch', 'es')} of at most "
        f"{o.micro_batch}. Memory grows with the micro-batch, not with the chunks.",
        f"The run: {_count(config.iterations, 'iteration')} = "
        f"{_count(config.iterations * o.updates, 'optimizer step')} and "
        f"{config.iterations * plan.images:,} images from "
        f"{config.iterations * s.prompts:,} draws of a prompt.",
    ]
    return lines


def sharing(plan: Plan, gpus: int) -> tuple[str, ...]:
    """Return what a GPU holds where some share the batch: images, pairs and micro-batches."""
    o = plan.config.objective
    images = math.ceil(plan.images / gpus)
    pairs = plan.cost.pairs / o.updates / gpus
    note = ""
    if gpus > plan.images:
        note = f"{gpus - plan.images} of them idle: raise sampling.prompts"
    elif images * gpus > plan.images:
        note = "uneven: some wait"
    elif gpus > 1 and pairs < o.micro_batch:
        note = "micro-batches not full"
    batches = str(math.ceil(pairs / o.micro_batch))
    return (str(gpus), str(images), _number(pairs), batches, note)


def print_plan(
    console: Console,
    plan: Plan,
    utilisation: float,
    price: float | None = None,
    gpus: tuple[int, ...] = (1, 8, 64),
) -> None:
    """Print a plan: words first, then operations, memory, time and money.

    Args:
        console: Where to.
        plan: What was worked out.
        utilisation: Share of the peak rate that the run reaches, in (0, 1].
        price: Of a GPU-hour, in any currency.
        gpus: Numbers of GPUs to compare.

    Raises:
        ConfigError: If the utilisation, the price or a number of GPUs makes no sense.
    """
    from rich.table import Table

    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation {utilisation} must lie in (0, 1], e.g. 0.4")
    if price is not None and price < 0:
        raise ConfigError(f"price {price} must not be negative")
    if any(n < 1 for n in gpus):
        raise ConfigError(f"numbers of GPUs must be at least 1, got {min(gpus)}")
    m, network = plan.config.model, plan.network
    share = 100 * network.trainable / network.parameters
    console.print(f"[bold]{plan.config.name}[/bold]: {m.path}", highlight=False)
    said = [
        *geometry(plan),
        f"The transformer has {_big(network.parameters)} weights; {m.method} trains "
        f"{_big(network.trainable)} ({share:.{0 if share >= 10 else 2}f} %).",
    ]
    for line in said:
        console.print(line, highlight=False)

    table = Table("GPUs", "images a GPU", "pairs a GPU and optimizer step", "micro-batches", "")
    for number in gpus:
        table.add_row(*sharing(plan, number))
    table.title = "The same batch shared out; an optimizer step stays the same"
    console.print(table)

    table = Table("phase", "rows", "TFLOP", "share", title="One iteration")
    for phase in plan.phases:
        part = f"{100 * phase.flops / plan.iteration_flops:.1f} %"
        table.add_row(phase.name, f"{phase.rows:,}", f"{phase.flops / 1e12:,.4g}", part)
    table.add_row("[bold]all", "", f"{plan.iteration_flops / 1e12:,.4g}", "")
    console.print(table)

    table = Table("at the peak of", "GiB", "of which", title="Estimated memory of one GPU")
    held = ", ".join(f"{k} {_gib(v)}" for k, v in plan.resident.items() if v / GIB >= 0.005)
    for name, size in plan.memory.items():
        table.add_row(name, _gib(size), held if name == "train" else "")
    console.print(table)

    heads = ["accelerator", "memory", "s an iteration", "GPU-hours a run"]
    if price is not None:
        heads.append(f"cost at {price:g} an hour")
    table = Table(*heads, title=f"Time at {100 * utilisation:g} % of the peak rate, one GPU")
    for accelerator in ACCELERATORS:
        fits = plan.peak <= accelerator.memory * 1e9
        verdict = "fits" if fits else "[red]does not fit[/red]"
        hours = plan.hours(accelerator, utilisation)
        cells = [
            accelerator.name,
            f"{accelerator.memory:g} GB: {verdict}",
            f"{plan.seconds(accelerator, utilisation):,.3g}",
            f"{hours:,.3g}",
        ]
        table.add_row(*cells, *([f"{hours * price:,.2f}"] if price is not None else []))
    console.print(table)
    if len(gpus) > 1:
        table = Table("accelerator", *(f"{n} GPU{'s' * (n > 1)}" for n in gpus))
        table.title = "Seconds an iteration, communication not counted"
        for accelerator in ACCELERATORS:
            times = (plan.seconds(accelerator, utilisation, n) for n in gpus)
            table.add_row(accelerator.name, *(f"{t:,.3g}" for t in times))
        console.print(table)
    console.print(
        "Not counted: reward models, encoding prompts, loading, communication between GPUs. "
        "GPU-hours include the evaluations.",
        highlight=False,
    )


def _listed(sizes: tuple[int, ...]) -> str:
    *head, last = sizes
    if not head or set(head) == {last}:
        return _count(last, "step") + (" each" if head else "")
    return ", ".join(map(str, head)) + f" and {_count(last, 'step')}"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else plural}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"


def _big(value: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _gib(value: float) -> str:
    return f"{value / GIB:,.3g}"
