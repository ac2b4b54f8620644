# SPDX-License-Identifier: Apache-2.0
"""Typed, strict configuration, and how a run is built from it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
    from chunkgrpo.algorithms.forward import AWM, DiffusionNFT
    from chunkgrpo.core.chunks import ChunkPlan, Selection
    from chunkgrpo.core.objectives import TrustRegion
    from chunkgrpo.core.sde import Kernel
    from chunkgrpo.core.windows import (
        FixedWindow,
        RandomWindow,
        SlidingWindow,
        WindowSchedule,
    )
    from chunkgrpo.policies.execution import Execution
    from chunkgrpo.policies.pipeline import PipelinePolicy
    from chunkgrpo.policies.protocol import Policy
    from chunkgrpo.prompts import PromptSet
    from chunkgrpo.rollout import Tail
    from chunkgrpo.train import Trainer


class ConfigError(ValueError):
    """A configuration that can not be run; the message says what to change."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """The model and what of it is trained."""

    path: str = Field(default="shapes", description="'shapes', a pipeline folder, or a hub id")
    device: str = Field(default="auto", description="'auto', 'cpu' or 'cuda'")
    precision: Literal["bf16", "bf16-pure", "fp16", "fp32"] = Field(
        default="bf16",
        description="of the network's arithmetic; what is trained, transitions and densities are "
        "float32 in all; 'fp16' is for sampling alone",
    )
    lower_frozen: bool = Field(
        default=True,
        description="keep frozen weights of the transformer's matrix products in model.precision: "
        "the same numbers in half the memory",
    )
    text_encoder_precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="'auto' is bf16 on CUDA and fp32 on CPUs; changes embeddings"
    )
    offload: tuple[Literal["text_encoders", "vae", "reference"], ...] = Field(
        default=(),
        description="parts that lie in host memory while not used; 'reference' for method 'full'",
    )
    attention_backend: str | None = Field(
        default=None, description="kernel by diffusers' name, e.g. native, flash, _native_cudnn"
    )
    compile: Literal["none", "blocks"] = Field(
        default="none", description="'blocks': torch.compile for each block of the transformer"
    )
    compile_backend: str = Field(default="inductor", description="of torch.compile")
    vae_slicing: bool = Field(default=False, description="decode one image at a time")
    vae_tiling: bool = Field(
        default=False, description="decode large images in tiles, which changes them a little"
    )
    guidance: float = Field(
        default=1.0,
        ge=0,
        description="the pipeline's own number; 1 is off for most",
    )
    height: int | None = Field(default=None, gt=0)
    width: int | None = Field(default=None, gt=0)
    negative_prompt: str = Field(default="", description="of classifier-free guidance")
    max_sequence_length: int | None = Field(
        default=None, ge=1, description="rows of the longest text encoder; null: the pipeline's own"
    )
    timestep: Literal["exact", "floor1000"] | None = Field(
        default=None, description="rounding of the network's time; null: as the scheduler does"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute blocks again in the backward pass; saves memory"
    )
    method: Literal["lora", "full"] = "lora"
    rank: int = Field(default=32, ge=1)
    alpha: float | None = Field(
        default=None, gt=0, description="LoRA alpha; the rank where not given"
    )
    options: dict[str, Any] = Field(
        default={}, description="of the family's policy (docs/models.md), e.g. {true_cfg: 4.0}"
    )
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="names of the modules that get a LoRA (null: those of the family's attention), "
        "or of those that method 'full' trains (null: all)",
    )
    embedding_cache: str | None = Field(
        default="auto",
        description="folder of encoded prompts; 'auto' is the user's cache, and none for the "
        "embedded model; null keeps the text encoders loaded",
    )


class PromptConfig(Section):
    """Prompts to train on and to evaluate with."""

    train: str = Field(
        default="shapes",
        description="'shapes', a .txt, .jsonl, .json or .csv file, or a dataset's folder or name",
    )
    held_out: str = Field(default="shapes", description="the same, for evaluation")
    column: str | None = Field(
        default=None, description="field of the prompt in records; common names are found"
    )
    tasks: tuple[str, ...] | None = Field(
        default=None, description="tasks of the embedded world to train on; all by default"
    )


class RewardConfig(Section):
    """One reward."""

    name: str = Field(
        default="shapes",
        description="a built-in name, package.module:function, or a server's http://host:port",
    )
    weight: float = 1.0
    options: dict[str, Any] = {}


class WatchedConfig(Section):
    """One reward that is logged and not trained on."""

    name: str = Field(description="as of rewards")
    options: dict[str, Any] = {}
    hold: bool = Field(
        default=False,
        description="take out of the advantages what goes with it, so that no rollout raises or "
        "lowers it",
    )


class ScoringConfig(Section):
    """How rewards are combined, and what happens when one misbehaves."""

    combine: Literal["sum", "advantage", "gdpo", "product", "minimum"] = Field(
        default="sum",
        description="'advantage' normalises each reward within its groups before they are added, "
        "'gdpo' then the sum over the batch",
    )
    on_error: Literal["stop", "drop"] = Field(
        default="stop",
        description="a score that is missing, not finite or of the wrong shape: 'stop' ends the "
        "run with all saved, 'drop' takes the image out of its group",
    )
    quantise: bool = Field(
        default=False,
        description="round images to 8 bits first: local and remote rewards see the same pixels",
    )


class WindowConfig(Section):
    """Which steps are stochastic and trained; the others follow the ODE."""

    kind: Literal["all", "fixed", "random", "sliding", "chunk"] = Field(
        default="all", description="'chunk' branches each group at a random chunk of the plan"
    )
    size: int = Field(default=4, ge=1, description="steps of the window")
    start: int = Field(default=0, ge=0, description="of kind 'fixed'")
    low: int = Field(default=0, ge=0, description="of kind 'random': first step it may hold")
    high: int | None = Field(
        default=None, ge=1, description="of kind 'random': steps it lies below"
    )
    every: int = Field(default=25, ge=1, description="of kind 'sliding': iterations at a place")
    stride: int = Field(default=1, ge=1, description="of kind 'sliding': steps it moves by")
    decay: Literal["constant", "linear", "exponential"] = Field(
        default="constant", description="of kind 'sliding': how its stay shortens"
    )
    rate: float = Field(
        default=0.1, gt=0, description="of decay 'exponential': by which share, about, at each step"
    )
    after: int = Field(
        default=13, ge=0, description="of decay 'exponential': last start whose stay is a whole one"
    )
    indices: tuple[int, ...] | Literal["merged"] = Field(
        default=(),
        description="of kind 'chunk': chunks to branch at, all where empty; 'merged': the steps "
        "that sampling.merge or merge_entropy took together",
    )
    prefix: Literal["ode", "sde"] = Field(default="ode", description="steps before the window")
    tail: Literal["euler", "dpm"] = Field(default="euler", description="steps after the window")
    tail_fraction: float = Field(
        default=0.4, gt=0, le=1, description="of tail 'dpm': share of the remaining steps"
    )


class StoreConfig(Section):
    """How states of trajectories wait for training."""

    place: Literal["device", "host"] = Field(
        default="device", description="'host' is host memory; the numbers are the same"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="'bfloat16' rounds the samples themselves, so that ratios stay exact",
    )


class SamplingConfig(Section):
    """How images are rolled out."""

    steps: int = Field(default=17, ge=2, description="sampler steps; one less is trained")
    schedule: Literal["paper", "native"] = Field(
        default="paper",
        description="'paper' is a linear grid with sampling.shift; 'native' what the stock "
        "pipeline uses for this image size",
    )
    shift: float = Field(default=3.0, gt=0, description="of schedule 'paper'")
    merge: tuple[int, ...] | None = Field(
        default=None, description="grid steps taken as one, e.g. [1, 1, 2, 4, 9]; sum is steps"
    )
    merge_entropy: float | None = Field(
        default=None, description="merge until a step has this entropy, nats per latent element"
    )
    diffusion: Literal["flow", "dance", "cps", "ode"] = Field(
        default="flow", description="'ode' for objectives of the forward process only"
    )
    window: WindowConfig = WindowConfig()
    eta: float = Field(default=0.7, description="scale of the noise in stochastic steps, above 0")
    prompts: int = Field(default=16, ge=1, description="prompts a rollout")
    group_size: int = Field(default=12, ge=2, description="images a prompt")
    same_noise: bool = True
    batch_size: int = Field(
        default=96, ge=1, description="most samples in one forward, of evaluations too"
    )
    store: StoreConfig = StoreConfig()

    @field_validator("eta")
    @classmethod
    def is_noise(cls, eta: float) -> float:
        """Refuse noise that is none, and say what samples without it."""
        if not (eta > 0 and math.isfinite(eta)):
            raise PydanticCustomError(
                "no_noise",
                "it must be above 0, or no step has a density to train; 0.7 is the published "
                "value, and sampling.diffusion 'ode' samples without noise, for "
                "objective.algorithm 'diffusion_nft' or 'awm'",
            )
        return eta


MEASURED_PLANS = ("adaptive", "optimal")
"""Plans cut from the policy's own dynamics."""


