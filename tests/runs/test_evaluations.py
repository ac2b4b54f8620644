# SPDX-License-Identifier: Apache-2.0
"""Saved evaluations: what is loaded is what was saved, or the damage is named."""

import hashlib
import io
import json
import random

import numpy as np
import pytest
import torch

from chunkgrpo.config import parse_config
from chunkgrpo.evaluate import Evaluation
from chunkgrpo.prompts import PromptSet
from chunkgrpo.runs.evaluations import (
    EvaluationError,
    evaluation_identity,
    evaluation_problem,
    load_evaluation,
    prompts_digest,
    save_evaluation,
)
from chunkgrpo.types import Prompt

PROMPTS = PromptSet(tuple(Prompt(f"{n} stars", group="ab"[n % 2]) for n in range(6)))
CONFIG = {"evaluation": {"final_prompts": 6, "final_seeds": 2, "seed": 5}}


def identity(prompts=PROMPTS, **changed):
    return evaluation_identity(parse_config(CONFIG | changed), prompts)


@pytest.fixture
def saved(tmp_path):
    draw = np.random.default_rng(0)
    result = Evaluation(
        PROMPTS, 2, {"clip": draw.random((6, 2), dtype=np.float32)},
        torch.arange(12 * 3 * 4, dtype=torch.uint8).reshape(12, 3, 2, 2), {"detail": 0.5},
    )  # fmt: skip
    path = tmp_path / "evaluation" / "base.npz"
    save_evaluation(path, result, identity())
    return path, result


def test_what_is_saved_is_loaded(saved) -> None:
    path, result = saved
    assert evaluation_problem(path, identity()) is None
    found = load_evaluation(path)
    assert found.prompts == result.prompts and found.num_seeds == 2
    assert np.array_equal(found.scores["clip"], result.scores["clip"])
    assert found.health == result.health and len(found.images) == 6
    assert sorted(p.name for p in path.parent.iterdir()) == ["base.json", "base.npz"]


@pytest.mark.parametrize(
    ("prompts", "changed", "says"),
    [
        (PROMPTS, {"evaluation": CONFIG["evaluation"] | {"seed": 6}}, "of other seed"),
        (PROMPTS, {"evaluation": CONFIG["evaluation"] | {"final_seeds": 1}}, "images per prompt"),
        (PROMPTS[:5], {}, "of other prompts"),
        (PROMPTS, {"seed": 3}, "of other settings"),
        (PROMPTS, {"sampling": {"steps": 9, "schedule": {"shift": 2.0}}}, "of other settings"),
    ],
)
def test_an_evaluation_of_something_else_is_not_taken(saved, prompts, changed, says) -> None:
    assert says in (evaluation_problem(saved[0], identity(prompts, **changed)) or "")


def test_what_may_change_in_a_run_is_not_asked(saved) -> None:
    assert evaluation_problem(saved[0], identity(iterations=99, threads=2)) is None


def test_digests_see_all_that_a_prompt_says() -> None:
    variants = [
        Prompt("a"), Prompt("b"), Prompt("a", {"x": 1}), Prompt("a", {"x": 2}),
        Prompt("a", negative_prompt=""), Prompt("a", negative_prompt="b"),
        Prompt("a", images=("x.png",)), Prompt("a", group="b"),
    ]  # fmt: skip
    digests = {prompts_digest(PromptSet((each,))) for each in variants}
    digests |= {prompts_digest(PromptSet(tuple(variants[:2]))), prompts_digest(PromptSet(()))}
    digests.add(prompts_digest(PromptSet(tuple(variants[1::-1]))))
    assert len(digests) == len(variants) + 3


def test_every_damage_is_named_and_never_loaded(saved) -> None:
    path, _ = saved
    seal = path.with_suffix(".json")
    draw = random.Random(0)
    for file in (path, seal):
        whole = file.read_bytes()
        flipped = []
        for _ in range(40):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            flipped.append(bytes(damaged))
        for content in (b"", whole[:-1], whole[: len(whole) // 2], b"[]", b"{}", *flipped):
            file.write_bytes(content)
            problem = evaluation_problem(path, identity())
            if file == seal and json_equal(content, whole):
                continue
            assert problem is not None and "\n" not in problem
            try:
                load_evaluation(path)
            except EvaluationError as error:
                assert str(path.parent) in str(error)
            else:
                assert file == seal  # the file is what its seal says, but of something else
        file.unlink()
        assert "is missing" in (evaluation_problem(path, identity()) or "")
        file.mkdir()
        assert "is missing" in (evaluation_problem(path, identity()) or "")
        file.rmdir()
        file.write_bytes(whole)


def json_equal(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_pickles_are_never_loaded(saved) -> None:
    path, _ = saved

    class Bad:
        def __reduce__(self):
            return (pytest.fail, ("a pickle ran",))

    content = io.BytesIO()
    np.savez(content, texts=np.array([Bad()], dtype=object), groups=np.array(["a"]))
    path.write_bytes(content.getvalue())
    seal = {"sha256": hashlib.sha256(content.getvalue()).hexdigest(), "of": identity()}
    path.with_suffix(".json").write_text(json.dumps(seal))
    with pytest.raises(EvaluationError, match="is no evaluation"):
        load_evaluation(path)
