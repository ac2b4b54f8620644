# SPDX-License-Identifier: Apache-2.0
"""What every diffusers family shares: loading, what is trained, decoding, saving."""

from __future__ import annotations

import gc
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from chunkgrpo.core.schedules import (
    TimestepRounding,
    exact_timestep,
    floor1000_timestep,
    validate_sigmas,
)
from chunkgrpo.policies.embeddings import EmbeddingCache, model_identity
from chunkgrpo.policies.execution import (
    Execution,
    compile_blocks,
    lower_frozen,
    spare_decoder,
    use_attention_backend,
)
from chunkgrpo.runtime.attention import plain_attention
from chunkgrpo.runtime.offload import Offloaded, host_copy
from chunkgrpo.types import Conditioning

METHODS = ("lora", "full", "none")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention layers of one stream, as diffusers names them."""
BOTH_STREAMS = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same where text has weights of its own."""
LOWERED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "x", "cap_feats")
"""Inputs of the networks that may lose precision."""
DTYPES = {
    "bf16": torch.bfloat16,
    "bf16-pure": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class Adaptation:
    """Which weights are trained.

    Attributes:
        method: ``"lora"``, ``"full"``, or ``"none"`` for sampling only.
        rank, alpha: Of the LoRA; its update is scaled by alpha / rank.
        targets: Module names. With ``"lora"`` the endings of those that get one, the family's
            ``lora_targets`` where None; with ``"full"`` those whose weights are trained, with all
            that is in them, and all weights where None.
        seed: Of the LoRA's first weights.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")


def train_weights(network: torch.nn.Module, targets: Sequence[str] | None) -> None:
    """Mark the weights of some modules as trained and the others as frozen.

    Args:
        network: The network.
        targets: Names of modules, such as ``"norm1"`` or ``"ff.net"``; all weights where None.

    Raises:
        ValueError: If a name is that of no module.
    """
    network.requires_grad_(targets is None)
    for target in targets or ():
        found = [p for name, p in network.named_parameters() if f".{target}." in f".{name}"]
        if not found:
            raise ValueError(f"no module of the transformer is named {target!r}; name others")
        for parameter in found:
            parameter.requires_grad_(True)


class PipelinePolicy:
    """A diffusers pipeline as a policy; a family adds ``encode_texts`` and ``predict``.

    Args:
        pipe: The loaded pipeline; it becomes the policy's own and is changed.
        adaptation: Which weights are trained; these are float32 in every precision.
        precision: Precision of the network's arithmetic: autocast to ``bf16`` or, for sampling
            alone, ``fp16``; ``fp32``; or ``bf16-pure``, which also keeps what lies between the
            matrix products in bfloat16 (gradients still reach float32 weights); on CPUs a third
            faster in training. Velocities, transitions and log-densities are float32 in all.
        guidance: The number the stock pipeline's own argument takes; classifier-free guidance is
            on above ``guided_above``, which is 1 for most families.
        negative_prompt: Text of the unconditional half of guidance.
        size: Height and width of images in pixels; the pipeline's default where None.
        max_sequence_length: Text rows of the longest text encoder; the pipeline's default where
            None.
        timestep: How the network's timestep is rounded; as the pipeline's scheduler does where
            None.
        decode_batch: Images decoded at once.
        gradient_checkpointing: Recompute each block in the backward pass instead of keeping what
            lies inside it.
        execution: Types and places of frozen weights, and kernels.
        device: Where it runs; where the pipeline is, if None. What is offloaded never gets there
            before it is used.

    Raises:
        ValueError: If the precision is unknown or does not go with training, checkpointing or
            compilation, if the size does not divide, if nothing would be trained, or if the
            pipeline can not do what ``execution`` asks.
    """

    latent_shape: tuple[int, ...]
    image_ids: Any  # positions of image tokens, where the pipeline's latents come with them
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    guided_above: ClassVar[float] = 1.0

    def __init__(
        self,
        pipe: Any,
        adaptation: Adaptation | None = None,
        *,
        precision: str = "bf16",
        guidance: float = 1.0,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        max_sequence_length: int | None = None,
        timestep: TimestepRounding | None = None,
        decode_batch: int = 64,
        gradient_checkpointing: bool = False,
        execution: Execution | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.pipe = pipe
        self.execution = execution or Execution()
        self.adaptation = adaptation or Adaptation()
        if precision not in DTYPES:
            raise ValueError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
        if precision == "fp16" and self.adaptation.method != "none":
            raise ValueError(
                "precision 'fp16' is for sampling alone (method 'none'): in training small "
                "gradients become 0, as there is no loss scaling; choose 'bf16'"
            )
        self.dtype = DTYPES[precision]
        self.pure = precision == "bf16-pure"
        if self.pure and gradient_checkpointing:
            # Its casts of the weights are gone by the time a block is computed again.
            raise ValueError("precision 'bf16-pure' excludes gradient checkpointing; choose 'bf16'")
        if self.pure and self.execution.compile:
            # Its weights are other tensors at each call.
            raise ValueError("precision 'bf16-pure' excludes compiled blocks; choose 'bf16'")
        self.guidance = guidance
        self.negative_prompt = negative_prompt
        self.max_sequence_length = max_sequence_length or self.stock_default("max_sequence_length")
        self.decode_batch = decode_batch
        self.device = torch.device(device or pipe.transformer.device)
        pipe.set_progress_bar_config(disable=True)
        self.size = size or (self.default_side(),) * 2
        if any(side % self.size_step for side in self.size):
            raise ValueError(
                f"image size {self.size[0]} x {self.size[1]} must be divisible by {self.size_step}"
            )
        drawn = pipe.prepare_latents(
            1, self.latent_channels, *self.size, torch.float32, self.device, Generator()
        )
        latents, self.image_ids = drawn if isinstance(drawn, tuple) else (drawn, None)
        self.latent_shape = tuple(latents.shape[1:])
        self.timestep = timestep or self.native_timestep()
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        if gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing(self.checkpointed)
        self._encoded: dict[str, Conditioning] = {}
        self.embeddings: EmbeddingCache | None = None
        self._released = False
        self._adapt()
        # A full fine-tune saves the whole transformer, also what it left alone.
        lowering = self.execution.lower_frozen and self.adaptation.method != "full"
        if self.dtype != torch.float32 and lowering:
            lower_frozen(pipe.transformer, self.dtype)
        if self.execution.attention_backend:
            use_attention_backend(pipe.transformer, self.execution.attention_backend)
        if self.execution.compile:
            compile_blocks(pipe.transformer, self.execution.compile)
        spare_decoder(pipe.vae, self.execution.vae_slicing, self.execution.vae_tiling)
        self.offloaded: dict[str, Offloaded] = {}
        self._place({n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)})
        self._trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
        self._base: list[Tensor] = []
        if self.adaptation.method == "full":
            away = "reference" in self.execution.offload
            self._base = [
                host_copy(p, self.device).clone() if away else p.detach().clone()
                for p in self._trained
            ]

    def _adapt(self) -> None:
        """Mark what is trained, and make it float32."""
        transformer = self.pipe.transformer
        if self.adaptation.method == "lora":
            from peft import LoraConfig

            targets = self.adaptation.targets or self.lora_targets
            config = LoraConfig(
                r=self.adaptation.rank,
                lora_alpha=self.adaptation.alpha,  # type: ignore[arg-type] # any number will do
                init_lora_weights="gaussian",
                target_modules=list(targets),
            )
            origin = transformer.device
            devices = [] if origin.type == "cpu" else [origin]
            with torch.random.fork_rng(devices, device_type=origin.type):
                torch.manual_seed(self.adaptation.seed)
                transformer.add_adapter(config)
            if not any(p.requires_grad for p in transformer.parameters()):
                raise ValueError(
                    f"no module matches the LoRA targets {', '.join(targets)}; name others"
                )
        elif self.adaptation.method == "full":
            train_weights(transformer, self.adaptation.targets)
        for parameter in transformer.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    def _place(self, modules: Mapping[str, torch.nn.Module]) -> None:
        """Bring modules to the device, or to where they wait."""
        texts = [m for n, m in modules.items() if n.startswith("text_encoder")]
        for text in texts if self.execution.text_dtype else ():
            text.to(self.execution.text_dtype)
        waiting = {"text_encoders": texts, "vae": [m for n, m in modules.items() if n == "vae"]}
        away: list[torch.nn.Module] = []
        for part, members in waiting.items():
            if part in self.execution.offload and members:
                self.offloaded[part] = Offloaded(members, self.device)
                away += members
        for module in modules.values():
            if not any(module is each for each in away):
                module.to(self.device)

    def visiting(self, part: str) -> AbstractContextManager[None]:
        """Inside this context an offloaded part is on the device."""
        return self.offloaded[part].at_work() if part in self.offloaded else nullcontext()

    # --- what a family may say differently ------------------------------------------------------

    @property
    def size_step(self) -> int:
        """Heights and widths are multiples of this: two latent pixels make a patch."""
        return 2 * self.pipe.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        """Channels that ``prepare_latents`` is asked for."""
        return self.pipe.transformer.config.in_channels

    @property
    def cfg_scale(self) -> float:
        """Scale of classifier-free guidance."""
        return self.guidance

    @property
    def guided(self) -> bool:
        """Whether velocities need the unconditional half too."""
        return self.cfg_scale > self.guided_above

    def default_side(self) -> int:
        """Return the side of the square image the pipeline makes unless told."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """Encode prompts; with guidance, what stands for no prompt is named ``negative_...``."""
        raise TypeError("a family must say how prompts are encoded")

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Predict dx/dsigma of rows, each under the texts of its own row."""
        raise TypeError("a family must say how a velocity is predicted")

    def guide(self, without: Tensor, with_prompt: Tensor) -> Tensor:
        """Combine the two halves of guidance."""
        return without + self.cfg_scale * (with_prompt - without)

    def schedule_options(self, num_steps: int) -> dict[str, Any]:
        """Return what the pipeline passes to its scheduler's ``set_timesteps``."""
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": self.linear_mu(self.latent_shape[0]),
        }

    def vae_input(self, x: Tensor) -> Tensor:
        """Turn the loop's latents into what the VAE decodes."""
        config = self.pipe.vae.config
        return x / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def vae_images(self, z: Tensor) -> Tensor:
        """Decode with the VAE."""
        return self.pipe.vae.decode(z, return_dict=False)[0]

    # --- the pipeline's own conventions ---------------------------------------------------------

    def stock_default(self, argument: str) -> Any:
        """Return the default of an argument of the pipeline's call."""
        return inspect.signature(type(self.pipe).__call__).parameters[argument].default

    @property
    def stock_module(self) -> Any:
        """The module of the pipeline's class, with its functions of the schedule."""
        return import_module(type(self.pipe).__module__)

    def linear_mu(self, num_tokens: int) -> float:
        """Return the shift that grows with the number of image tokens, on a log scale."""
        config = self.pipe.scheduler.config
        return self.stock_module.calculate_shift(
            num_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def native_scheduler(self, num_steps: int) -> Any:
        """Return the pipeline's scheduler, set as the pipeline would for this image size."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        options = self.schedule_options(num_steps)
        self.stock_module.retrieve_timesteps(scheduler, num_steps, "cpu", **options)
        return scheduler

    def native_sigmas(self, num_steps: int) -> Tensor:
        """Return the schedule the stock pipeline uses by default, from its own scheduler.

        It holds the family's static or resolution-dependent shift for this policy's image size.
        To sample it with the stock pipeline, pass ``num_inference_steps`` and no ``sigmas``.

        Args:
            num_steps: K >= 2 sampler steps.

        Returns:
            [K+1] float32 on the CPU, decreasing to exactly 0.

        Raises:
            ValueError: If there are fewer than 2 steps.
        """
        return validate_sigmas(self.native_scheduler(num_steps).sigmas.float().cpu())

    def native_timestep(self) -> TimestepRounding:
        """Return the rounding of the pipeline's scheduler: some truncate to whole thousandths."""
        exact = self.native_scheduler(2).timesteps.is_floating_point()
        return exact_timestep if exact else floor1000_timestep

    def parameters(self) -> list[Tensor]:
        """Return the trainable parameters."""
        return list(self._trained)

    @property
    def plain(self) -> bool:
        """Whether attention is unfused: on CPUs, unless a backend was chosen."""
        return self.device.type == "cpu" and not self.execution.attention_backend

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Set autocast and the attention kernel for the network."""
        low = self.dtype != torch.float32 and not self.pure
        cast = torch.autocast(self.device.type, self.dtype) if low else nullcontext()
        with cast, plain_attention() if self.plain else nullcontext():
            yield

    def checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block so that the backward pass computes it again, with the same kernels."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), plain_attention() if self.plain else nullcontext()

        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    def network(self, **inputs: Any) -> Any:
        """Call the transformer and return its first output.

        With ``bf16-pure`` it runs on bfloat16 casts of the weights, through which gradients reach
        the float32 originals.
        """
        transformer = self.pipe.transformer
        if not self.pure:
            return transformer(**inputs, return_dict=False)[0]
        weights = {n: p.to(self.dtype) for n, p in transformer.named_parameters()}
        # The timestep keeps its precision: bfloat16 can not tell 979 from 980.
        low = {
            name: self.lowered(value) if name in LOWERED else value
            for name, value in inputs.items()
        }
        return torch.func.functional_call(
            transformer, weights, kwargs={**low, "return_dict": False}
        )[0]

    def lowered(self, value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Cast to the low precision."""
        if isinstance(value, list):
            return [row.to(self.dtype) for row in value]
        return value.to(self.dtype)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the pipeline's own encoders, each distinct prompt once.

        One at a time: in a batch the last bits of a row depend on the batch's size, and a resumed
        run meets its prompts in other company than the uninterrupted one. Texts of different
        lengths are padded with zeros here; their family keeps a mask.
        """
        found = {prompt: self._known(prompt) for prompt in dict.fromkeys(prompts)}
        found |= dict(self.encode_new([prompt for prompt, row in found.items() if row is None]))
        rows = [row.tensors for row in (found[prompt] for prompt in prompts) if row is not None]
        return Conditioning({name: padded([row[name] for row in rows]) for name in rows[0]})

    def _known(self, prompt: str) -> Conditioning | None:
        """Return a prompt's row from memory or from the disk."""
        if prompt in self._encoded:
            return self._encoded[prompt]
        return self.embeddings.load(prompt, self.device) if self.embeddings else None

    def encode_new(self, prompts: Sequence[str]) -> Iterator[tuple[str, Conditioning]]:
        """Encode prompts one by one and keep them; offloaded text encoders visit once for all."""
        if not prompts:
            return
        if self._released:
            raise ValueError(
                f"prompt {prompts[0]!r} is not encoded, and the text encoders were released; "
                "encode every prompt before release_text_encoders(), or set "
                "model.embedding_cache to null to keep them loaded"
            )
        self._load_text_encoders()
        with self.visiting("text_encoders"):
            for prompt in prompts:
                with torch.no_grad(), quiet_diffusers():
                    encoded = self.encode_texts([prompt])
                row = Conditioning({n: in_float32(t) for n, t in encoded.tensors.items()})
                if self.embeddings:  # what is on the disk need not fill the device's memory
                    self.embeddings.save(prompt, row)
                else:
                    self._encoded[prompt] = row
                yield prompt, row

    def encoding_settings(self) -> dict[str, Any]:
        """Return all settings that ``encode_texts`` depends on; a family adds its own."""
        return {
            "guidance": self.guidance,
            "guided": self.guided,
            "negative_prompt": self.negative_prompt,
            "max_sequence_length": self.max_sequence_length,
        }

    def use_embeddings(self, root: str | Path) -> None:
        """Keep encoded prompts in a folder; text encoders load when one is missing there."""
        import diffusers
        import transformers

        source = getattr(self.pipe, "name_or_path", None)
        if not source:
            raise ValueError(
                "embeddings can be cached only for a pipeline that was loaded from a folder or "
                "the hub, which says what made them; save the pipeline and load it"
            )
        identity = {
            "model": model_identity(source),
            "policy": type(self).__name__,
            "settings": self.encoding_settings(),
            "device": self.device.type,
            "dtype": str(self.execution.text_dtype or torch.float32).removeprefix("torch."),
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }
        self.embeddings = EmbeddingCache(Path(root), identity)

    def release_text_encoders(self) -> None:
        """Drop the text encoders and free their memory; prompts already encoded stay usable."""
        for name in [n for n in self.pipe.components if n.startswith("text_encoder")]:
            setattr(self.pipe, name, None)
        self.offloaded.pop("text_encoders", None)
        self._released = True
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _text_encoders(self) -> dict[str, Any]:
        """The text encoders by name, None where one is not loaded."""
        present = self.pipe.components
        return {n: module for n, module in present.items() if n.startswith("text_encoder")}

    @property
    def has_text_encoders(self) -> bool:
        """Whether a text encoder is loaded."""
        return any(module is not None for module in self._text_encoders.values())

    def _load_text_encoders(self) -> None:
        """Load the text encoders that the pipeline was loaded without, or that were released."""
        if self.has_text_encoders:
            return
        found = self._stored_text_encoders()
        for module in found.values():
            module.requires_grad_(False).eval()
        self._place(found)
        # Registered, not only set: the saved pipeline must list them.
        self.pipe.register_modules(**found)

    def _stored_text_encoders(self) -> dict[str, torch.nn.Module]:
        """Load the text encoders as they are stored; none where it is not known where."""
        from diffusers import DiffusionPipeline

        source = getattr(self.pipe, "name_or_path", None)
        if not source:
            return {}
        names = self._text_encoders
        others = {n: c for n, c in self.pipe.components.items() if n not in names}
        with quiet_diffusers():
            loaded = DiffusionPipeline.from_pretrained(source, **others)
        return {n: loaded.components[n] for n in names if loaded.components[n] is not None}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict dx/dsigma in float32; see :class:`~chunkgrpo.policies.protocol.Policy`."""
        texts, sigma = conditioning.tensors, self.timestep(sigma)
        with self.arithmetic():
            if not self.guided:
                return self.predict(x, sigma, texts).float()
            # Both halves in one forward; texts of different lengths are padded to one.
            both = {
                name: padded([texts.get(f"negative_{name}", text), text])
                for name, text in texts.items()
                if not name.startswith("negative_")
            }
            v = self.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
            without, with_prompt = v.float().chunk(2)
            return self.guide(without, with_prompt)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decode clean latents to images in [0, 1] with the pipeline's VAE and post-processing."""
        with self.visiting("vae"):
            return self._decode(x)

    def _decode(self, x: Tensor) -> Tensor:
        images = []
        for part in x.split(self.decode_batch):
            # No plain attention here: the VAE's attention, if any, is over many positions.
            low = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype) if low else nullcontext():
                image = self.vae_images(self.vae_input(part).to(self.pipe.vae.dtype))
            images.append(self.pipe.image_processor.postprocess(image.float(), output_type="pt"))
        return torch.cat(images)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside this context the network answers as the base model, exactly."""
        transformer = self.pipe.transformer
        if self.adaptation.method == "lora":
            transformer.disable_adapters()
            try:
                yield
            finally:
                transformer.enable_adapters()
            return
        kept = [p.data for p in self._trained]
        for parameter, base in zip(self._trained, self._base, strict=True):
            parameter.data = base.to(parameter.device, non_blocking=True)
        try:
            yield
        finally:
            for parameter, tensor in zip(self._trained, kept, strict=True):
                parameter.data = tensor

    def save(self, folder: str | Path) -> None:
        """Save for stock diffusers: a LoRA for ``load_lora_weights``, or a whole pipeline."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.adaptation.method == "full":
            kept = self._text_encoders
            # Those that were released, or in another type than they are stored in.
            stored = {}
            if self.execution.text_dtype not in (None, torch.float32) or not any(kept.values()):
                stored = self._stored_text_encoders()
            self.pipe.register_modules(**stored)
            with quiet_diffusers():
                self.pipe.save_pretrained(folder)
            for name in stored:
                setattr(self.pipe, name, kept[name])
            return
        from peft.utils import get_peft_model_state_dict

        transformer = self.pipe.transformer
        self.pipe.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            # Without it a loader assumes alpha = rank and is silently wrong otherwise.
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )


