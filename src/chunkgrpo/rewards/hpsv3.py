# SPDX-License-Identifier: Apache-2.0
"""Which image people prefer for a prompt, by HPSv3: Qwen2-VL with a head."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.rewards.aesthetic import linear_chain
from chunkgrpo.rewards.images import check_batch, rounded
from chunkgrpo.rewards.loading import dtype_of, fix_attention, freeze, load, place, state_dict
from chunkgrpo.rewards.preprocess import resized_levels

REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
NUM_PIXELS = 256 * 28 * 28  # every image is brought to about this many
MAX_RATIO = 200  # of the longer to the shorter side
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD = "rm_head."
# Qwen2-VL's chat format.
CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def qwen_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a published Qwen2-VL into those of transformers' ``Qwen2VLModel``.

    Takes the old layout (``model.``, ``visual.``) and the new (``model.language_model.``,
    ``model.visual.``); the head that predicts words is left out.

    Raises:
        ValueError: If a name is not one of such a model.
    """
    converted = {}
    for name, tensor in tensors.items():
        if name.startswith((HEAD, "lm_head.")):
            continue
        inner = name.removeprefix("model.")
        if inner.startswith(("language_model.", "visual.")):
            converted[inner] = tensor
        elif name.startswith("model."):
            converted[f"language_model.{inner}"] = tensor
        else:
            raise ValueError(f"{name!r} is not a weight of Qwen2-VL")
    return converted


def image_size(height: int, width: int, factor: int, pixels: int) -> tuple[int, int]:
    """Return the (height, width) that an image is resized to.

    Both are multiples of ``factor``, their product is near ``pixels`` and the ratio is kept as
    well as that allows: rounded down where the image is larger than ``pixels``, up where smaller.

    Raises:
        ValueError: If one side is more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"an image of {height} x {width} is longer than {MAX_RATIO} times its width; "
            "Qwen2-VL does not take such images"
        )
    rounded_sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    have = rounded_sides[0] * rounded_sides[1]
    if have == pixels:
        return rounded_sides[0], rounded_sides[1]
    shrink = math.sqrt(height * width / pixels)
    towards = math.floor if have > pixels else math.ceil
    sides = [max(factor, towards(side / shrink / factor) * factor) for side in (height, width)]
    return sides[0], sides[1]


def patches(images: Tensor, patch: int, temporal: int, merge: int, pixels: int) -> Tensor:
    """Cut images into Qwen2-VL's patches.

    Args:
        images: [B, 3, H, W] in [0, 1].
        patch: Side of a patch.
        temporal: Frames a patch spans; an image repeats itself.
        merge: Patches, in each direction, that become one token.
        pixels: Size that images are brought to.

    Returns:
        [B, rows, columns, 3 * temporal * patch * patch]: patches in the order the model reads,
        blocks of ``merge`` x ``merge`` one after the other, on a grid of rows x columns.
    """
    height, width = image_size(images.shape[-2], images.shape[-1], patch * merge, pixels)
    levels = resized_levels(rounded(images), height, width, "bicubic")
    mean = torch.tensor(CLIP_MEAN, device=levels.device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=levels.device).view(1, 3, 1, 1)
    values = (levels / 255 - mean) / std
    rows, columns = height // patch, width // patch
    cut = values.reshape(
        len(images), 3, rows // merge, merge, patch, columns // merge, merge, patch
    )
    # batch, block row, block column, row in block, column in block, channel, patch row and column
    ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    repeated = ordered.expand(*ordered.shape[:6], temporal, patch, patch)
    return repeated.reshape(len(images), rows, columns, 3 * temporal * patch * patch)


def instruction_of_package() -> str | None:
    """Return the question HPSv3 was trained with from the ``hpsv3`` package, without importing it.

    The package needs an old transformers to import, but its text is readable in any environment.
    None where the package is not installed.
    """
    spec = find_spec("hpsv3")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        file = Path(folder) / "dataset" / "data_collator_qwen.py"
        if file.is_file():
            found: dict[str, Any] = {}
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                    found |= {t.id: node.value.value for t in node.targets if hasattr(t, "id")}  # type: ignore[attr-defined]
            if {"INSTRUCTION", "prompt_with_special_token"} <= set(found):
                text = found["INSTRUCTION"].replace("{text_prompt}", "{prompt}")
                return text + found["prompt_with_special_token"]
    return None


def _qwen(config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Return a frozen ``Qwen2VLModel``, and the names of tensors that are missing or misshapen."""
    from transformers import Qwen2VLModel

    # Not module.to(dtype): that would also round the rotary frequencies, which at some hundred
    # tokens is an error of whole turns.
    kind: Any = Qwen2VLModel
    model, info = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    fix_attention(model)
    freeze(model)
    wrong = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    return model, wrong


