# SPDX-License-Identifier: Apache-2.0
"""What every diffusers family shares: loading, what is trained, decoding, saving."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.core.schedules import TimestepRounding, exact_timestep
from chunkgrpo.policies.embeddings import EmbeddingCache, model_identity
from chunkgrpo.runtime.attention import plain_attention
from chunkgrpo.types import Conditioning

METHODS = ("lora", "full", "none")
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
        targets: Module name endings that get a LoRA.
        seed: Of the LoRA's first weights.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")


class PipelinePolicy:
    """A diffusers pipeline as a policy; a family adds ``encode`` and ``predict``.

    Args:
        pipe: The loaded pipeline.
        adaptation: Which weights are trained.
        precision: Precision of the network: autocast to ``bf16`` or ``fp16``, ``fp32``, or
            ``bf16-pure``, which also keeps what lies between the matrix products in bfloat16 (the
            weights and their gradients stay in float32); on CPUs a third faster in training.
        guidance: Guidance scale; at most 1 turns classifier-free guidance off.
        size: Height and width of images in pixels; the pipeline's default where None.
        max_sequence_length: Text rows of the longest text encoder.
        timestep: How the network's timestep is rounded.
        decode_batch: Images decoded at once.
    """

    latent_shape: tuple[int, ...]

    def __init__(
        self,
        pipe: Any,
        adaptation: Adaptation | None = None,
        *,
        precision: str = "bf16",
        guidance: float = 1.0,
        size: tuple[int, int] | None = None,
        max_sequence_length: int = 256,
        timestep: TimestepRounding = exact_timestep,
        decode_batch: int = 64,
    ) -> None:
        self.pipe = pipe
        self.adaptation = adaptation or Adaptation()
        if precision not in DTYPES:
            raise ValueError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
        self.dtype = DTYPES[precision]
        self.pure = precision == "bf16-pure"
        self.guidance = guidance
        self.max_sequence_length = max_sequence_length
        self.timestep = timestep
        self.decode_batch = decode_batch
        self.device = pipe.transformer.device
        pipe.set_progress_bar_config(disable=True)
        factor = pipe.vae_scale_factor
        self.size = size or (pipe.transformer.config.sample_size * factor,) * 2
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        self._encoded: dict[str, Conditioning] = {}
        self.embeddings: EmbeddingCache | None = None
        self._released = False
        self._base: list[Tensor] = []
        if self.adaptation.method == "lora":
            from peft import LoraConfig

            config = LoraConfig(
                r=self.adaptation.rank,
                lora_alpha=self.adaptation.alpha,  # type: ignore[arg-type] # any number will do
                init_lora_weights="gaussian",
                target_modules=list(self.adaptation.targets),
            )
            devices = [] if self.device.type == "cpu" else [self.device]
            with torch.random.fork_rng(devices, device_type=self.device.type):
                torch.manual_seed(self.adaptation.seed)
                pipe.transformer.add_adapter(config)
        elif self.adaptation.method == "full":
            pipe.transformer.requires_grad_(True)
        self._trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
        if not self._trained and self.adaptation.method != "none":
            targets = ", ".join(self.adaptation.targets)
            raise ValueError(f"no module matches the LoRA targets {targets}; name others")
        if self.adaptation.method == "full":
            self._base = [p.detach().clone() for p in self._trained]

    def parameters(self) -> list[Tensor]:
        """Return the trainable parameters."""
        return list(self._trained)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Set autocast and the attention kernel for the network."""
        on_cpu = self.device.type == "cpu"
        low = self.dtype != torch.float32 and not self.pure
        cast = torch.autocast(self.device.type, self.dtype) if low else nullcontext()
        with cast, plain_attention() if on_cpu else nullcontext():
            yield

    def network(self, **inputs: Any) -> Tensor:
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
            name: value.to(self.dtype) if name != "timestep" else value
            for name, value in inputs.items()
        }
        return torch.func.functional_call(
            transformer, weights, kwargs={**low, "return_dict": False}
        )[0]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the pipeline's own encoders, each distinct prompt once.

        One at a time: in a batch the last bits of a row depend on the batch's size, and a resumed
        run meets its prompts in other company than the uninterrupted one.
        """
        rows = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.cat([rows[prompt] for prompt in prompts])

    def _row(self, prompt: str) -> Conditioning:
        """Return a prompt's row from memory, from the disk or from the text encoders."""
        if prompt in self._encoded:
            return self._encoded[prompt]
        row = self.embeddings.load(prompt, self.device) if self.embeddings else None
        if row is None:
            if self._released:
                raise ValueError(
                    f"prompt {prompt!r} is not encoded, and the text encoders were released; "
                    "encode every prompt before release_text_encoders(), or set "
                    "model.embedding_cache to null to keep them loaded"
                )
            self._load_text_encoders()
            with torch.no_grad(), quiet_diffusers():
                row = self.encode_texts([prompt])
            if self.embeddings:
                self.embeddings.save(prompt, row)
        if not self.embeddings:  # what is on the disk need not fill the device's memory
            self._encoded[prompt] = row
        return row

    def encoding_settings(self) -> dict[str, Any]:
        """Return all settings that ``encode_texts`` depends on; a family adds its own."""
        return {"guidance": self.guidance, "max_sequence_length": self.max_sequence_length}

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
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }
        self.embeddings = EmbeddingCache(Path(root), identity)

    def release_text_encoders(self) -> None:
        """Drop the text encoders and free their memory; prompts already encoded stay usable."""
        for name in [n for n in self.pipe.components if n.startswith("text_encoder")]:
            setattr(self.pipe, name, None)
        self._released = True
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load_text_encoders(self) -> None:
        """Load the text encoders that the pipeline was loaded without, or that were released."""
        from diffusers import DiffusionPipeline

        present = self.pipe.components
        encoders = [n for n in present if n.startswith("text_encoder")]
        source = getattr(self.pipe, "name_or_path", None)
        if not source or any(present[n] is not None for n in encoders):
            return
        others = {n: c for n, c in present.items() if n not in encoders}
        with quiet_diffusers():
            loaded = DiffusionPipeline.from_pretrained(source, **others)
        found = {n: loaded.components[n] for n in encoders if loaded.components[n] is not None}
        for module in found.values():
            module.requires_grad_(False).eval().to(self.device)
        # Registered, not only set: the saved pipeline must list them.
        self.pipe.register_modules(**found)

    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """Encode prompts (family)."""
        raise TypeError("a family must say how prompts are encoded")

    def predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict the guided velocity (family)."""
        raise TypeError("a family must say how a velocity is predicted")

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict dx/dsigma in float32; see :class:`~chunkgrpo.policies.protocol.Policy`."""
        with self.arithmetic():
            return self.predict(x, self.timestep(sigma), conditioning).float()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decode clean latents to images in [0, 1] with the pipeline's VAE and post-processing."""
        vae = self.pipe.vae
        images = []
        for part in x.split(self.decode_batch):
            # No plain attention here: the VAE's attention, if any, is over many positions.
            low = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype) if low else nullcontext():
                z = part / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
                image = vae.decode(z.to(vae.dtype), return_dict=False)[0]
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
            parameter.data = base
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
            self._load_text_encoders()
            with quiet_diffusers():
                self.pipe.save_pretrained(folder)
            if self._released:
                self.release_text_encoders()
            return
        from peft.utils import get_peft_model_state_dict

        transformer = self.pipe.transformer
        self.pipe.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            # Without it a loader assumes alpha = rank and is silently wrong otherwise.
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence progress bars and the warning about every truncated prompt."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
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
