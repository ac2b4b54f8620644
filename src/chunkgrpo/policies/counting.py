# SPDX-License-Identifier: Apache-2.0
"""A model's operations and memory, from its architecture alone, without weights.

The networks are built by diffusers and transformers as usual, but on fake tensors, which have
shapes and types but no data. So operations are counted by the formulas of
``torch.utils.flop_counter``, and memory is added up, on the very operators that a real run calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from chunkgrpo.policies.adaptation import train_weights
from chunkgrpo.policies.architecture import Architecture, build_network
from chunkgrpo.policies.execution import lower_frozen
from chunkgrpo.policies.network_inputs import Inputs, network_inputs
from chunkgrpo.runtime.attention import plain_attention


@dataclass(frozen=True)
class Work:
    """The cost of one call.

    Attributes:
        rows: Number of latents, both halves of guidance counted as one.
        forward, backward: Floating-point operations; a multiplication and an addition are two.
            The backward pass includes what gradient checkpointing recomputes.
        peak: Peak of allocated bytes beside weights and optimizer, gradients included.
    """

    rows: int
    forward: int
    backward: int = 0
    peak: int = 0


@dataclass(frozen=True)
class NetworkWork:
    """The size of a transformer, and the cost of sampling and training with it.

    Attributes:
        parameters: Number of weights of the base model.
        trainable: Number of weights that are trained.
        nbytes: Bytes of all weights, those of the LoRA included.
        sampling, training: One forward without gradient; one forward and backward.
    """

    parameters: int
    trainable: int
    nbytes: int
    sampling: Work
    training: Work


@dataclass(frozen=True)
class NetworkUse:
    """How a transformer is called and trained.

    Attributes:
        size: Height and width of images in pixels.
        text: Text tokens.
        sampling_rows, training_rows: Latents per call.
        guidance_rows: Network rows per latent.
        method, rank, targets: What is trained, see :class:`~.pipeline.Adaptation`.
        precision: See :class:`~.pipeline.PipelinePolicy`.
        lower: Whether frozen weights are in that precision, see :class:`~.execution.Execution`.
        checkpointing: Whether blocks are recomputed in the backward pass.
        plain: Whether attention is unfused, as on CPUs.
    """

    size: tuple[int, int]
    text: int
    sampling_rows: int
    training_rows: int
    guidance_rows: int = 1
    method: str = "lora"
    rank: int = 16
    targets: tuple[str, ...] | None = None
    precision: str = "bf16"
    lower: bool = False
    checkpointing: bool = False
    plain: bool = False


def materialise(network: torch.nn.Module) -> None:
    """Give a network of the meta device float32 weights on the CPU, or fake ones in that mode."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                weight = torch.empty(p.shape, dtype=torch.float32)
                module._parameters[name] = torch.nn.Parameter(weight, p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


class Meter(TorchDispatchMode):
    """Counts operations, and the peak of allocated storages.

    Operations are counted by the formulas of ``torch.utils.flop_counter``, extended to the fused
    attention of CPUs. Not its ``FlopCounterMode``, which watches modules and thereby keeps
    alive what gradient checkpointing frees.

    Args:
        given: Tensors whose memory is not counted.
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
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """Subtract a storage that was freed."""
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
    """Returns the number of valid tokens, which a fake mask does not have: all of them."""

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
    """Inside this context tensors have shapes and types but no data."""
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


def network_work(architecture: Architecture, use: NetworkUse) -> NetworkWork:
    """Count the transformer's operations and memory, sampling and training.

    Args:
        architecture: The model.
        use: How its transformer is called and trained.
    """
    with torch.device("meta"):
        network = build_network(architecture.transformer).requires_grad_(False).eval()
        if use.method == "full":
            train_weights(network, use.targets)
        parameters = sum(p.numel() for p in network.parameters())
        if use.method == "lora":
            from peft import LoraConfig

            network.add_adapter(LoraConfig(r=use.rank, target_modules=list(use.targets or ())))
    if use.checkpointing:
        network.enable_gradient_checkpointing()
    with fake_tensors(), _FullMasks(use.text):
        materialise(network)
        if use.lower and use.precision != "fp32":
            lower_frozen(network, torch.bfloat16)
        trained = [p for p in network.parameters() if p.requires_grad]

        def call(rows: int) -> Tensor:
            inputs = network_inputs(architecture, rows * use.guidance_rows, use.size, use.text)
            return _call(network, inputs, use.precision)

        def sample(meter: Meter) -> Work:
            with torch.no_grad():
                call(use.sampling_rows)
            return Work(use.sampling_rows, meter.flops, 0, meter.peak)

        def train(meter: Meter) -> Work:
            # Gradients of the micro-batches before.
            for p in trained:
                p.grad = torch.zeros_like(p)
            loss = call(use.training_rows)
            forward = meter.flops
            loss.backward()
            return Work(use.training_rows, forward, meter.flops - forward, meter.peak)

        works = []
        for run in (sample, train):
            given = [*network.parameters(), *network.buffers()]
            with Meter(given) as meter, _arithmetic(use.precision, use.plain):
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