class ChunkConfig(Section):
    """Where time is cut, and which chunks are trained."""

    plan: Literal["explicit", "equal", "steps", "whole", "paper", "adaptive", "optimal"] = "paper"
    sizes: tuple[int, ...] | None = Field(default=None, description="of plan 'explicit'")
    size: int = Field(default=4, ge=1, description="of plan 'equal'")
    min_size: int = Field(
        default=4,
        ge=1,
        description="of plan 'adaptive': groups this small are not cut again; of plan 'optimal': "
        "the smallest chunk",
    )
    difference: Literal["forward", "backward", "central"] = Field(
        default="forward", description="of plan 'adaptive'"
    )
    num_chunks: int | None = Field(
        default=None, ge=1, description="of plan 'optimal'; where not given, see explained"
    )
    explained: float = Field(
        default=0.95,
        ge=0,
        le=1,
        description="of plan 'optimal': the fewest chunks that explain this share of the curve",
    )
    distance: Literal["l1", "l2", "cosine"] = Field(
        default="l1", description="speed that plans 'adaptive' and 'optimal' are cut from"
    )
    refresh: int = Field(
        default=0,
        ge=0,
        description="iterations after which plans 'adaptive' and 'optimal' are measured anew; "
        "0 keeps the first",
    )
    selection: Literal["uniform", "weighted", "softmax", "listed", "learned"] = "uniform"
    fraction: float = Field(default=0.5, gt=0, le=1)
    correction: bool = Field(
        default=False,
        description="of selections 'weighted', 'softmax' and 'learned': weigh losses by the "
        "inverse probability of the choice",
    )
    floor: float = Field(
        default=0.2, gt=0, le=1, description="of selection 'learned': uniform share of the draws"
    )
    decay: float = Field(
        default=0.9, ge=0, lt=1, description="of selection 'learned': that of its average"
    )
    usefulness: Literal["gradient", "reward"] = Field(
        default="gradient", description="of selection 'learned': what a chunk is judged by"
    )
    indices: tuple[int, ...] | None = Field(default=None, description="of selection 'listed'")


class ForwardConfig(Section):
    """Objectives of the forward process, which need clean latents and no trajectory."""

    old: Literal["none", "nft1", "nft2", "awm"] = Field(
        default="none", description="how the old policy follows: DiffusionNFT's two ways, or AWM's"
    )
    fraction: float = Field(
        default=0.99, gt=0, le=1, description="DiffusionNFT: share of the schedule's times trained"
    )
    beta: float = Field(default=1.0, gt=0, description="DiffusionNFT: how far v+ and v- reach")
    times: int = Field(default=6, ge=1, description="AWM: times per sample")
    log_prob: Literal["uniform", "t", "t2", "huber", "ghuber"] = Field(
        default="ghuber", description="AWM: pseudo log-probability"
    )
    power: float = Field(default=0.25, gt=0, description="AWM: of log_prob 'ghuber'")
    mode: Literal["exp_first", "sum_first"] = Field(
        default="exp_first", description="AWM: a ratio per time, or one per sample"
    )
    advantage_max: float = Field(default=1.0, gt=0, description="AWM: rescaled advantage bound")
    ema_weight: float = Field(
        default=0.0, ge=0, description="AWM: pull towards the old policy's velocity"
    )


class ObjectiveConfig(Section):
    """The loss."""

    algorithm: Literal["chunk_grpo", "diffusion_nft", "awm"] = "chunk_grpo"
    forward: ForwardConfig = ForwardConfig()
    clip_low: float = Field(default=5e-5, gt=0, le=1)
    clip_high: float = Field(default=5e-5, gt=0)
    advantage: str = "group_std"
    advantage_clip: float = Field(default=5.0, gt=0)
    credit: Literal["trajectory", "gain"] = Field(
        default="trajectory", description="'gain': each chunk by what it adds to the reward"
    )
    ratio: Literal["per_dimension", "full", "guard", "squared_error"] = "per_dimension"
    trust: str = Field(
        default="clip", description="'clip', 'kl_mask', 'none' or package.module:factory"
    )
    trust_options: dict[str, Any] = Field(default={}, description="of a factory of your own")
    kl_threshold: float = Field(default=1e-5, gt=0, description="of trust 'kl_mask'")
    inner_weights: Literal["none", "equal_kappa"] = Field(
        default="none", description="of the steps inside a chunk's ratio"
    )
    outer_weights: Literal["none", "noise_level", "inverse_dt", "chunk_size", "implicit"] = Field(
        default="none",
        description="of the loss of a step or chunk; 'chunk_size' lets steps of unequal chunks "
        "count alike, 'implicit' gives single steps the weights they would have in chunks",
    )
    implicit_sizes: tuple[int, ...] | None = Field(
        default=None, description="of outer_weights 'implicit': sizes of the chunks imitated"
    )
    consistency: float = Field(
        default=0.0, ge=0, description="weight of the temporal consistency of chunks"
    )
    updates: int = Field(default=2, ge=1, description="optimizer steps a rollout")
    keep: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of a rollout's images that is trained: those whose advantages are "
        "largest in size",
    )
    micro_batch: int = Field(default=64, ge=1, description="(sample, step) pairs a forward")
    anchor: Literal["rollout", "replay"] = "rollout"
    kl: float = Field(default=0.0, ge=0, description="weight of KL to the base model")
    kl_form: Literal["transition", "rate"] = Field(
        default="transition", description="'rate' is Flow-GRPO's, without dt"
    )
    old_kl: float = Field(default=0.0, ge=0, description="weight of k3 KL to the sampling policy")


