# SPDX-License-Identifier: Apache-2.0
"""A model's networks from their ``config.json`` files alone: operations and memory, no weights.

The networks are built by diffusers and transformers as usual, but on fake tensors, which have
shapes and types and no content. So operations are counted by the formulas of
``torch.utils.flop_counter``, and memory is added up, on the very operators that a real run calls.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from chunkgrpo.policies.adaptation import train_weights
from chunkgrpo.policies.execution import lower_frozen
from chunkgrpo.runtime.attention import plain_attention

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What ``config.json`` files say of a pipeline.

    Attributes:
        pipeline: Its class.
        transformer, vae: Their configurations, with ``_class_name``.
        text_encoders: Class name and configuration of each.
        distilled: Whether the pipeline is marked as guidance-distilled.
    """

    pipeline: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    distilled: bool = False

    @property
    def vae_factor(self) -> int:
        """Pixels to a latent pixel, along each side."""
        v = self.vae
        if "temperal_downsample" in v:
            return 2 ** len(v["temperal_downsample"])
        blocks = v.get("encoder_block_out_channels") or v["block_out_channels"]
        return 2 ** (len(blocks) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of what the VAE decodes."""
        return int(self.vae.get("latent_channels") or self.vae["z_dim"])

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width of images; the pipeline's default where they are None."""
        side = int(self.transformer.get("sample_size") or 1024 // self.vae_factor)
        side *= self.vae_factor
        return height or side, width or side


@dataclass(frozen=True)
class Work:
    """What one call costs.

    Attributes:
        rows: Latents in it, both halves of guidance counted as one.
        forward, backward: Floating-point operations; a multiplication and an addition are two.
            The backward pass holds what gradient checkpointing computes again.
        peak: Bytes that lie in memory at once, beside weights and optimizer; gradients included.
    """

    rows: int
    forward: int
    backward: int = 0
    peak: int = 0


@dataclass(frozen=True)
class NetworkWork:
    """A transformer's size, and what it costs to sample from and to train.

    Attributes:
        parameters: Weights of the base model.
        trainable: Weights that are trained.
        nbytes: Bytes of all weights, the LoRA's among them.
        sampling, training: One forward without gradient; one forward and backward.
    """

    parameters: int
    trainable: int
    nbytes: int
    sampling: Work
    training: Work


def read_architecture(model: str | Path) -> Architecture:
    """Read a pipeline's configurations; of a hub id, only these files are fetched.

    Raises:
        ValueError: If the model is missing, or a file that a pipeline must have.
    """
    from chunkgrpo.policies.loading import pipeline_class_name

    name = pipeline_class_name(model)

    def read(file: str) -> dict[str, Any]:
        path = Path(model) / file
        if not Path(model).exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(model), file))
        if not path.is_file():
            raise ValueError(f"{model} has no {file}; point to the folder of a whole pipeline")
        return json.loads(path.read_text())

    index = read("model_index.json")
    encoders = [n for n, v in index.items() if n.startswith("text_encoder") and _is_module(v)]
    return Architecture(
        name,
        read("transformer/config.json"),
        read("vae/config.json"),
        tuple((index[n][1], read(f"{n}/config.json")) for n in encoders),
        bool(index.get("is_distilled", False)),
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value[0])


# --- what each transformer is called with -------------------------------------------------------


def _sd3(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    # Both CLIPs fill their whole length, and T5's rows follow.
    clip = max((e.get("max_position_embeddings", 0) for _, e in a.text_encoders), default=77)
    return {
        "hidden_states": torch.zeros(rows, c["in_channels"], h, w),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, clip + text, c["joint_attention_dim"]),
        "pooled_projections": torch.zeros(rows, c["pooled_projection_dim"]),
    }


