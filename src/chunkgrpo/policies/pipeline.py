# SPDX-License-Identifier: Apache-2.0
"""What every diffusers family shares: the schedule, the network, decoding, saving."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from chunkgrpo.core.schedules import (
    TimestepRounding,
    exact_timestep,
    floor1000_timestep,
    validate_sigmas,
)
from chunkgrpo.policies.adaptation import ATTENTION, Adaptation, Reference, adapt, save_lora
from chunkgrpo.policies.encoding import PromptEncoding, padded
from chunkgrpo.policies.execution import (
    PRECISIONS,
    Execution,
    compile_blocks,
    lower_frozen,
    spare_decoder,
    use_attention_backend,
)
from chunkgrpo.policies.quiet import quiet_diffusers
from chunkgrpo.runtime.attention import plain_attention
from chunkgrpo.runtime.finite import check_finite
from chunkgrpo.runtime.offload import Offloaded
from chunkgrpo.types import Conditioning

LOWERED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "x", "cap_feats")
"""Inputs of the networks that may lose precision."""


@dataclass(frozen=True)
class GenerationOptions:
    """What is generated, by the arguments of the stock pipeline's call.

    Attributes:
        guidance: Guidance scale as the stock pipeline defines it; classifier-free guidance is
            on above ``guided_above``, which is 1 for most families.
        negative_prompt: Text of the unconditional half of guidance, for prompts without
            their own.
        size: Height and width of images in pixels; the pipeline's default where None.
        max_sequence_length: Text tokens of the longest text encoder; the pipeline's default where
            None.
        timestep: How the network's timestep is rounded; as the pipeline's scheduler does where
            None.
    """

    guidance: float = 1.0
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    max_sequence_length: int | None = None
    timestep: TimestepRounding | None = None


class PipelinePolicy(PromptEncoding):
    """A diffusers pipeline as a policy; a family adds ``encode_texts`` and ``predict``.

    Args:
        pipe: The loaded pipeline; the policy takes it over and changes it.
        adaptation: Which weights are trained; these are float32 in every precision.
        generation: What is generated, see :class:`GenerationOptions`.
        precision: Precision of the network's arithmetic: autocast to ``bf16`` or, for sampling
            alone, ``fp16``; ``fp32``; or ``bf16-pure``, which also computes everything between
            the matrix products in bfloat16 (gradients still reach float32 weights). Velocities,
            transitions and log-densities are always float32.
        decode_batch: Images decoded at once.
        gradient_checkpointing: Recompute each block in the backward pass instead of storing its
            activations.
        execution: Types and places of frozen weights, and kernels.
        device: Where it runs; None: where the pipeline is. Offloaded parts are moved there only
            while in use.

    Raises:
        ValueError: If the precision is unknown or does not go with training, checkpointing or
            compilation, if the size does not divide, if nothing would be trained, or if the
            pipeline cannot do what ``execution`` asks.
    """

    latent_shape: tuple[int, ...]
    image_ids: Any  # positions of image tokens, where the pipeline's latents come with them
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION

    def __init__(
        self,
        pipe: Any,
        adaptation: Adaptation | None = None,
        *,
        generation: GenerationOptions | None = None,
        precision: str = "bf16",
        decode_batch: int = 64,
        gradient_checkpointing: bool = False,
        execution: Execution | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.pipe = pipe
        self.execution = execution or Execution()
        self.adaptation = adaptation or Adaptation()
        check_precision(precision, self.adaptation, self.execution, gradient_checkpointing)
        self.dtype = PRECISIONS[precision]
        self.pure = precision == "bf16-pure"
        self.decode_batch = decode_batch
        self.device = torch.device(device or pipe.transformer.device)
        pipe.set_progress_bar_config(disable=True)
        self._use(generation or GenerationOptions())
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        if gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing(self.checkpointed)
        adapt(pipe.transformer, self.adaptation, self.lora_targets)
        # Full fine-tuning saves the whole transformer, frozen weights included.
        lowering = self.execution.lower_frozen and self.adaptation.method != "full"
        if self.dtype != torch.float32 and lowering:
            lower_frozen(pipe.transformer, self.dtype)
        if self.execution.attention_backend:
            use_attention_backend(pipe.transformer, self.execution.attention_backend)
        if self.execution.compile:
            compile_blocks(pipe.transformer, self.execution.compile)
        spare_decoder(pipe.vae, self.execution.vae_slicing, self.execution.vae_tiling)
        self.offloaded: dict[str, Offloaded] = {}
        self.place({n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)})
        on_host = "reference" in self.execution.offload
        self.base = Reference(pipe.transformer, self.adaptation.method, self.device, on_host)

    @classmethod
    def from_options(cls, pipe: Any, adaptation: Adaptation | None = None, **options: Any) -> Self:
        """Build a policy from flat options, as a configuration has them.

        Args:
            pipe: The loaded pipeline.
            adaptation: Which weights are trained.
            options: Fields of :class:`GenerationOptions`, and arguments of the family's class.
        """
        names = {field.name for field in fields(GenerationOptions)} & options.keys()
        generation = GenerationOptions(**{name: options.pop(name) for name in names})
        return cls(pipe, adaptation, generation=generation, **options)

    def _use(self, generation: GenerationOptions) -> None:
        """Set what is generated, the latents' shape and the rounding of timesteps."""
        self.guidance = generation.guidance
        self.negative_prompt = generation.negative_prompt
        length = generation.max_sequence_length
        self.max_sequence_length = length or self.stock_default("max_sequence_length")
        self.size = generation.size or (self.default_side(),) * 2
        if any(side % self.size_step for side in self.size):
            raise ValueError(
                f"image size {self.size[0]} x {self.size[1]} must be divisible by {self.size_step}"
            )
        drawn = self.pipe.prepare_latents(
            1, self.latent_channels, *self.size, torch.float32, self.device, Generator()
        )
        latents, self.image_ids = drawn if isinstance(drawn, tuple) else (drawn, None)
        self.latent_shape = tuple(latents.shape[1:])
        self.timestep = generation.timestep or self.native_timestep()

    def place(self, modules: Mapping[str, torch.nn.Module]) -> None:
        """Move modules to the device, or to host memory if they are offloaded."""
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

    # --- what a family may override -------------------------------------------------------------

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
        """Return the side of the square image that the pipeline generates by default."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def predict(self, x: Tensor, sigma: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        """Predict dx/dsigma of rows, each with the texts of its row."""
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
        """Return the rounding of the pipeline's scheduler; some truncate to whole thousandths."""
        exact = self.native_scheduler(2).timesteps.is_floating_point()
        return exact_timestep if exact else floor1000_timestep

    def parameters(self) -> list[Tensor]:
        """Return the trainable parameters."""
        return list(self.base.trained)

    def named_parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by their names in the transformer."""
        every = self.pipe.transformer.named_parameters()
        return {name: parameter for name, parameter in every if parameter.requires_grad}

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
        """Run a block so that the backward pass recomputes it with the same kernels."""

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
        # The timestep keeps its precision: bfloat16 cannot tell 979 from 980.
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
            # Post-processing would clip an infinite pixel to white.
            image = image.float().where(image.isfinite(), float("nan"))
            images.append(self.pipe.image_processor.postprocess(image, output_type="pt"))
        return torch.cat(images)

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the network computes exactly what the base model does."""
        return self.base.applied()

    def save(self, folder: str | Path) -> None:
        """Save for stock diffusers: a LoRA for ``load_lora_weights``, or a whole pipeline.

        Raises:
            NonFiniteError: If a trained weight is not finite; nothing is written then.
        """
        check_finite("weights", self.named_parameters())
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.adaptation.method == "full":
            kept = self._text_encoders
            # Text encoders that were released, or cast to another type.
            stored = {}
            if self.execution.text_dtype not in (None, torch.float32) or not any(kept.values()):
                stored = self._stored_text_encoders()
            self.pipe.register_modules(**stored)
            with quiet_diffusers():
                self.pipe.save_pretrained(folder)
            for name in stored:
                setattr(self.pipe, name, kept[name])
            return
        save_lora(self.pipe, folder)


def check_precision(
    precision: str, adaptation: Adaptation, execution: Execution, checkpointing: bool
) -> None:
    """Refuse a precision that is unknown or incompatible with other options.

    Raises:
        ValueError: With an alternative.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if precision == "fp16" and adaptation.method != "none":
        raise ValueError(
            "precision 'fp16' is for sampling alone (method 'none'): in training small "
            "gradients become 0, as there is no loss scaling; choose 'bf16'"
        )
    pure = precision == "bf16-pure"
    if pure and checkpointing:
        # The casts of the weights no longer exist when a block is recomputed.
        raise ValueError("precision 'bf16-pure' excludes gradient checkpointing; choose 'bf16'")
    if pure and execution.compile:
        # The weights are other tensors in each call.
        raise ValueError("precision 'bf16-pure' excludes compiled blocks; choose 'bf16'")


def renormalised(guided: Tensor, with_prompt: Tensor) -> Tensor:
    """Scale guided velocities to the norm of the conditional ones along the last axis."""
    before, after = (v.norm(dim=-1, keepdim=True) for v in (with_prompt, guided))
    return guided * (before / after)