class OptimizerConfig(Section):
    """AdamW and what surrounds it."""

    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        default="adamw", description="those of 8 bits need bitsandbytes: chunkgrpo[adamw8bit]"
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup: int = Field(default=0, ge=0, description="optimizer steps of linear rise")
    fall: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the run, at its end, over which the rate falls towards zero",
    )
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema: float = Field(
        default=0.9, ge=0, lt=1, description="decay of the averaged weights, which are saved"
    )
    ema_warmup: float = Field(
        default=9.0,
        gt=0,
        description="the decay of update n is at most n / (n + this), so that an average reaches "
        "back over about 1 / this of the run",
    )


class EvaluationConfig(Section):
    """What is measured before, while and after training."""

    reward: RewardConfig = RewardConfig(options={"mode": "strict", "name": "strict"})
    every: int = Field(default=10, ge=0)
    prompts: int = Field(
        default=96, ge=1, description="prompts of the small evaluations while training"
    )
    final_prompts: int = Field(default=504, ge=1)
    final_seeds: int = Field(default=2, ge=1)
    seed: int = 1234
    tasks: tuple[str, ...] | None = Field(
        default=None, description="tasks of the embedded world to judge by; all by default"
    )


class Config(Section):
    """A whole run."""

    name: str = "run"
    iterations: int = Field(default=50, ge=1)
    seed: int = 0
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 leaves torch's choice")
    checkpoint_every: int = Field(default=10, ge=1)
    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    rewards: tuple[RewardConfig, ...] = Field(default=(RewardConfig(),), min_length=1)
    watched_rewards: tuple[WatchedConfig, ...] = Field(
        default=(), description="scored and logged, not trained on"
    )
    scoring: ScoringConfig = ScoringConfig()
    async_rewards: bool = Field(
        default=False, description="score images while later ones are rolled out; same results"
    )
    sampling: SamplingConfig = SamplingConfig()
    chunks: ChunkConfig = ChunkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate a configuration.

    Raises:
        ConfigError: One line that names the key, the value, the rule, and the nearest key.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(where)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where} = {first['input']!r}: {message}{more}"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Return every dotted key with its description."""
    keys: dict[str, str] = {}
    for name, info in model.model_fields.items():
        kinds = [info.annotation, *get_args(info.annotation)]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        dotted = prefix + name
        keys[dotted] = info.description or ""
        if inner:
            middle = "" if inner[0] is info.annotation else "0."
            keys |= known_keys(inner[0], f"{dotted}.{middle}")
    return keys


def unknown_name(what: str, name: str, known: Sequence[str]) -> ConfigError:
    """Return the error for a name that does not exist, with the nearest that does and all."""
    near = difflib.get_close_matches(name, known, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")


def unknown_key(key: str) -> str:
    """Return the message for a key that does not exist, with the nearest that does."""
    known = list(known_keys())
    near = difflib.get_close_matches(key, known, 1, 0.5)
    last = {k.rsplit(".", 1)[-1]: k for k in known}
    if not near:
        found = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.6)
        near = [last[f] for f in found]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown configuration key {key!r}{hint}"


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply ``a.b=c`` to nested dictionaries; c is read as YAML."""
    import yaml

    key, separator, text = assignment.partition("=")
    if not separator:
        raise ConfigError(f"--set {assignment!r} must look like key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment!r}: the value is no YAML: {error}") from None
    if isinstance(value, str):  # YAML reads 1e-4 as text; people mean a number
        with contextlib.suppress(ValueError):
            value = float(value)
    if key not in known_keys() and "options" not in key:
        raise ConfigError(unknown_key(key))
    node: Any = values
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def read_chunks(path: Path) -> dict[str, Any]:
    """Read the chunk settings that ``chunkgrpo chunks`` wrote.

    Raises:
        ConfigError: If the file is missing or holds anything but a ``chunks`` section.
    """
    import yaml

    if not path.is_file():
        raise ConfigError(f"chunks file {path} does not exist; make one with: chunkgrpo chunks")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    section = values.get("chunks") if isinstance(values, dict) else None
    if not isinstance(section, dict) or len(values) != 1:
        raise ConfigError(f"{path} must hold one section, chunks, and nothing else")
    return section


def load_config(
    source: str | Path,
    assignments: Sequence[str] = (),
    chunks: Path | None = None,
    check_chunks: bool = True,
) -> Config:
    """Load a recipe or a YAML file and apply changes.

    Args:
        source: Recipe name or path of a ``.yaml`` file.
        assignments: ``a.b=c`` each; they have the last word.
        chunks: File whose ``chunks`` section changes that of the source key by key.
        check_chunks: Whether the chunks must fit the schedule; False where they are to be found.
    """
    values = _read(source)
    if chunks is not None:
        values["chunks"] = (values.get("chunks") or {}) | read_chunks(chunks)
    for assignment in assignments:
        set_value(values, assignment)
    config = parse_config(values)
    check_algorithm(config)
    if config.objective.algorithm == "chunk_grpo" and check_chunks:
        check_plan(config)
    return config


def _read(source: str | Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a recipe or a file, with what it extends underneath."""
    import yaml

    from chunkgrpo.recipes import base_names, method_names, recipe_names, recipe_path

    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"configuration file {source} does not exist")
    else:
        names = base_names() if seen else sorted([*recipe_names(), *method_names()])
        if str(source) not in names:
            raise unknown_name("recipe", str(source), names)
        path = recipe_path(str(source))
    if str(path) in seen:
        raise ConfigError(f"{' extends '.join([*seen, str(path)])}: a recipe can not extend itself")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values")
    below = values.pop("extends", None)
    return _over(_read(str(below), (*seen, str(path))), values) if below else values


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Put settings over others, section by section; lists are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _over(inner, value)
        else:
            merged[key] = value
    return merged