def in_float32(tensor: Tensor) -> Tensor:
    """Cast lower floating-point types up; leave numbers of other kinds."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Join the rows of tensors, with zeros after those whose second axis is shorter."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    return pad_sequence([row for part in parts for row in part], batch_first=True)


def renormalised(guided: Tensor, with_prompt: Tensor) -> Tensor:
    """Scale guided velocities to the norm of the conditional ones along the last axis."""
    before, after = (v.norm(dim=-1, keepdim=True) for v in (with_prompt, guided))
    return guided * (before / after)


def with_negative(texts: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> Conditioning:
    """Join what was encoded for prompts and for the unconditional half of guidance."""
    return Conditioning({**texts, **{f"negative_{name}": t for name, t in negative.items()}})


def _says_more_than_torchvision(record: LogRecord) -> bool:
    """Let a log record pass unless it says that images are processed without torchvision."""
    return "requires torchvision" not in record.getMessage()


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence progress bars, warnings of truncated prompts and notes about torchvision."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    handlers = getLogger(transformers_logging.get_logger().name).handlers
    for handler in handlers:
        handler.addFilter(_says_more_than_torchvision)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_says_more_than_torchvision)
        logging.set_verbosity(level)
        logging.enable_progress_bar()
        if bars:
            transformers_logging.enable_progress_bar()


def pipeline_class_name(model: str | Path) -> str:
    """Read a model folder's pipeline class.

    Raises:
        ValueError: If the folder is missing or holds no diffusers pipeline.
    """
    path = Path(model)
    if not path.exists():
        if len(path.parts) == 2 and not str(model).startswith((".", "/", "~")):
            from diffusers import DiffusionPipeline

            try:
                config: Any = DiffusionPipeline.load_config(str(model))
                return str(config["_class_name"])
            except OSError as error:
                reason = str(error).strip().split("\n")[0]
                raise ValueError(
                    f"{model} is neither a folder nor a pipeline on the hub: {reason}"
                ) from error
        raise ValueError(
            f"model folder {model} does not exist; give a folder or a hub id owner/name"
        )
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{model} is no diffusers pipeline: it has no model_index.json; "
            "point to the folder that save_pretrained wrote"
        )
    return str(json.loads(index.read_text())["_class_name"])