def _flux(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c, tokens = a.transformer, h * w // 4
    return {
        "hidden_states": torch.zeros(rows, tokens, c["in_channels"]),
        "timestep": torch.zeros(rows),
        "guidance": torch.zeros(rows) if c.get("guidance_embeds") else None,
        "pooled_projections": torch.zeros(rows, c["pooled_projection_dim"]),
        "encoder_hidden_states": torch.zeros(rows, text, c["joint_attention_dim"]),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.zeros(tokens, 3),
    }


def _flux2(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c, tokens = a.transformer, h * w // 4
    return {
        "hidden_states": torch.zeros(rows, tokens, c["in_channels"]),
        "timestep": torch.zeros(rows),
        "guidance": torch.zeros(rows) if c.get("guidance_embeds", True) else None,
        "encoder_hidden_states": torch.zeros(rows, text, c["joint_attention_dim"]),
        "txt_ids": torch.zeros(rows, text, 4),
        "img_ids": torch.zeros(rows, tokens, 4),
    }


def _qwen_image(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    return {
        "hidden_states": torch.zeros(rows, h * w // 4, c["in_channels"]),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, text, c["joint_attention_dim"]),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, h // 2, w // 2)]] * rows,
    }


def _z_image(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    return {
        "x": [torch.zeros(c["in_channels"], 1, h, w) for _ in range(rows)],
        "t": torch.zeros(rows),
        "cap_feats": [torch.zeros(text, c["cap_feat_dim"]) for _ in range(rows)],
    }


def _sana(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    return {
        "hidden_states": torch.zeros(rows, c["in_channels"], h, w),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, text, c["caption_channels"]),
        "encoder_attention_mask": torch.ones(rows, text),
    }


def _lumina2(a: Architecture, rows: int, h: int, w: int, text: int) -> Inputs:
    c = a.transformer
    return {
        "hidden_states": torch.zeros(rows, c["in_channels"], h, w),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, text, c["cap_feat_dim"]),
        "encoder_attention_mask": torch.ones(rows, text, dtype=torch.bool),
    }


INPUTS: Mapping[str, Callable[[Architecture, int, int, int, int], Inputs]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "SanaTransformer2DModel": _sana,
    "Lumina2Transformer2DModel": _lumina2,
}
"""Transformer class -> (architecture, rows, latent height and width, text rows) -> its inputs."""

TEXT_ROWS = {"SD3Transformer2DModel": 256, "SanaTransformer2DModel": 300,
             "Lumina2Transformer2DModel": 256}  # fmt: skip
"""Text rows where a configuration leaves them to the pipeline; 512 for the others."""

OF_THE_IMAGE = ("hidden_states", "x", "timestep", "t", "guidance", "img_ids", "img_shapes")
"""Inputs that are not encoded prompts."""

EMBEDDED_GUIDANCE = ("FluxPipeline", "Flux2Pipeline")
"""Pipelines whose guidance is an input of the network and costs no second row."""


def text_rows(architecture: Architecture, wanted: int | None) -> int:
    """Return the text rows of a row, at most; prompts that are shorter can cost less."""
    return wanted or TEXT_ROWS.get(str(architecture.transformer["_class_name"]), 512)


def rows_of_guidance(architecture: Architecture, guidance: float, true_cfg: float = 1.0) -> int:
    """Return network rows to a latent: 2 where classifier-free guidance is on.

    Args:
        architecture: The model.
        guidance: The pipeline's own number.
        true_cfg: Of FLUX.1, whose guidance is an input of the network: classifier-free guidance
            on top of it.
    """
    if architecture.pipeline == "FluxPipeline":
        return 2 if true_cfg > 1 else 1
    if architecture.pipeline in EMBEDDED_GUIDANCE or architecture.distilled:
        return 1
    above = 0.0 if architecture.pipeline == "ZImagePipeline" else 1.0
    return 2 if guidance > above else 1


def network_inputs(
    architecture: Architecture, rows: int, size: tuple[int, int], text: int
) -> Inputs:
    """Return what the transformer is called with, zeros of the true shapes.

    Args:
        architecture: The model.
        rows: Of the network.
        size: Height and width of images in pixels.
        text: Text rows.

    Raises:
        ValueError: If the transformer is of an unknown class.
    """
    name = str(architecture.transformer["_class_name"])
    if name not in INPUTS:
        raise ValueError(
            f"how {name} is called is not known; known: {', '.join(INPUTS)}; add it to INPUTS of "
            "policies/architecture.py"
        )
    height, width = (side // architecture.vae_factor for side in size)
    return INPUTS[name](architecture, rows, height, width, text)


def conditioning_bytes(architecture: Architecture, text: int, guidance_rows: int = 1) -> int:
    """Return the bytes of an encoded prompt: what of the transformer's inputs is not the image's.

    Args:
        architecture: The model.
        text: Text rows.
        guidance_rows: 2 where classifier-free guidance keeps the negative prompt beside each.
    """
    with torch.device("meta"):
        side = 2 * architecture.vae_factor  # a size that divides; the image does not count
        inputs = network_inputs(architecture, 1, (side, side), text)
    tensors = [
        tensor
        for name, value in inputs.items()
        if name not in OF_THE_IMAGE and value is not None
        for tensor in (value if isinstance(value, list) else [value])
    ]
    return guidance_rows * sum(tensor.nbytes for tensor in tensors)


def materialise(network: torch.nn.Module) -> None:
    """Give a network of the meta device float32 weights of the present mode, on the CPU."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                weight = torch.empty(p.shape, dtype=torch.float32)
                module._parameters[name] = torch.nn.Parameter(weight, p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def build_network(config: Mapping[str, Any]) -> Any:
    """Build a network of diffusers with random weights on the present device."""
    import diffusers

    return getattr(diffusers, str(config["_class_name"])).from_config(dict(config))


# --- counting -----------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Adds up operations, and the storages that live at once.

    Operations are those of the formulas of ``torch.utils.flop_counter``, and of the same for the
    fused attention of CPUs. Not its ``FlopCounterMode``, which watches modules and thereby keeps
    alive what gradient checkpointing frees.

    Args:
        given: Tensors whose memory does not count.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in given}
        self.now = self.peak = self.flops = 0
        self.formulas = flop_formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        tree_map_only(Tensor, self.note, out)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """Take a dead storage off."""
        self.now -= self.live.pop(key, 0)


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return operator -> formula of its operations, as ``torch.utils.flop_counter`` calls them."""
    from torch.utils import flop_counter as known

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return known.sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return known.sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten
    return {
        **known.flop_registry,
        aten._scaled_dot_product_flash_attention_for_cpu: known.shape_wrapper(forward),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: known.shape_wrapper(backward),
    }


class _FullMasks(TorchFunctionMode):
    """Answers how many texts are valid, which a fake mask cannot: all of them."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.item:
            return self.length
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside this context tensors have shapes and types, and no content."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def _arithmetic(precision: str, plain: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if precision in ("bf16", "fp16"):
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if plain:
            stack.enter_context(plain_attention())
        yield


def network_work(
    architecture: Architecture,
    size: tuple[int, int],
    text: int,
    *,
    sampling_rows: int,
    training_rows: int,
    guidance_rows: int = 1,
    method: str = "lora",
    rank: int = 16,
    targets: tuple[str, ...] | None = None,
    precision: str = "bf16",
    lower: bool = False,
    checkpointing: bool = False,
    plain: bool = False,
) -> NetworkWork:
    """Count the transformer's operations and memory, sampling and training.

    Args:
        architecture: The model.
        size: Height and width of images in pixels.
        text: Text rows.
        sampling_rows, training_rows: Latents in a call.
        guidance_rows: Network rows to a latent.
        method, rank, targets: What is trained, see :class:`~.pipeline.Adaptation`.
        precision: See :class:`~.pipeline.PipelinePolicy`.
        lower: Whether frozen weights are in that precision, see :class:`~.execution.Execution`.
        checkpointing: Whether blocks are computed again in the backward pass.
        plain: Whether attention is unfused, as on CPUs.
    """
    with torch.device("meta"):
        network = build_network(architecture.transformer).requires_grad_(False).eval()
        if method == "full":
            train_weights(network, targets)
        parameters = sum(p.numel() for p in network.parameters())
        if method == "lora":
            from peft import LoraConfig

            network.add_adapter(LoraConfig(r=rank, target_modules=list(targets or ())))
    if checkpointing:
        network.enable_gradient_checkpointing()
    with fake_tensors(), ExitStack() as stack:
        materialise(network)
        if lower and precision != "fp32":
            lower_frozen(network, torch.bfloat16)
        trained = [p for p in network.parameters() if p.requires_grad]
        stack.enter_context(_FullMasks(text))

        def call(rows: int) -> Tensor:
            inputs = network_inputs(architecture, rows * guidance_rows, size, text)
            return _call(network, inputs, precision)

        def sample(meter: Meter) -> Work:
            with torch.no_grad():
                call(sampling_rows)
            return Work(sampling_rows, meter.flops, 0, meter.peak)

        def train(meter: Meter) -> Work:
            # Gradients of the micro-batches before.
            for p in trained:
                p.grad = torch.zeros_like(p)
            loss = call(training_rows)
            forward = meter.flops
            loss.backward()
            return Work(training_rows, forward, meter.flops - forward, meter.peak)

        works = []
        for run in (sample, train):
            given = [*network.parameters(), *network.buffers()]
            with Meter(given) as meter, _arithmetic(precision, plain):
                works.append(run(meter))
        nbytes = sum(p.nbytes for p in network.parameters())
    trainable = sum(p.numel() for p in trained)
    return NetworkWork(parameters, trainable, nbytes, works[0], works[1])


def _call(network: Any, inputs: Inputs, precision: str) -> Tensor:
    """Call a transformer; return a number that depends on all of its output."""
    if precision == "bf16-pure":
        weights = {n: p.to(torch.bfloat16) for n, p in network.named_parameters()}
        low = {
            n: v
            if n in ("timestep", "t", "img_ids", "txt_ids")
            else tree_map_only(
                Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, v
            )
            for n, v in inputs.items()
        }
        out = torch.func.functional_call(network, weights, kwargs={**low, "return_dict": False})[0]
    else:
        out = network(**inputs, return_dict=False)[0]
    return torch.stack([o.float().sum() for o in out]).sum()


def decoder_work(
    architecture: Architecture, size: tuple[int, int], precision: str = "bf16"
) -> tuple[int, Work]:
    """Count the VAE's weights, and the operations and memory of decoding one image."""
    with torch.device("meta"):
        vae = build_network(architecture.vae).requires_grad_(False).eval()
    with fake_tensors():
        materialise(vae)
        height, width = (side // architecture.vae_factor for side in size)
        shape = (1, architecture.latent_channels, height, width)
        if "temperal_downsample" in architecture.vae:  # a video VAE, with an axis for time
            shape = (*shape[:2], 1, *shape[2:])
        cast = nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)
        with Meter([*vae.parameters(), *vae.buffers()]) as meter, torch.no_grad(), cast:
            vae.decode(torch.zeros(shape), return_dict=False)[0].float()
        parameters = sum(p.numel() for p in vae.parameters())
    return parameters, Work(1, meter.flops, 0, meter.peak)


def text_encoder_parameters(architecture: Architecture) -> int:
    """Count the weights of all text encoders."""
    import transformers

    total = 0
    with torch.device("meta"):
        for name, config in architecture.text_encoders:
            kind = getattr(transformers, name)
            network = kind(kind.config_class.from_dict(dict(config)))
            total += sum(p.numel() for p in network.parameters())
    return total