def dump_config(config: Config) -> str:
    """Return a configuration as YAML, every key resolved."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def check_plan(config: Config) -> None:
    """Refuse chunks and windows that do not fit the schedule, before anything is loaded.

    Raises:
        ConfigError: With the rule and the fix.
    """
    try:
        moving_window(config)
    except ValueError as error:
        raise ConfigError(f"sampling.window: {error}") from None
    c, trained = config.chunks, num_planned(config)
    if c.plan == "explicit":
        if not c.sizes:
            raise ConfigError("chunks.plan 'explicit' needs chunks.sizes, e.g. [2, 3, 4, 7]")
        if sum(c.sizes) != trained:
            listed = ", ".join(map(str, c.sizes))
            window = config.sampling.window
            if window.kind in ("all", "chunk"):
                why = f"sampling.steps = {config.sampling.steps} leaves {trained} trained steps"
                fix = f"sampling.steps to {sum(c.sizes) + 1}"
            else:
                why = f"sampling.window.kind {window.kind!r} trains {trained} steps"
                fix = f"sampling.window.size to {sum(c.sizes)}"
            raise ConfigError(
                f"chunks.sizes ({listed}) sum to {sum(c.sizes)}, but {why}; change a chunk or set "
                f"{fix}"
            )
        if min(c.sizes) < 1:
            raise ConfigError(f"chunks.sizes must be at least 1 each, got {min(c.sizes)}")
    if c.plan == "paper" and trained != 16:
        raise ConfigError(
            f"chunks.plan 'paper' is [2, 3, 4, 7] and needs sampling.steps = 17 (and no window), "
            f"16 trained steps, not {trained}; use plan 'explicit' with sizes that sum to {trained}"
        )
    if c.plan == "equal" and c.size > trained:
        raise ConfigError(f"chunks.size = {c.size} exceeds the {trained} trained steps")
    most = trained // c.min_size
    if c.plan == "optimal" and not 1 <= (c.num_chunks or 1) <= most:
        raise ConfigError(
            f"chunks.num_chunks = {c.num_chunks} with chunks.min_size = {c.min_size}: the "
            f"{trained} trained steps can be cut into at most {most} chunks of that size; lower "
            "one of the two"
        )
    window, count = config.sampling.window, num_chunks(config)
    if window.decay != "exponential" and (unread := changed(window, ("rate", "after"))):
        raise ConfigError(
            f"sampling.window: {', '.join(unread)} belongs to decay 'exponential', and "
            f"sampling.window.decay is {window.decay!r}; set it to that, or leave the other out"
        )
    if config.objective.consistency > 0 and (window.kind == "chunk" or count == 1):
        raise ConfigError(
            "objective.consistency keeps neighbouring chunks together, and an iteration has one "
            "chunk here; set it to 0, or cut chunks.plan into several"
        )
    check_branches(config)
    check_selection(config)
    check_outer_weights(config)


def check_branches(config: Config) -> None:
    """Refuse branching at chunks that the plan does not have, or may not keep.

    Raises:
        ConfigError: With the rule and the fix.
    """
    c, window, count = config.chunks, config.sampling.window, num_chunks(config)
    if window.kind != "chunk" or not window.indices:
        return
    if window.indices == "merged" and (count is None or count != num_trained(config)):
        raise ConfigError(
            f"sampling.window.indices 'merged' are sampler steps, and chunks.plan {c.plan!r} has "
            "chunks of several; use plan 'steps', or list chunks"
        )
    found = branches(config)
    if count is None and c.refresh:
        raise ConfigError(
            f"sampling.window.indices = {list(found)} lists chunks, whose number chunks.refresh = "
            f"{c.refresh} may change; use plan 'optimal' with chunks.num_chunks, set "
            "chunks.refresh to 0, or branch at all: indices []"
        )
    if count is not None and not 0 <= min(found) <= max(found) < count:
        raise ConfigError(
            f"sampling.window.indices = {list(found)}, but chunks.plan {c.plan!r} has "
            f"chunks 0 to {count - 1}; branch at these only"
        )


def check_outer_weights(config: Config) -> None:
    """Refuse weights from a cut of the steps that does not fit the steps.

    Raises:
        ConfigError: With the rule and the fix.
    """
    o, planned = config.objective, num_planned(config)
    cut = o.outer_weights in ("chunk_size", "implicit")
    if cut and config.sampling.window.kind == "chunk":
        raise ConfigError(
            f"objective.outer_weights {o.outer_weights!r} weighs chunks against one another, and "
            "sampling.window.kind 'chunk' trains one an iteration; set the weights to 'none', or "
            "use another window"
        )
    if o.outer_weights != "implicit":
        return
    sizes = o.implicit_sizes or ()
    if not sizes or min(sizes) < 1 or sum(sizes) != planned:
        raise ConfigError(
            f"objective.implicit_sizes = {list(sizes)} must be the sizes of chunks that cover the "
            f"{planned} trained steps, each at least 1 and {planned} in all, and they sum to "
            f"{sum(sizes)}; name the sizes whose weights the steps are to have"
        )
    if num_chunks(config) != planned:
        raise ConfigError(
            "objective.outer_weights 'implicit' gives single steps the weights that chunks have "
            f"anyhow, and chunks.plan is {config.chunks.plan!r}; use plan 'steps', or set the "
            "weights to 'none'"
        )


def check_algorithm(config: Config) -> None:
    """Refuse settings that the objective has no use for, or cannot work with.

    Raises:
        ConfigError: With the rule and the nearest valid choice.
    """
    sampling = config.sampling
    if sampling.merge and sampling.merge_entropy is not None:
        raise ConfigError(
            "sampling.merge lists the merged steps and sampling.merge_entropy finds them; set one "
            "of the two to null"
        )
    if sampling.schedule == "native" and sampling.merge_entropy is not None:
        raise ConfigError(
            "sampling.merge_entropy is worked out before the model is loaded, which "
            "sampling.schedule 'native' comes from; use schedule 'paper', or list the merged steps "
            "in sampling.merge"
        )
    s, o = config.sampling, config.objective
    if sampling.merge and (sum(sampling.merge) != sampling.steps or min(sampling.merge) < 1):
        raise ConfigError(
            f"sampling.merge = {list(sampling.merge)} sums to {sum(sampling.merge)}, but "
            f"sampling.steps is {sampling.steps}; its entries must be at least 1 and sum to that"
        )
    if s.diffusion == "cps" and s.eta > 1:
        raise ConfigError(
            f"sampling.eta = {s.eta}, but sampling.diffusion 'cps' mixes noise with eta in [0, 1]; "
            "try 0.9"
        )
    images = s.prompts * s.group_size
    if o.updates > images:
        raise ConfigError(
            f"objective.updates = {o.updates} share the {images} images of a rollout (sampling."
            "prompts x group_size), and each needs at least one; lower it"
        )
    if o.algorithm == "awm" and o.forward.times > num_trained(config):
        raise ConfigError(
            f"objective.forward.times = {o.forward.times}, but sampling.steps = {s.steps} has only "
            f"{num_trained(config)} times besides pure noise; lower it or take more steps"
        )
    if o.algorithm == "chunk_grpo":
        for key in ("consistency", "old_kl"):
            if getattr(o, key) > 0 and o.updates < 2:
                raise ConfigError(
                    f"objective.{key} compares with the policy that sampled, from which the first "
                    "update of a rollout does not differ, and objective.updates is 1; set it to 2 "
                    f"or more, or objective.{key} to 0"
                )
        if s.diffusion == "ode":
            raise ConfigError(
                "sampling.diffusion 'ode' has no density, and objective.algorithm 'chunk_grpo' "
                "needs that of every trained step; use 'flow' or 'dance', or objective.algorithm "
                "'diffusion_nft' or 'awm'"
            )
        if s.window.kind == "chunk" and not s.same_noise:
            raise ConfigError(
                "sampling.window.kind 'chunk' compares images that branch from one state, so a "
                "group must start from one noise; set sampling.same_noise to true"
            )
        if o.forward != ForwardConfig():
            raise ConfigError(
                "objective.forward belongs to objective.algorithm 'diffusion_nft' and 'awm', not "
                "'chunk_grpo'; remove it or change the algorithm"
            )
        check_unread(o)
        return
    wrong = []
    if config.chunks != ChunkConfig():
        wrong.append("chunks")
    if s.window != WindowConfig():
        wrong.append("sampling.window")
    wrong += [f"objective.{each}" for each in changed(o, CHUNK_SETTINGS)]
    if wrong:
        raise ConfigError(
            f"objective.algorithm {o.algorithm!r} trains on noised clean latents, not on a "
            f"trajectory, and has no use for {', '.join(wrong)}; remove it, or use 'chunk_grpo'"
        )
    check_forward(o)


CHUNK_SETTINGS = (
    "credit", "ratio", "trust", "trust_options", "kl_threshold", "inner_weights", "outer_weights",
    "implicit_sizes", "consistency", "anchor", "kl_form", "old_kl", "keep",
)  # fmt: skip
"""Settings of the objective that 'chunk_grpo' alone reads.

