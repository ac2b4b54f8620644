# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not at all, and exact."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from chunkgrpo.core.finite import NonFiniteError
from chunkgrpo.runtime import files
from chunkgrpo.runtime.checkpoints import (
    CheckpointError,
    Checkpointing,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    number_of,
    optimizer_tensors,
    save_checkpoint,
    tuned_weights,
    verify_checkpoint,
)


def test_what_is_saved_is_loaded(tmp_path):
    tensors = {
        "float.0": torch.randn(3, 4).T,  # not contiguous
        "bf16": torch.randn(5).bfloat16(),
        "int": torch.tensor([2**40]),
        "scalar": torch.tensor(3.5),
        "grad": torch.randn(2, requires_grad=True),
    }
    path = save_checkpoint(tmp_path / "c", 7, tensors, {"seconds": 1.5, "name": "x"})
    assert path == tmp_path / "c" / "000007"
    loaded, info = load_checkpoint(path)
    assert info == {"iteration": 7, "seconds": 1.5, "name": "x"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


def test_only_the_newest_are_kept_in_order_of_number(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    for iteration in (5, 10, 99, 100):
        save_checkpoint(tmp_path, iteration, {"a": torch.zeros(1)}, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000099", "000100"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000099", "000100"]
    assert list_checkpoints(tmp_path / "000100") == []


def test_numbers_are_compared_as_numbers(tmp_path):
    for iteration in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, iteration, {"a": torch.zeros(1)}, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["1000000", "1000001"]
    for iteration in (999_998, 999_999):
        (tmp_path / str(iteration)).mkdir()
    assert [number_of(p) for p in list_checkpoints(tmp_path)][-1] == 1_000_001


def test_saving_again_replaces(tmp_path):
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, 3, {"a": torch.tensor([value])}, {"value": value})
    (path,) = list_checkpoints(tmp_path)
    tensors, info = load_checkpoint(path)
    assert tensors["a"].item() == info["value"] == 2.0


def test_a_torn_checkpoint_is_not_listed(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {})

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, {"a": torch.zeros(1)}, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000001"]
    (tmp_path / ".000009.partial").mkdir()  # as a kill leaves it
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000001"]
    save_checkpoint(tmp_path, 2, {"a": torch.zeros(1)}, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000001", "000002"]
    assert json.loads((tmp_path / "000002" / "state.json").read_text()) == {"iteration": 2}


# --- which are kept -----------------------------------------------------------------------------


def save(folder, iteration, rules, score=None):
    save_checkpoint(folder, iteration, {"a": torch.zeros(1)}, {"score": score}, rules)


def numbers(folder):
    return [number_of(path) for path in list_checkpoints(folder)]


def test_steady_ones_and_the_best_are_kept_beside_the_newest(tmp_path):
    rules = Checkpointing(every=10, keep_last=2, keep_every=40)
    scores = {10: 0.1, 20: 0.6, 30: 0.6, 40: None, 50: 0.5, 60: 0.7, 70: float("nan"), 80: 0.1}
    for iteration, score in scores.items():
        save(tmp_path, iteration, rules, score)
        if iteration == 50:
            assert numbers(tmp_path) == [20, 40, 50]  # the earliest of equals is the best
            assert json.loads((tmp_path / "best.json").read_text()) == {
                "iteration": 20, "score": 0.6,
            }  # fmt: skip
    assert numbers(tmp_path) == [40, 60, 70, 80]
    assert find_checkpoint(tmp_path, "best").name == "000060"
    save(tmp_path, 90, replace(rules, keep_best=False, keep_every=0, keep_last=1), 0.2)
    assert numbers(tmp_path) == [90]


@pytest.mark.parametrize("change", [{"every": 0}, {"keep_last": 0}, {"keep_every": -1}])
def test_rules_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=rf"checkpoints\.{next(iter(change))} is "):
        Checkpointing(**change)


def test_both_intervals_make_a_checkpoint_due():
    rules = Checkpointing(every=10, keep_every=25)
    assert [i for i in range(1, 51) if rules.due(i)] == [10, 20, 25, 30, 40, 50]
    assert not Checkpointing(every=10).due(25)


def test_those_of_a_future_that_did_not_happen_are_deleted(tmp_path):
    """The run went on from an earlier one, as the newest were damaged: they are no fall-back."""
    for iteration in (10, 20, 30):
        save(tmp_path, iteration, Checkpointing(keep_last=3), iteration / 100)
    (tmp_path / "000030" / "state.json").write_text("{}")
    save(tmp_path, 15, Checkpointing(keep_last=2), None)
    assert numbers(tmp_path) == [10, 15]
    assert json.loads((tmp_path / "best.json").read_text())["iteration"] == 10


# --- finding and checking -----------------------------------------------------------------------


def test_a_checkpoint_is_found_by_number_and_by_name(tmp_path):
    for which in ("last", "best", "3"):
        with pytest.raises(CheckpointError, match="there are none yet"):
            find_checkpoint(tmp_path, which)
    save(tmp_path, 3, Checkpointing(), 0.5)
    save(tmp_path, 12, Checkpointing(), 0.4)
    found = [find_checkpoint(tmp_path, which).name for which in ("last", "best", "3", "0012")]
    assert found == ["000012", "000003", "000003", "000012"]
    with pytest.raises(CheckpointError, match="has no checkpoint 4; there are 3, 12"):
        find_checkpoint(tmp_path, "4")
    for which in ("newest", "-1", "1e3", "", "../3"):
        with pytest.raises(CheckpointError, match="'last' or 'best'; there are 3, 12"):
            find_checkpoint(tmp_path, which)
    (tmp_path / "000003" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"000003/state.json is damaged.*there are 3, 12"):
        find_checkpoint(tmp_path, "3")


def test_without_a_score_none_is_best(tmp_path):
    save(tmp_path, 3, Checkpointing(), None)
    assert not (tmp_path / "best.json").exists()
    with pytest.raises(CheckpointError, match="has no checkpoint with a score; there are 3"):
        find_checkpoint(tmp_path, "best")


def test_the_model_is_a_part_of_a_checkpoint(tmp_path):
    def write(folder):
        folder.mkdir()
        (folder / "lora.bin").write_bytes(b"weights")

    path = save_checkpoint(tmp_path, 1, {"a": torch.zeros(1)}, {}, None, write)
    verify_checkpoint(path)
    (path / "model" / "lora.bin").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match=r"model/lora\.bin is damaged"):
        verify_checkpoint(path)


