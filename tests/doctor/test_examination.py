# SPDX-License-Identifier: Apache-2.0
"""How a run is examined: it stays as it is, checks can be left out, and failures stop it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import examined
from chunkgrpo.cli import app
from chunkgrpo.config import ConfigError, load_config
from chunkgrpo.config.doctor import CHECKS
from chunkgrpo.doctor import DoctorError, Finding, examine, examine_as_set, in_words, refuse
from chunkgrpo.doctor import prompts as doctor_prompts
from chunkgrpo.doctor.patient import Patient
from chunkgrpo.doctor.runner import BY_NAME
from chunkgrpo.doctor.sampling import correlation_bound, stated_step
from chunkgrpo.estimate import disk_space
from chunkgrpo.policies.lengths import text_readers
from chunkgrpo.rewards.clip import ClipReward
from chunkgrpo.rewards.clip_features import num_cut
from planted_faults import FAULTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "doctor.md"


def trained(trainer):
    """What a run ends with: metrics without times, weights, averages, and later random numbers."""
    records = []
    trainer.on_iteration = records.append
    assert trainer.run()
    timed = ("seconds", "phase_seconds", "images_per_second")
    figures = [{k: v for k, v in record.items() if k not in timed} for record in records]
    return figures, [p.detach().clone() for p in trainer.parameters], list(trainer.ema.values)


SETTINGS = [
    {"watched_rewards": [{"name": "examined:dark"}]},
    {"model__adaptation": examined.FULL, "objective__selection": {"kind": "learned"},
     "objective__kl": {"kind": "none"}},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=["lora", "full"])
def test_a_run_that_was_examined_ends_as_one_that_was_not(settings, tiny_pipeline_path, tmp_path):
    settings = {"iterations": 2, "evaluation__every": 1, **settings}
    trainer, _ = examined.built(tiny_pipeline_path, tmp_path / "a", **settings)
    plain = trained(trainer)
    trainer, config = examined.built(tiny_pipeline_path, tmp_path / "b", **settings)
    storage = [p.data_ptr() for p in trainer.parameters]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(()), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    state = trainer.algorithm.state()
    examine(trainer, config, thorough=True)
    assert (torch.rand(()), random.random(), np.random.rand()) == expected
    assert [p.data_ptr() for p in trainer.parameters] == storage
    assert all(p.grad is None for p in trainer.parameters)
    assert trainer.algorithm.state() == state
    assert not trainer.optimizer.state and trainer.ema.num_updates == trainer.iteration == 0
    assert not (tmp_path / "b" / "run").exists()
    after = trained(trainer)
    assert after[0] == plain[0]
    for one, other in zip(after[1] + after[2], plain[1] + plain[2], strict=True):
        assert torch.equal(one, other)


def test_thorough_takes_a_whole_rollout_and_overfits(tiny_pipeline_path, tmp_path):
    changes = {"sampling__prompts": 3, "sampling__group_size": 6, "optimizer__learning_rate": 1e-3}
    trainer, config = examined.built(tiny_pipeline_path, tmp_path, **changes)
    quick, whole = Patient(trainer, config), Patient(trainer, config, thorough=True)
    assert (len(quick.prompts), quick.group_size) == (3, 4)
    assert (len(whole.prompts), whole.group_size) == (3, 6)
    names = {f.name for f in examine(trainer, config)}
    assert names == set(CHECKS) - {"overfit"}
    findings = examine(trainer, config, thorough=True)
    [last] = [f for f in findings if f.name == "overfit"]
    assert last.status == "ok", last
    before, after = re.findall(r"(-?[\d.]+) (?:at first|after 12)", last.measured)
    assert float(after) > float(before)


def test_a_reward_that_nothing_changes_cannot_be_overfitted(tiny_pipeline_path, tmp_path):
    trainer, config = examined.built(tiny_pipeline_path, tmp_path, optimizer__learning_rate=1e-12)
    found = examine(trainer, config, thorough=True)
    [last] = [f for f in found if f.name == "overfit"]
    assert last.status == "warning" and "cannot be overfitted" in str(last)


def test_checks_are_left_out_by_name(tiny_pipeline_path, tmp_path):
    trainer, config = examined.built(
        tiny_pipeline_path, tmp_path, model__negative_prompt="blurry", doctor__skip=["guidance"]
    )
    found = examine_as_set(trainer, config)
    [left] = [f for f in found if f.name == "guidance"]
    assert (left.status, left.measured) == ("skipped", "left out by doctor.skip")
    refuse(found)
    with pytest.raises(DoctorError) as caught:
        refuse(examine(trainer, config))
    text = str(caught.value)
    assert "check guidance: model.negative_prompt 'blurry' without" in text and "\n" not in text
    assert "set model.guidance above 1" in text and "--set doctor.skip=[guidance]" in text
    with pytest.raises(ValueError, match="unknown check of the doctor 'guidanc'; did you mean"):
        examine(trainer, config, skip=["guidanc"])
    with pytest.raises(ConfigError, match=r"doctor.skip.*'stck'; did you mean 'stock'\?"):
        load_config("demo", ["doctor.skip=[stck]"])


def test_a_run_that_goes_on_calls_no_network(tiny_pipeline_path, tmp_path):
    trainer, config = examined.built(tiny_pipeline_path, tmp_path)
    trainer.policy.velocity = trainer.policy.encode = trainer.policy.decode = None
    released = []
    found = examine_as_set(trainer, config, quick=True, release=lambda: released.append(1))
    assert {f.name for f in found} == {"resources", "prompts", "schedule"}
    assert {f.status for f in found} == {"ok"} and released == [1]


def test_text_encoders_are_released_before_anything_is_trained(tiny_pipeline_path, tmp_path):
    trainer, config = examined.built(tiny_pipeline_path, tmp_path)
    released, calls = [], []
    losses = type(trainer.algorithm).losses

    def release():
        trainer.policy.release_text_encoders()
        released.append(len(calls))

    def noted(*arguments):
        calls.append(1)
        return losses(trainer.algorithm, *arguments)

    trainer.algorithm.losses = noted
    found = examine(trainer, config, release=release)
    assert released == [0] and calls
    assert {f.name: f.status for f in found}["stock"] == "ok"
    found = examine(trainer, config)
    [stock] = [f for f in found if f.name == "stock"]
    assert stock.status == "skipped" and "text encoders are not loaded" in stock.measured


def test_what_cannot_be_examined_does_not_stop_a_run(tiny_pipeline_path, tmp_path, monkeypatch):
    trainer, config = examined.built(tiny_pipeline_path, tmp_path)
    monkeypatch.setattr(doctor_prompts, "text_readers", None)
    found = [f for f in examine(trainer, config) if f.name == "prompts"]
    assert [f.status for f in found] == ["warning"] and "could not be examined" in str(found[0])


def test_every_check_has_a_name_an_order_and_a_line_on_the_page():
    assert set(BY_NAME) == set(CHECKS)
    order = list(CHECKS)
    for check in BY_NAME.values():
        for cause in check.after:
            assert order.index(cause.__name__) < order.index(check.name), check.name
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M)
    assert rows == order
    assert {fault.check for fault in FAULTS.values()} == set(order) - {"overfit"}


def test_the_outcome_is_one_sentence():
    found = [
        Finding("stock", "failure", "a"),
        Finding("stock", "ok", "b"),
        Finding("prompts", "warning", "c"),
    ]
    assert in_words(found, 1.26) == "2 checks in 1.3 s; failed: stock; warnings: prompts"
    assert in_words(found[1:2], 2) == "1 checks in 2.0 s; none failed"


# --- numbers ------------------------------------------------------------------------------------


def test_the_formulas_are_those_of_the_papers(tiny_pipeline_path, tmp_path):
    """By hand at sigma 0.8 to 0.5: dt 0.3."""

    def formula(kind, sigma, after):
        config = load_config("chunk-grpo", [f"sampling.transition={kind}"])
        return stated_step(Patient(None, config), sigma, after)

    flow = formula("{kind: flow, eta: 0.5}", 0.8, 0.5)  # g^2 = 0.25 * 4 = 1, half = 0.625
    assert flow.std == pytest.approx(0.3**0.5)
    assert flow.keep == pytest.approx(1 - 0.3 * 0.625)
    assert flow.move == pytest.approx(-0.3 * (1 + 0.625 * 0.2))
    first = formula("{kind: flow, eta: 0.7}", 1.0, 0.9)  # sigma_ref = 0.9: g^2 = 0.49 * 10
    assert first.std == pytest.approx(0.7)
    dance = formula("{kind: dance, eta: 0.2}", 0.8, 0.5)
    assert dance.std == pytest.approx(0.2 * 0.3**0.5)
    cps = formula("{kind: cps, eta: 0.5}", 0.8, 0.5)  # sin = cos = sqrt(1/2)
    root = 0.5**0.5
    assert cps.std == pytest.approx(0.5 * root)
    assert cps.keep == pytest.approx(0.5 + 0.5 * root)
    assert cps.move == pytest.approx(-0.5 * 0.8 + 0.5 * root * 0.2)


def test_the_bound_of_correlations_holds_for_independent_noise():
    generator = torch.Generator().manual_seed(0)
    for number, rows in ((100, 4), (1000, 16), (10_000, 30)):
        worst = 0.0
        for _ in range(50):
            z = torch.randn(rows, number, generator=generator, dtype=torch.float64)
            worst = max(worst, float(torch.corrcoef(z).fill_diagonal_(0).abs().max()))
        assert worst < correlation_bound(number, rows) < 3 * worst


def test_tokens_that_text_encoders_and_rewards_read(tiny_policy):
    policy = tiny_policy(max_sequence_length=4)
    long = "a red star left of a blue circle " * 3
    first, second, third = text_readers(policy, ["a red star", long])
    assert [r.name for r in (first, second, third)] == [
        "text_encoder", "text_encoder_2", "text_encoder_3",
    ]  # fmt: skip
    assert first.cut == second.cut == (1,) and third.limit == 4
    assert third.cut in ((0, 1), (1,))
    assert num_cut(ClipReward(), ["a red star", long]) == 1
    assert num_cut(examined.warm, ["a red star"]) is None


def test_a_full_fine_tuning_of_flux_writes_190_gigabytes_each():
    config = load_config("paper", ["model.adaptation=full"])
    space = disk_space(config, 11.9e9, 60e9)
    assert space.each == pytest.approx(190.4e9)  # weights, average and two moments in float32
    assert space.kept == 4  # the last two, the best, and the one being written
    assert space.in_all == pytest.approx(4 * 190.4e9 + 60e9)
    second = disk_space(load_config("diffusion-nft"), 1e6, 2e6)
    assert second.each == 20e6  # with the policy that samples
    lora = disk_space(load_config("paper"), 1e6, 60e9)
    assert (lora.each, lora.model) == (20e6, 4e6)  # with the files for diffusers
    one = disk_space(load_config("paper", ["iterations=1", "evaluation.every=0"]), 1e6, 0)
    assert one.kept == 2
    steady = load_config("paper", ["checkpoints.keep_every=50", "evaluation.every=0"])
    assert disk_space(steady, 1e6, 0).kept == 2 + 3 + 1


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def call(tiny_pipeline_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text("a red star\ntwo circles\n")
    (tmp_path / "held_out.txt").write_text("a blue star\n")
    small = [
        "iterations=1", "threads=1", "sampling.steps=4", "sampling.prompts=2",
        "sampling.group_size=2", "objective.plan=steps", "objective.selection.fraction=1.0",
        "model.adaptation.rank=2", "model.max_sequence_length=8", "evaluation.every=0",
        "prompts.train=train.txt", "prompts.held_out=held_out.txt",
    ]  # fmt: skip
    options = [part for each in small for part in ("--set", each)]

    def run(command, *more, reward="brightness"):
        given = ["--model", str(tiny_pipeline_path), "--reward", reward, *options, *more]
        result = CliRunner().invoke(app, [command, *given], catch_exceptions=False)
        return result.exit_code, result.output

    return run


def test_the_command_prints_every_check_and_one_sentence(call, tmp_path):
    code, output = call("doctor")
    assert code == 0, output
    lines = output.strip().splitlines()
    assert lines[0].startswith("Each iteration draws 2 prompts x 2 images = 4 images")
    assert re.fullmatch(r"14 checks in [\d.]+ s; none failed\.", lines[-1])
    for name in set(CHECKS) - {"overfit"}:
        assert any(line.split()[:1] == [name] for line in lines), name
    assert not (tmp_path / "runs").exists()


def test_a_failure_ends_with_exit_code_2(call):
    code, output = call("doctor", "--set", "model.negative_prompt=[/red] blurry")
    assert code == 2
    assert "[/red] blurry" in output and "failed: guidance." in output.splitlines()[-1]


def test_training_stops_before_it_begins_and_says_how_to_go_on(call, tmp_path):
    wrong = ("--set", "model.negative_prompt=[/red]", "--out", "run")
    code, output = call("train", *wrong)
    assert code == 2
    last = " ".join(output.split())
    assert "chunkgrpo: the doctor's check guidance: model.negative_prompt '[/red]'" in last
    assert "--set doctor.skip=[guidance]" in last and "failed: guidance" in last
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    again = ("--set", "model.negative_prompt=[/red]", "--set", "doctor.skip=[guidance]")
    code, output = call("train", *again, "--out", "again")
    assert code == 0, output
    assert re.search(r"Doctor: 14 checks in [\d.]+ s; none failed\.", output)


def test_a_run_says_what_its_doctor_warned_of(call):
    code, output = call("train", "--set", "prompts.held_out=train.txt", "--out", "run")
    assert code == 0
    text = " ".join(output.split())
    assert "Doctor: prompts: 2 of 2 held-out prompts are also trained on" in text
    assert "none failed; warnings: prompts." in text