The clip range is not among them: the base of the recipes sets it for all, also for DiffusionNFT,
which has none.
"""

FORWARD_SETTINGS = {
    "diffusion_nft": ("fraction", "beta"),
    "awm": ("times", "log_prob", "power", "mode", "advantage_max", "ema_weight"),
}
"""Settings of ``objective.forward`` that one of the two algorithms reads and the other does not."""


def changed(section: Section, names: Sequence[str]) -> list[str]:
    """Return, as ``name = value``, those of a section's settings that are not the defaults."""
    fields = type(section).model_fields
    values = {name: getattr(section, name) for name in names}
    return [f"{k} = {v!r}" for k, v in values.items() if v != fields[k].get_default()]


def check_unread(objective: ObjectiveConfig) -> None:
    """Refuse settings of the chunk loss that belong to a choice which is not made.

    Raises:
        ConfigError: With the setting, the reason and the fix.
    """
    o = objective
    own_trust = o.trust not in ("clip", "kl_mask", "none")
    for name, read, owner in (
        ("kl_threshold", o.trust == "kl_mask", "objective.trust 'kl_mask'"),
        ("trust_options", own_trust, "an objective.trust of your own, package.module:factory"),
        ("implicit_sizes", o.outer_weights == "implicit", "objective.outer_weights 'implicit'"),
    ):
        if not read and (unread := changed(o, (name,))):
            raise ConfigError(
                f"objective.{unread[0]} belongs to {owner}, which is not chosen, so that nothing "
                "would read it; remove it, or choose that"
            )


def check_forward(objective: ObjectiveConfig) -> None:
    """Refuse settings of an objective of the forward process that it does not read.

    Raises:
        ConfigError: With the setting, the reason and the fix.
    """
    o, f = objective, objective.forward
    for algorithm, names in FORWARD_SETTINGS.items():
        if algorithm != o.algorithm and (unread := changed(f, names)):
            raise ConfigError(
                f"objective.forward.{unread[0]} belongs to objective.algorithm {algorithm!r}, and "
                f"{o.algorithm!r} does not read it; remove it, or change the algorithm"
            )
    if o.algorithm != "awm":
        return
    if f.old != "none" and not f.ema_weight:
        raise ConfigError(
            f"objective.forward.old = {f.old!r} is how the policy follows that "
            "objective.forward.ema_weight pulls towards, and that weight is 0; raise it (1 "
            "published), or set old to 'none'"
        )
    if f.log_prob != "ghuber" and (unread := changed(f, ("power",))):
        raise ConfigError(
            f"objective.forward.{unread[0]} belongs to objective.forward.log_prob 'ghuber', not "
            f"{f.log_prob!r}; remove it, or change log_prob"
        )


def check_selection(config: Config) -> None:
    """Refuse a choice of chunks that its plan, or its own settings, cannot go with.

    Raises:
        ConfigError: With the rule and the fix.
    """
    c = config.chunks
    measured = c.plan in MEASURED_PLANS
    window = config.sampling.window.kind
    if measured and window in ("random", "sliding"):
        raise ConfigError(
            f"chunks.plan {c.plan!r} is cut from the dynamics of steps that stay, but "
            f"sampling.window.kind {window!r} moves; give sizes that sum to the window's size "
            "(`chunkgrpo chunks` proposes them)"
        )
    if c.selection in ("learned", "listed") and window == "chunk":
        listed = " (sampling.window.indices lists chunks to draw from)"
        raise ConfigError(
            "sampling.window.kind 'chunk' draws one chunk an iteration itself, which leaves "
            f"nothing for chunks.selection {c.selection!r} to choose; use 'uniform' with fraction 1"
            + listed
            * (c.selection == "listed")
        )
    if c.selection == "learned" and c.usefulness == "reward" and config.objective.updates < 2:
        raise ConfigError(
            "chunks.usefulness 'reward' is measured on the samples of later updates, and "
            "objective.updates is 1; set it to 2 or more, or use 'gradient'"
        )
    kl = config.objective.kl
    if c.selection == "learned" and c.usefulness == "gradient" and kl > 0:
        raise ConfigError(
            f"chunks.usefulness 'gradient' measures the gradient of each chunk's loss, and with "
            f"objective.kl = {kl} that of the pull to the base would be in it; set objective.kl "
            "to 0, or use 'reward'"
        )
    if c.refresh and not measured:
        raise ConfigError(
            f"chunks.refresh = {c.refresh} measures plans 'adaptive' and 'optimal' anew, but "
            f"chunks.plan is {c.plan!r}, which is not measured; set chunks.refresh to 0"
        )
    if c.refresh and c.selection == "learned":
        raise ConfigError(
            "chunks.selection 'learned' knows its chunks by number, and chunks.refresh = "
            f"{c.refresh} would change what they are; set chunks.refresh to 0"
        )
    if c.correction and c.selection == "listed":
        raise ConfigError(
            "chunks.correction cannot make up for chunks that chunks.selection 'listed' never "
            "trains; turn it off"
        )
    if c.correction and c.selection == "uniform":
        raise ConfigError(
            "chunks.correction has nothing to correct: chunks.selection 'uniform' makes all chunks "
            "equally likely; turn it off"
        )
    if c.selection != "listed":
        return
    if not c.indices:
        raise ConfigError("chunks.selection 'listed' needs chunks.indices, e.g. [0, 1]")
    count = num_chunks(config)
    if count is not None and not 0 <= min(c.indices) <= max(c.indices) < count:
        raise ConfigError(
            f"chunks.indices = {list(c.indices)}, but chunks.plan {c.plan!r} has chunks 0 to "
            f"{count - 1}; list only these"
        )
    if count is None and c.refresh:
        raise ConfigError(
            "chunks.selection 'listed' needs a number of chunks that chunks.refresh does not "
            "change: use plan 'optimal' with chunks.num_chunks, or set chunks.refresh to 0"
        )