@pytest.mark.parametrize("averaged", [True, False])
def test_the_weights_a_run_would_end_with_can_be_read(tmp_path, averaged):
    tensors = {"parameter.w": torch.ones(2), "ema.w": torch.zeros(2)}
    tensors["optimizer.w:m"] = torch.ones(1)
    path = save_checkpoint(tmp_path, 1, tensors, {"averaged": averaged})
    (name, value), *others = tuned_weights(path).items()
    assert name == "w" and not others
    assert torch.equal(value, torch.zeros(2) if averaged else torch.ones(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_saved(tmp_path, value, kind):
    save(tmp_path, 10, Checkpointing())
    before = sorted(tmp_path.rglob("*"))
    bad = torch.zeros(3, 2, dtype=kind)
    bad[1, 1] = value
    tensors = {"fine": torch.zeros(2), "ema.weight": bad, "count": torch.tensor(3)}
    with pytest.raises(NonFiniteError, match=r"ema\.weight"):
        save_checkpoint(tmp_path, 20, tensors, {})
    assert sorted(tmp_path.rglob("*")) == before
    verify_checkpoint(tmp_path / "000010")


# --- optimizers -----------------------------------------------------------------------------------

NAMES = ["block.0:weight", "bias"]  # a colon in a name does no harm


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_restored_optimizer_goes_on_exactly(kind):
    options = {"lr": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    parameters = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    optimizer = kind(parameters, **options)

    def step(parameters, optimizer):
        for p in parameters:
            p.grad = p.detach().sin()
        optimizer.step()

    for _ in range(3):
        step(parameters, optimizer)
    copies = copy.deepcopy(parameters)
    tensors = {k: v.clone() for k, v in optimizer_tensors(optimizer, NAMES).items()}
    assert {key.rpartition(":")[0] for key in tensors} == {f"optimizer.{n}" for n in NAMES}
    restored = kind(copies, **options)
    load_optimizer_tensors(restored, tensors | {"parameter.weight": torch.zeros(1)}, NAMES)
    for _ in range(2):
        step(parameters, optimizer)
        step(copies, restored)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


def test_settings_are_those_of_the_new_optimizer():
    parameter = torch.zeros(1, requires_grad=True)
    old, new = torch.optim.AdamW([parameter], lr=0.1), torch.optim.AdamW([parameter], lr=0.5)
    parameter.grad = torch.ones(1)
    old.step()
    load_optimizer_tensors(new, optimizer_tensors(old, ["weight"]), ["weight"])
    assert new.param_groups[0]["lr"] == 0.5


def test_moments_find_their_parameters_by_name_in_any_order():
    first, second = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    old = torch.optim.AdamW([first, second], lr=0.1)
    first.grad, second.grad = torch.ones(1), torch.full((2,), 2.0)
    old.step()
    tensors = optimizer_tensors(old, ["first", "second"])
    assert {"optimizer.first:exp_avg", "optimizer.second:exp_avg_sq"} <= tensors.keys()
    new = torch.optim.AdamW([second, first], lr=0.1)
    load_optimizer_tensors(new, tensors, ["second", "first"])
    for parameter in (first, second):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new.state[parameter][moment], old.state[parameter][moment])


def test_tables_that_moments_share_are_saved_once_each():
    """As 8-bit states do, in a dictionary of their own; files refuse tensors that share memory."""
    table = torch.arange(4.0)

    class Shared:
        def state_dict(self):
            inner = [{"table": table, "code": torch.full((2,), i)} for i in (0.0, 1.0)]
            return {"state": {i: {"step": 3, "quantised": inner[i]} for i in range(2)}}

    tensors = optimizer_tensors(Shared(), ["a", "b"])
    assert set(tensors) == {f"optimizer.{p}:{m}" for p in "ab" for m in ("step", "table", "code")}
    first, second = tensors["optimizer.a:table"], tensors["optimizer.b:table"]
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
