# SPDX-License-Identifier: Apache-2.0
"""What every built-in reward must keep, whatever it measures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkgrpo.rewards import BUILT_IN, make_reward
from chunkgrpo.rewards.protocol import Reward
from tiny_rewards import (
    random_images,
    save_blip,
    save_clip,
    save_detr,
    save_head,
    save_qwen,
    save_siglip,
    save_tokenizer,
)

# One text that every reward understands is not to be had: the shapes reward knows its grammar
# only, the OCR reward needs quotes.
PROMPTS = {"shapes": "a red circle", "ocr": 'a sign that says "Hi"', "geneval": "a photo of a cup"}


def judge_url() -> str:
    """A local endpoint whose answer follows from the bytes of the request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = "yes" if sum(body) % 2 else "no"
            reply = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *parts: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


def options_of(name: str, folder: Path) -> dict[str, Any]:
    """Build a tiny model of the reward's class; return the options that load it."""
    folder.mkdir()
    if name == "clip":
        return {"model": str(save_clip(folder))}
    if name == "pickscore":
        return {"model": str(save_clip(folder)), "processor": str(folder)}
    if name == "siglip":
        return {"model": str(save_siglip(folder))}
    if name == "aesthetic":
        return {"model": str(save_clip(folder)), "head": str(save_head(folder / "head.pth"))}
    if name == "hpsv2":
        save_clip(folder)
        torch.save(open_clip_names(folder), folder / "open_clip.pt")
        return {"model": str(folder), "weights": str(folder / "open_clip.pt")}
    if name == "image_reward":
        save_blip(folder / "weights.pt")
        save_tokenizer(folder, length=512)
        return {"tokenizer": str(folder), "weights": str(folder / "weights.pt")}
    if name == "hpsv3":
        save_qwen(folder)
        return {
            "weights": str(folder / "weights.safetensors"),
            "model": str(folder),
            "instruction": str(folder / "question.txt"),
            "num_pixels": 1024,
            "precision": "fp32",
        }
    if name == "geneval":
        line: dict[str, Any] = {"tag": "colors", "prompt": PROMPTS["geneval"]}
        line["include"] = [{"class": "cup", "count": 1, "color": "red"}]
        (folder / "lines.jsonl").write_text(json.dumps(line))
        return {
            "metadata": str(folder / "lines.jsonl"),
            "detector": str(save_detr(folder / "detector")),
            "color_model": str(save_clip(folder / "clip")),
        }
    if name == "vlm_judge":
        return {"base_url": judge_url(), "model": "m"}
    return {"threads": 1} if name == "ocr" else {}


def open_clip_names(folder: Path) -> dict[str, torch.Tensor]:
    """The tiny CLIP's weights under open_clip's names."""
    from transformers import CLIPModel

    from chunkgrpo.rewards.hpsv2 import BLOCK, OUTSIDE_BLOCKS, TRANSPOSED

    weights = CLIPModel.from_pretrained(folder).state_dict()
    tensors = {theirs: weights[ours] for theirs, ours in OUTSIDE_BLOCKS.items()}
    tensors |= {theirs: weights[ours].T for theirs, ours in TRANSPOSED.items()}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for i in range(2):
            ours, theirs = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [weights[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                tensors[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
                for there, here in BLOCK.items():
                    tensors[f"{theirs}.{there}.{kind}"] = weights[f"{ours}.{here}.{kind}"]
    return tensors


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reward]:
    folder, built = tmp_path_factory.mktemp("rewards"), {}

    def get(name: str) -> Reward:
        if name not in built:
            built[name] = make_reward(name, options_of(name, folder / name))
        return built[name]

    return get


# The remote one needs a server; tests/rewards/test_remote.py holds it to the contract.
@pytest.fixture(params=sorted(set(BUILT_IN) - {"remote"}))
def reward(request: pytest.FixtureRequest, build: Callable[[str], Reward]) -> Iterator[Reward]:
    if request.param == "ocr":
        pytest.importorskip("rapidocr")
        pytest.importorskip("onnxruntime")
    if request.param == "vlm_judge":
        pytest.importorskip("httpx")
    yield build(request.param)


def prompts_for(reward: Reward, number: int) -> list[str]:
    if reward.name in PROMPTS:
        return [PROMPTS[reward.name]] * number
    return ["a cat", "a dog in the snow", "two cups on a table, seen from above", ""][:number]


def test_keeps_the_contract(reward: Reward) -> None:
    assert isinstance(reward, Reward)
    images = torch.cat(
        [random_images(2, 64, 64), torch.zeros(1, 3, 64, 64), torch.rand(1, 3, 64, 64)]
    )
    prompts = prompts_for(reward, 4)
    images.requires_grad_()
    kept_images, kept_prompts = images.detach().clone(), list(prompts)
    state = torch.get_rng_state()

    together = reward(images, prompts)
    assert together.shape == (4,) and together.dtype == torch.float32
    assert together.device.type == "cpu" and not together.requires_grad
    assert together.isfinite().all()
    assert torch.equal(images.detach(), kept_images) and prompts == kept_prompts
    assert torch.equal(torch.get_rng_state(), state)

    assert torch.equal(reward(images, prompts), together)
    flipped = reward(images.flip(0), prompts[::-1]).flip(0)
    torch.testing.assert_close(flipped, together, rtol=1e-3, atol=1e-4)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in (1, 3)])
    torch.testing.assert_close(alone, together[[1, 3]], rtol=1e-3, atol=1e-4)


def test_the_process_wide_choice_of_kernels_changes_no_bit(reward: Reward) -> None:
    from chunkgrpo.runtime.attention import plain_attention

    images, prompts = random_images(3, 64, 64), prompts_for(reward, 3)
    alone = reward(images, prompts)
    with plain_attention():  # as a policy that samples on a CPU while this scores
        beside = reward(images, prompts)
    assert torch.equal(alone, beside)


def test_takes_half_precision_images(reward: Reward) -> None:
    image = torch.full((1, 3, 64, 64), 0.5, dtype=torch.bfloat16)
    prompts = prompts_for(reward, 1)
    torch.testing.assert_close(reward(image, prompts), reward(image.float(), prompts))


def test_refuses_what_is_not_a_batch(reward: Reward) -> None:
    with pytest.raises(ValueError, match=r"prompt|ask"):
        reward(torch.zeros(2, 3, 64, 64), prompts_for(reward, 1))
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
        reward(torch.zeros(3, 64, 64), prompts_for(reward, 1))


@pytest.mark.parametrize(
    "name, options",
    [
        ("clip", {"model": "./none"}),
        ("pickscore", {"model": "/none/at/all"}),
        ("siglip", {"model": "~/none"}),
        ("hpsv2", {"weights": "./none.pt"}),
        ("hpsv3", {"weights": "./none.safetensors"}),
        ("image_reward", {"weights": "none.pt"}),
        ("aesthetic", {"model": "none/at/all"}),
        ("geneval", {"metadata": "./none.jsonl"}),
        ("vlm_judge", {"base_url": "http://localhost:1/v1", "model": "m", "template": "none.txt"}),
    ],
)
def test_a_missing_path_is_named(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if name == "hpsv3":
        question = tmp_path / "question.txt"
        question.write_text("{prompt} <|Reward|>")
        options = {**options, "instruction": str(question)}
    with pytest.raises(FileNotFoundError, match=f"reward '{name}'.*none"):
        make_reward(name, options)