def num_chunks(config: Config) -> int | None:
    """Return how many chunks a plan has; None where it is measured first."""
    if config.chunks.plan in MEASURED_PLANS:
        return config.chunks.num_chunks if config.chunks.plan == "optimal" else None
    return len(given_sizes(config))


def given_sizes(config: Config) -> tuple[int, ...]:
    """Return the chunk sizes of a plan that is not measured."""

    def refuse() -> Tensor:
        raise ValueError(f"chunks.plan {config.chunks.plan!r} is measured first")

    return build_plan(config, refuse).sizes


def resolve_model(path: str) -> str:
    """Return the folder or hub id of a model name."""
    if path != "shapes":
        return path
    from chunkgrpo.shapes import pipeline_path

    return str(pipeline_path())


def embedding_folder(model: ModelConfig) -> Path | None:
    """Return where encoded prompts are kept; None where text encoders stay loaded.

    ``auto`` is ``$CHUNKGRPO_CACHE/embeddings``, by default in ``~/.cache/chunkgrpo``.
    """
    if model.embedding_cache is None:
        return None
    if model.embedding_cache != "auto":
        return Path(model.embedding_cache).expanduser()
    if model.path == "shapes":  # its text encoders are smaller than a cache would be
        return None
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chunkgrpo"
    return Path(os.environ.get("CHUNKGRPO_CACHE") or user) / "embeddings"


def device_of(model: ModelConfig) -> str:
    """Return the device a model runs on."""
    import torch

    if model.device != "auto":
        return model.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def text_encoder_dtype(model: ModelConfig) -> torch.dtype:
    """Return the type of the text encoders on the device the model runs on."""
    import torch

    wanted = model.text_encoder_precision
    if wanted == "auto":
        wanted = "bf16" if device_of(model).startswith("cuda") else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def build_execution(model: ModelConfig, training: bool = True) -> Execution:
    """Return types and places of frozen weights, and kernels.

    Args:
        model: The settings.
        training: Whether there is a reference, which sampling needs none of.

    Raises:
        ConfigError: Or another ValueError, if a name is unknown or a setting has no use.
    """
    from chunkgrpo.policies.execution import Execution

    if "reference" in model.offload and model.method != "full":
        raise ConfigError(
            "model.offload 'reference' is the frozen copy of model.method 'full'; the reference "
            f"of {model.method!r} is the model itself: take it out"
        )
    parts = tuple(part for part in model.offload if training or part != "reference")
    return Execution(
        lower_frozen=model.lower_frozen,
        text_dtype=text_encoder_dtype(model),
        offload=parts,
        attention_backend=model.attention_backend,
        compile=model.compile_backend if model.compile == "blocks" else None,
        vae_slicing=model.vae_slicing,
        vae_tiling=model.vae_tiling,
    )


def check_precision(model: ModelConfig) -> None:
    """Refuse to train in a precision that loses the gradient.

    Raises:
        ConfigError: With the precision to take instead.
    """
    if model.precision == "fp16":
        raise ConfigError(
            "model.precision 'fp16' is for sampling alone: in training small gradients become 0, "
            "as there is no loss scaling; set it to 'bf16'"
        )


def policy_options(model: ModelConfig, training: bool = False) -> dict[str, Any]:
    """Return the options of ``PipelinePolicy.from_options``, for sampling unless told otherwise."""
    from chunkgrpo.core.schedules import TIMESTEP_ROUNDINGS

    if (model.height is None) != (model.width is None):
        raise ConfigError("model.height and model.width must be given together")
    if training:
        check_precision(model)
    return {
        "precision": model.precision,
        "guidance": model.guidance,
        "size": (model.height, model.width) if model.height and model.width else None,
        "max_sequence_length": model.max_sequence_length,
        "timestep": TIMESTEP_ROUNDINGS[model.timestep] if model.timestep else None,
        "negative_prompt": model.negative_prompt,
        "gradient_checkpointing": model.gradient_checkpointing,
        "execution": build_execution(model, training),
        **model.options,
    }


def build_policy(config: Config) -> PipelinePolicy:
    """Load the model as a policy."""
    from chunkgrpo.policies.loading import load_policy
    from chunkgrpo.policies.pipeline import Adaptation

    m = config.model
    adaptation = Adaptation(m.method, m.rank, m.alpha or m.rank, m.targets, seed=config.seed)
    return load_policy(
        resolve_model(m.path),
        adaptation,
        device_of(m),
        embedding_cache=embedding_folder(m),
        **policy_options(m, training=True),
    )


def build_sigmas(config: Config, policy: PipelinePolicy) -> Tensor:
    """Return the sampling schedule of a policy, [K+1] on the CPU."""
    from chunkgrpo.core.schedules import make_sigmas, merge_sigmas

    s, sizes = config.sampling, merge_sizes(config)
    if s.schedule == "native":
        sigmas = policy.native_sigmas(s.steps)
    else:
        sigmas = make_sigmas(s.steps, s.shift)
    return merge_sigmas(sigmas, sizes) if sizes else sigmas


def merge_sizes(config: Config) -> tuple[int, ...] | None:
    """Return how many grid steps each sampler step spans, listed or found by entropy."""
    s = config.sampling
    if s.merge_entropy is None:
        return s.merge
    return _entropy_merges(s.steps, s.shift, s.diffusion, s.eta, s.merge_entropy)


@lru_cache(maxsize=64)
def _entropy_merges(
    steps: int, shift: float, diffusion: str, eta: float, least: float
) -> tuple[int, ...]:
    """Find the merged steps once for all that ask for their number."""
    from chunkgrpo.core.schedules import entropy_merges, make_sigmas

    return entropy_merges(make_sigmas(steps, shift), make_kernel(diffusion, eta).std, least)


def num_trained(config: Config) -> int:
    """Return N, the steps that can be trained: all sampler steps but the last."""
    sizes = merge_sizes(config)
    return (len(sizes) if sizes else config.sampling.steps) - 1


