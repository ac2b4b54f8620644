# SPDX-License-Identifier: Apache-2.0
"""How much of a prompt each text encoder of a pipeline reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chunkgrpo.policies.pipeline import PipelinePolicy
from chunkgrpo.policies.quiet import quiet_diffusers


@dataclass(frozen=True)
class Reader:
    """A text encoder and the prompts that it does not read to the end.

    Attributes:
        name: Its name in the pipeline.
        limit: Tokens that it reads, those of a template included.
        cut: Positions of the longer prompts.
    """

    name: str
    limit: int
    cut: tuple[int, ...]


def text_readers(policy: PipelinePolicy, texts: Sequence[str]) -> list[Reader]:
    """Return each text encoder of a pipeline, from its tokenizer alone.

    Args:
        policy: The policy; its text encoders need not be loaded.
        texts: The prompts.
    """
    found = []
    for name, tokenizer in policy.pipe.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        short = type(tokenizer).__name__.startswith("CLIP")
        limit = int(tokenizer.model_max_length) if short else policy.max_sequence_length
        over = 0 if short else template_tokens(policy, tokenizer)
        with quiet_diffusers():
            rows = tokenizer(list(texts))["input_ids"]
        cut = tuple(i for i, row in enumerate(rows) if len(row) + over > limit)
        found.append(Reader(name.replace("tokenizer", "text_encoder"), limit, cut))
    return found


def template_tokens(policy: PipelinePolicy, tokenizer: Any) -> int:
    """Return the tokens that a family puts around each prompt and counts as the prompt's."""
    pipe, kind = policy.pipe, type(policy.pipe).__name__
    if kind == "QwenImagePipeline":
        whole = tokenizer(pipe.prompt_template_encode.format(""))["input_ids"]
        return len(whole) - pipe.prompt_template_encode_start_idx
    if kind == "Lumina2Pipeline":
        before = getattr(policy, "system_prompt", None) or pipe.system_prompt
        return len(tokenizer(f"{before} <Prompt Start> ")["input_ids"])
    if kind not in ("ZImagePipeline", "Flux2KleinPipeline", "Flux2Pipeline"):
        return 0
    messages = [{"role": "user", "content": ""}]
    if kind == "Flux2Pipeline":
        messages.insert(0, {"role": "system", "content": pipe.system_message})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text)["input_ids"])