class HpsV3Reward:
    """Mean preference predicted by HPSv3, a Qwen2-VL of 7 billion weights with a head.

    Scores are about -5 to 15; people's preference between two images follows their difference.
    The head reads the last hidden state at a special token that ends the question, and gives mean
    and uncertainty; the score is the mean. Tokens are numbered 0, 1, 2, ... in all three of the
    model's position axes, image or not, since that is how HPSv3 was trained.

    The question is part of what was trained and is not shipped here: it is read from the
    ``hpsv3`` package where that is installed (``pip install --no-deps hpsv3`` suffices; nothing of
    it is run), or from a file.

    Args:
        weights: Published weights: a file, or ``owner/repository:file`` on the hub.
        model: Folder or hub id with Qwen2-VL's configuration and tokenizer; its weights are not
            read.
        instruction: File with the question; ``{prompt}`` in it becomes the image's prompt, and
            ``<|Reward|>`` must appear once. None takes the package's.
        num_pixels: Size that images are brought to, in pixels.
        precision: ``"bf16"``, as it was trained, or ``"fp32"``; the head stays in float32.
        device: Where to compute; None follows the images.
        batch_size: Images at once.
        name: What metrics are filed under.

    Raises:
        FileNotFoundError: If the question or a checkpoint is missing.
        OSError: If something cannot be loaded.
        ValueError: If an option is out of its range or the weights do not fit.

    Reference: HPSv3, arXiv:2508.03789, section 4.
    """

    def __init__(
        self,
        weights: str = "MizzenAI/HPSv3:HPSv3.safetensors",
        model: str = "Qwen/Qwen2-VL-7B-Instruct",
        instruction: str | None = None,
        num_pixels: int = NUM_PIXELS,
        precision: str = "bf16",
        device: str | None = None,
        batch_size: int = 4,
        name: str = "hpsv3",
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        if num_pixels < 1:
            raise ValueError(f"num_pixels is {num_pixels}; expected 1 or more")
        self.name, self.device, self.batch_size = name, device, batch_size
        self.num_pixels = num_pixels
        self.instruction = self._read_instruction(instruction)
        tensors = state_dict(name, weights)
        self.tokenizer = load(name, model, AutoTokenizer.from_pretrained)
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        self.reward_id = self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        config = load(name, model, AutoConfig.from_pretrained)
        converted = qwen_weights(tensors)
        embedding = "language_model.embed_tokens.weight"
        if embedding not in converted or not any(key.startswith(HEAD) for key in tensors):
            raise ValueError(
                f"reward {name!r}: {weights} has no {HEAD}* or no word embeddings; "
                "is this the file of another model?"
            )
        config.text_config.vocab_size = int(converted[embedding].shape[0])
        if self.reward_id >= config.text_config.vocab_size:
            raise ValueError(
                f"reward {name!r}: {REWARD_TOKEN} is token {self.reward_id}, but the weights know "
                f"{config.text_config.vocab_size}; the tokenizer is that of another model"
            )
        self.model, wrong = _qwen(config, converted, dtype_of(precision))
        if wrong:
            raise ValueError(
                f"reward {name!r}: {weights} does not fit {model}: {len(wrong)} tensors are "
                f"missing or of another shape, such as {wrong[0]}"
            )
        self.head = self._build_head(tensors)

    def _build_head(self, tensors: Mapping[str, Tensor]) -> torch.nn.Module:
        # The published head is Linear, ReLU, Dropout, Linear, ReLU, Linear: layers 0, 3 and 5 have
        # weights, and dropout does nothing here.
        linear = linear_chain(self.name, tensors, HEAD)
        layers = list(linear)  # type: ignore[call-overload]
        if len(layers) != 3:
            raise ValueError(f"reward {self.name!r}: the head has {len(layers)} layers; expected 3")
        relu = torch.nn.ReLU()
        head = torch.nn.Sequential(layers[0], relu, layers[1], relu, layers[2])
        freeze(head)
        return head

    def _read_instruction(self, file: str | None) -> str:
        if file is None:
            text = instruction_of_package()
            if text is None:
                raise FileNotFoundError(
                    f"reward {self.name!r} needs the question HPSv3 was trained with; make the "
                    "package readable with: pip install --no-deps hpsv3, or give its text as "
                    "instruction=FILE"
                )
        else:
            path = Path(file).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"reward {self.name!r}: there is no file at {path}")
            text = path.read_text(encoding="utf-8")
        if "{prompt}" not in text or text.count(REWARD_TOKEN) != 1:
            raise ValueError(
                f"reward {self.name!r}: the question must hold {{prompt}}, and {REWARD_TOKEN} once"
            )
        return text

    def inputs(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what the model takes, for images [B, 3, H, W] in [0, 1] and B prompts."""
        vision = self.model.config.vision_config
        merge = int(vision.spatial_merge_size)
        cut = patches(
            images, int(vision.patch_size), int(vision.temporal_patch_size), merge, self.num_pixels
        )
        number, rows, columns, _ = cut.shape
        image = IMAGE_TOKEN * (rows * columns // merge**2)
        texts = []
        for prompt in prompts:
            # A prompt may not bring tokens that mean something to the model's machinery.
            clean = prompt.replace("<|", "< |")
            question = self.instruction.replace("{prompt}", clean)
            texts.append(CONVERSATION.replace("{image}", image).replace("{text}", question))
        self.tokenizer.padding_side = "right"
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        length = tokens["input_ids"].shape[1]
        inputs = {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "position_ids": torch.arange(length).expand(3, number, length),
            "pixel_values": cut.flatten(0, 2).to(self.model.dtype),
            "image_grid_thw": torch.tensor([[1, rows, columns]] * number),
        }
        return {name: tensor.to(images.device) for name, tensor in inputs.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B]."""
        check_batch(images, prompts)
        device = place(self.model, self.device, images)
        self.head.to(device)
        scores = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            inputs = self.inputs(images[rows].to(device), prompts[rows])
            states = self.model(**inputs, use_cache=False).last_hidden_state
            marked = states[inputs["input_ids"] == self.reward_id]
            scores.append(self.head(marked.float())[:, 0])
        return torch.cat(scores).cpu()