def num_kept(config: Config) -> int:
    """Return how many images of a rollout are trained."""
    from chunkgrpo.core import credit

    s, o = config.sampling, config.objective
    return credit.num_kept(s.prompts * s.group_size, o.keep, o.updates)


def num_planned(config: Config) -> int:
    """Return the steps that the chunk plan covers: those of the window."""
    window = config.sampling.window
    return num_trained(config) if window.kind in ("all", "chunk") else window.size


def window_places(config: Config) -> dict[int, float]:
    """Return every step at which the planned steps can begin, with its share of the iterations."""
    window = moving_window(config)
    return window.places() if window else {0: 1.0}


def fixed_window(config: Config) -> range | None:
    """Return the planned steps where they never move; None where they are all."""
    w = config.sampling.window
    return range(w.start, w.start + w.size) if w.kind == "fixed" else None


def build_transition(config: Config) -> Kernel:
    """Return the stochastic transition that rollout and algorithm share."""
    return make_kernel(config.sampling.diffusion, config.sampling.eta)


def make_kernel(diffusion: str, eta: float) -> Kernel:
    """Return a transition by its name in ``sampling.diffusion``; the ODE has no eta."""
    from chunkgrpo.core import sde

    if diffusion == "cps":
        return sde.CpsTransition(eta)
    if diffusion == "ode":
        return sde.Transition(sde.OdeDiffusion())
    return sde.Transition({"flow": sde.FlowDiffusion, "dance": sde.DanceDiffusion}[diffusion](eta))


def build_plan(config: Config, curve: Callable[[], Tensor]) -> ChunkPlan:
    """Return the chunk plan.

    Args:
        config: The run.
        curve: Measures the policy's dynamics [N], averaged over samples and processes; called
            only by the plans that need it (``MEASURED_PLANS``).
    """
    from chunkgrpo.core import chunks

    c, trained = config.chunks, num_planned(config)
    if c.plan == "explicit":
        return chunks.explicit_plan(c.sizes or (), trained)
    if c.plan == "equal":
        return chunks.equal_plan(c.size, trained)
    if c.plan == "steps":
        return chunks.step_plan(trained)
    if c.plan == "whole":
        return chunks.whole_plan(trained)
    if c.plan == "paper":
        return chunks.paper_plan(trained)
    if c.plan == "adaptive":
        return chunks.adaptive_plan(curve(), c.min_size, c.difference)
    return chunks.optimal_plan(curve(), c.num_chunks, c.min_size, c.explained)


def build_selection(config: Config) -> Selection:
    """Return the choice of chunks; a learned one has learnt nothing yet."""
    from chunkgrpo.core import chunks
    from chunkgrpo.core.learned import LearnedSelection

    c = config.chunks
    if c.selection == "uniform":
        return chunks.UniformSelection(c.fraction)
    if c.selection == "listed":
        return chunks.ListedSelection(c.indices or ())
    if c.selection == "learned":
        power = 0.5 if c.usefulness == "gradient" else 1.0
        return LearnedSelection(c.fraction, c.floor, c.decay, power, c.correction)
    return chunks.WeightedSelection(c.fraction, c.selection == "softmax", c.correction)


def build_prompts(config: Config, which: str) -> PromptSet:
    """Return the prompts to train on (``train``), to watch (``watch``) or to judge by (``final``).

    Watched and judged prompts are disjoint where the held-out set is large enough.
    """
    from chunkgrpo.prompts import read_prompts, shapes_prompts

    p, e = config.prompts, config.evaluation
    if which == "train":
        if p.train == "shapes":
            return shapes_prompts("train", None, config.seed, p.tasks)
        return read_prompts(p.train, p.column)
    wanted = e.final_prompts + e.prompts
    if p.held_out == "shapes":
        found = shapes_prompts("held_out", wanted, e.seed, e.tasks)
    else:
        found = read_prompts(p.held_out, p.column)
    if which == "final":
        return found.head(e.final_prompts)
    rest = found[e.final_prompts :]
    return rest.head(e.prompts) if len(rest) else found.head(e.prompts)


def build_trainer(config: Config, folder: Path) -> Trainer:
    """Build everything a run needs.

    Raises:
        ConfigError: Or another ValueError, with one clear line.
    """
    import torch

    from chunkgrpo.core.credit import CONVENTIONS
    from chunkgrpo.core.dynamics import mean_curve
    from chunkgrpo.rewards import Scorer, make_reward
    from chunkgrpo.rewards.scoring import check_prompts, is_groupwise
    from chunkgrpo.rollout import Store, measured_speed
    from chunkgrpo.runtime.optimizers import make_optimizer
    from chunkgrpo.train import Trainer, TrainSettings

    s, c, o, opt = config.sampling, config.chunks, config.objective, config.optimizer
    if o.advantage not in CONVENTIONS:
        raise ConfigError(
            f"unknown objective.advantage {o.advantage!r}; known: {', '.join(CONVENTIONS)}"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    rewards = [(make_reward(r.name, r.options), r.weight) for r in config.rewards]
    watched = [make_reward(r.name, r.options) for r in config.watched_rewards]
    # Refuses rewards of one name, and weights that do not fit, before a model is loaded.
    Scorer(rewards, watched, config.scoring.combine)
    # Refuses what is not installed before a model is loaded.
    make_optimizer(opt.kind, [torch.zeros(1)], opt.learning_rate)
    build_trust(o)  # a wrong name shows before a model is loaded
    # A judge that is also trained on, or watched, is the same object: its model is loaded once.
    listed = zip([*config.rewards, *config.watched_rewards], [*(r for r, _ in rewards), *watched])
    j = config.evaluation.reward
    same = [made for r, made in listed if (r.name, r.options) == (j.name, j.options)]
    judge = same[0] if same else make_reward(j.name, j.options)
    if is_groupwise(judge):
        raise ConfigError(
            f"reward {judge.name!r} compares the images of a group and can not judge single ones; "
            "name another judge: evaluation.reward.name"
        )
    train, watch = build_prompts(config, "train"), build_prompts(config, "watch")
    judged = build_prompts(config, "final")
    for reward in [*(r for r, _ in rewards), *watched, judge]:
        shown = [watch, judged] + ([train] if reward is not judge else [])
        check_prompts(reward, [prompt for each in shown for prompt in each])
    policy = build_policy(config)
    sigmas = build_sigmas(config, policy)
    transition = build_transition(config)

    def curve() -> Tensor:
        probe = train.prompts[:64]
        speed_BN = measured_speed(
            policy, probe, transition, sigmas, range(len(probe)), distance=c.distance,
            batch_size=s.batch_size, window=fixed_window(config), prefix=s.window.prefix,
        )  # fmt: skip
        return mean_curve(speed_BN).cpu()

    plan = None
    if o.algorithm == "chunk_grpo":
        plan = build_plan(config, curve)
        algorithm = build_chunk_grpo(config, plan, transition)
    else:
        algorithm = build_forward(config, policy)
    settings = TrainSettings(
        iterations=config.iterations,
        num_prompts=s.prompts,
        group_size=s.group_size,
        same_noise=s.same_noise,
        rollout_batch=s.batch_size,
        advantage=o.advantage,
        advantage_clip=o.advantage_clip,
        credit=o.credit,
        combine=config.scoring.combine,
        on_error=config.scoring.on_error,
        quantise=config.scoring.quantise,
        async_rewards=config.async_rewards,
        optimizer=opt.kind,
        learning_rate=opt.learning_rate,
        betas=opt.betas,
        eps=opt.eps,
        weight_decay=opt.weight_decay,
        warmup=opt.warmup,
        fall=opt.fall,
        max_grad_norm=opt.max_grad_norm,
        ema_decay=opt.ema,
        ema_warmup=opt.ema_warmup,
        store=Store(s.store.place, getattr(torch, s.store.dtype)),
        evaluate_every=config.evaluation.every,
        checkpoint_every=config.checkpoint_every,
        seed=config.seed,
    )
    return Trainer(
        policy,
        transition,
        algorithm,
        sigmas,
        train,
        rewards,
        watch,
        judge,
        folder,
        settings,
        windows=build_windows(config, plan) if plan else None,
        prefix=s.window.prefix,
        tail=build_tail(config),
        replan=(lambda: build_plan(config, curve)) if c.refresh else None,
        refresh=c.refresh,
        usefulness=c.usefulness,
        watched=watched,
        held=[made.name for r, made in zip(config.watched_rewards, watched) if r.hold],
    )


def build_chunk_grpo(config: Config, plan: ChunkPlan, transition: Kernel) -> ChunkGRPO:
    """Return the chunk objective."""
    from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
    from chunkgrpo.core.chunks import ChunkPlan

    c, o = config.chunks, config.objective
    return ChunkGRPO(
        plan=plan,
        transition=transition,
        selection=build_selection(config),
        num_updates=o.updates,
        keep=o.keep,
        micro_batch=o.micro_batch,
        anchor=o.anchor,
        kl_coefficient=o.kl,
        kl_form=o.kl_form,
        old_kl_coefficient=o.old_kl,
        trust=build_trust(o),
        ratio=o.ratio,
        inner_weights=o.inner_weights,
        outer_weights=o.outer_weights,
        implicit=ChunkPlan(o.implicit_sizes) if o.implicit_sizes else None,
        consistency=o.consistency,
        group_by_chunk=c.selection == "learned" and c.usefulness == "gradient",
    )


def build_forward(config: Config, policy: Policy) -> DiffusionNFT | AWM:
    """Return an objective of the forward process, with its old policy."""
    from chunkgrpo.algorithms.forward import AWM, DiffusionNFT
    from chunkgrpo.runtime.old_policy import Old

    o, f = config.objective, config.objective.forward
    if o.algorithm == "diffusion_nft":
        return DiffusionNFT(
            old=Old(policy.parameters(), f.old),
            beta=f.beta,
            advantage_clip=o.advantage_clip,
            fraction=f.fraction,
            num_updates=o.updates,
            micro_batch=o.micro_batch,
            kl_coefficient=o.kl,
        )
    return AWM(
        old=Old(policy.parameters(), f.old) if f.ema_weight else None,
        log_prob=f.log_prob,
        power=f.power,
        mode=f.mode,
        num_times=f.times,
        clip_low=o.clip_low,
        clip_high=o.clip_high,
        advantage_clip=o.advantage_clip,
        advantage_max=f.advantage_max,
        num_updates=o.updates,
        micro_batch=o.micro_batch,
        kl_coefficient=o.kl,
        ema_coefficient=f.ema_weight,
    )


def build_trust(objective: ObjectiveConfig) -> TrustRegion:
    """Return the trust region of the chunk loss.

    Raises:
        ConfigError: If no region has that name or the import path leads nowhere.
    """
    from chunkgrpo.core.objectives import Clip, KlMask, NoTrustRegion

    o = objective
    built_in: dict[str, Callable[[], TrustRegion]] = {
        "clip": lambda: Clip(o.clip_low, o.clip_high),
        "kl_mask": lambda: KlMask(o.kl_threshold),
        "none": NoTrustRegion,
    }
    if o.trust in built_in:
        return built_in[o.trust]()
    module, separator, attribute = o.trust.partition(":")
    if not separator:
        raise unknown_name("objective.trust", o.trust, [*built_in, "or package.module:factory"])
    try:
        return getattr(importlib.import_module(module), attribute)(**o.trust_options)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"objective.trust {o.trust!r} can not be built: {error}") from error


def build_windows(config: Config, plan: ChunkPlan) -> WindowSchedule | None:
    """Return the schedule of windows; None where all steps are stochastic."""
    from chunkgrpo.core.windows import ChunkWindow

    w = config.sampling.window
    return ChunkWindow(plan, branches(config)) if w.kind == "chunk" else moving_window(config)


def branches(config: Config) -> tuple[int, ...]:
    """Return the chunks that a window of kind 'chunk' draws from; all where empty.

    Raises:
        ConfigError: If they are to be the merged steps and there are none.
    """
    indices = config.sampling.window.indices
    if indices != "merged":
        return indices
    sizes = merge_sizes(config)
    # The last sampler step, merged or not, is never trained.
    found = tuple(i for i, size in enumerate((sizes or ())[:-1]) if size > 1)
    if found:
        return found
    s = config.sampling
    if s.merge_entropy is not None:
        raise ConfigError(
            f"sampling.window.indices 'merged' trains merged steps, and no trained step of the "
            f"{s.steps} needs a second one for an entropy of sampling.merge_entropy = "
            f"{s.merge_entropy}; raise it"
        )
    raise ConfigError(
        f"sampling.window.indices 'merged' trains merged steps, and sampling.merge = "
        f"{list(sizes) if sizes else None} takes none of the trained steps together; set "
        "sampling.merge_entropy, or list chunks"
    )


def moving_window(config: Config) -> FixedWindow | RandomWindow | SlidingWindow | None:
    """Return the schedule of a window of one size; None where there is none.

    Raises:
        ValueError: If it does not lie in the trained steps.
    """
    from chunkgrpo.core import windows

    w, trained = config.sampling.window, num_trained(config)
    if w.kind == "fixed":
        return windows.FixedWindow(w.start, w.size, trained)
    if w.kind == "random":
        return windows.RandomWindow(w.size, trained, w.low, w.high)
    if w.kind == "sliding":
        return windows.SlidingWindow(w.size, trained, w.every, w.stride, w.decay, w.rate, w.after)
    return None


def build_tail(config: Config) -> Tail | None:
    """Return the solver of the steps after the window."""
    from chunkgrpo.runtime.solvers import MultistepTail

    w = config.sampling.window
    return MultistepTail(w.tail_fraction) if w.tail == "dpm" else None
