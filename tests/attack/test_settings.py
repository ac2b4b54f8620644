# SPDX-License-Identifier: Apache-2.0
"""Broken settings: each is refused in one line, or is a sane run, and nothing else happens."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import chunkgrpo.cli
from attack.conftest import Attempt
from chunkgrpo.cli import app
from chunkgrpo.cli.common import PlainLog
from chunkgrpo.config import ConfigError, build, dump_config, load_config, parse_config
from chunkgrpo.config.describe import json_schema
from chunkgrpo.config.files import Assignment
from chunkgrpo.config.keys import every_key
from chunkgrpo.config.limits import LIMITS, check_run_name, is_number
from chunkgrpo.config.schema import Config
from chunkgrpo.core.windows import SlidingWindow

PART = "settings"
NUMBERS: list[Any] = [
    True, False, math.inf, -math.inf, math.nan, 1e308, -1e308, 10**12, -(10**12), 10**30, -1, 0,
    0.5, -0.5, 1e-9, 1e9,
]  # fmt: skip
OTHERS: list[Any] = [
    "", ".", "..", "foo", "010", "1:30", "a\x00b", "a\nb", "\x1b[31mred", "x" * 5000, "x" * 20000,
    "[/red]", "$x_$", "../../x", "/", [], {}, [[]], [0, 0, 0], [None], {"kind": "foo"},
    {"kind": None}, {"a": {"b": 1}}, {1: 2}, None, b"x",
]  # fmt: skip


def values(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def broken() -> Iterator[tuple[str, Any]]:
    """Every key with every nasty value."""
    for key in dict.fromkeys(each.name for each in every_key()):
        for value in (*NUMBERS, *OTHERS):
            yield key, value


CASES = list(broken())


def assert_one_line(message: str) -> None:
    assert message
    assert len(message) < 1000, message
    assert all(character.isprintable() for character in message), repr(message)


def numbers_in(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers_in(inner, f"{key}.{name}".strip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers_in(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def assert_sane(config: Config) -> None:
    """Bounds written down apart from those of the settings: no value can hang or overflow a run."""
    for key, value in numbers_in(values(config)):
        assert math.isfinite(value), key
        assert "seed" in key or "options" in key or abs(value) <= 1e12, (key, value)
    assert 2 <= config.sampling.images <= 10**7
    assert 0 < config.optimizer.learning_rate <= 100
    assert all(0 <= beta < 1 for beta in config.optimizer.betas)
    assert config.threads <= 4096
    assert any(reward.weight for reward in config.rewards)
    name = config.name
    assert Path("runs", name).resolve().parent == Path("runs").resolve()
    assert name.isprintable()
    assert len(name) <= 100


def tried(key: str, value: Any) -> str | None:
    """Load the demo with one setting changed; return the message, or None where it is valid.

    Seconds are those of this process, so that others on the machine do not count.
    """
    started = time.process_time()
    try:
        config = load_config("demo", [Assignment(key, value, "test")])
    except ConfigError as error:
        message: str | None = str(error)
        assert_one_line(str(error))
    else:
        message = None
        assert_sane(config)
    assert time.process_time() - started < 2
    return message


def test_every_key_with_every_nasty_value(attempt: Attempt, full: bool) -> None:
    """Several thousand configurations; a quarter of them where time is short."""
    load_config("demo")  # what Python imports at the first time is not what is measured
    cases = CASES if full else CASES[::4]
    assert len(CASES) > 3000
    refused = 0
    for key, value in cases:
        with attempt(PART, "one setting of any type and size"):
            try:
                refused += tried(key, value) is not None
            except Exception as error:
                raise AssertionError(f"{key} = {value!r}: {error!r}") from error
    assert refused > 0.7 * len(cases)


@pytest.mark.parametrize("key", sorted(LIMITS))
def test_every_number_has_bounds(key: str) -> None:
    for value in (math.inf, -math.inf, math.nan, 1e308, -1e308, True, "17"):
        with pytest.raises(ConfigError):
            load_config("demo", [Assignment(key, value, "test")])


def test_the_bounds_are_those_of_the_numbers() -> None:
    assert set(LIMITS) == {each.name for each in every_key() if is_number(each.name)}
    assert all(low < high for low, high in LIMITS.values())


REFUSED = [
    ("scoring.on_error", "true"), ("sampling.steps", "true"), ("sampling.steps", "'17'"),
    ("sampling.steps", "010"), ("sampling.steps", "1:30"), ("sampling.steps", "1e6"),
    ("rewards.9.options.x", "1"), ("rewards.-1.weight", "1"), ("rewards.x.weight", "1"),
    ("name.options", "1"), ("sampling", "null"), ("sampling", "3"), ("sampling", "[1]"),
    ("objective", "null"), ("objective.window.indices", "[0, 0, 0]"), ("rewards", "[]"),
    ("rewards", "null"), ("rewards.0", "null"), ("rewards.0.weight", "0"), ("rewards.0.name", ""),
    ("evaluation.reward", "null"), ("evaluation.reward.weight", "nan"), ("credit.keep", "1e-9"),
    ("sampling.merge", "{kind: entropy, least: .nan}"), ("optimizer.betas", "[0.9, 1.5]"),
    ("optimizer.betas", "[0.9]"), ("optimizer.betas", "[0.9, -0.1]"), ("threads", "1000000000"),
    ("model.device", "foo"), ("model.device", "cuda:x"), ("model.device", ""),
    ("model.options", "3"), ("name", ""), ("name", "."), ("name", ".."), ("name", "../../x"),
    ("name", "a/b"), ("name", "a\\b"), ("name", "a\x00b"), ("name", "a\nb"), ("name", " a"),
    ("name", "\x1b[31m"), ("name", "x" * 5000), ("", "1"), (".", "1"), ("a" * 5000, "1"),
    ("sampling..steps", "3"), ("sampling.steps.x", "3"), ("sampling.steps", "[" * 100000),
    ("sampling.steps", "{a: &a [*a]}"), ("sampling.steps", "!!python/name:os.system"),
    ("sampling.steps", "9" * 5000), ("sampling.steps", ""), ("sampling.steps", "{"),
    ("sampling.prompts", "1000000"), ("model.negative_prompt", "\x1b]0;title\x07"),
    ("seed", "-1"), ("evaluation.seed", "-1"), ("rewards.0.weight", "1e-300"),
    ("rewards.0.weight", "-1e-9"), ("sampling.transition.eta", "1e-300"),
    ("sampling.transition", "{kind: cps, eta: 1e-9}"), ("credit.clip", "1e-300"),
    ("objective.kl", "{kind: rate, weight: 1e-300}"), ("objective.trust.low", "1e-300"),
    ("objective.trust.high", "1e-300"), ("ema.warmup", "1e-300"), ("async_rewards", "1"),
    ("model.lower_frozen", "0.0"), ("model.lower_frozen", "'yes'"), ("model.vae_tiling", "no"),
    ("objective.selection", "{kind: weighted, softmax: 1}"), ("model.adaptation.targets", "[]"),
    ("prompts.tasks", "[]"), ("prompts.tasks", "[foo]"), ("evaluation.tasks", "[foo]"),
    ("optimizer", "{learning_rate: 100, weight_decay: 100}"), ("scoring.combine", "foo"),
    ("rewards", "[{name: shapes, weight: -1}, {name: brightness, weight: 0, options: {a: 1}}]"),
    ("rewards", "[{name: brightness, weight: 0}, {name: shapes, weight: 0}]"),
    ("rewards.0.name", "nothing"), ("rewards.0.options.nothing", "1"),
    ("watched_rewards", "[{name: nothing}]"), ("evaluation.reward.name", "nothing"),
    ("evaluation.reward.options.nothing", "1"), ("sampling.schedule.shift", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=range(len(REFUSED)))
def test_known_mistakes_are_refused(key: str, value: str, attempt: Attempt) -> None:
    with attempt(PART, "mistakes found before"):
        if key == "scoring.on_error":
            with pytest.raises(ConfigError):
                load_config("demo", [f"{key}={value}"])
            return
        extra = ["sampling.group_size=100000"] if key == "sampling.prompts" else []
        extra += ["objective.window={kind: chunk}"] if "window" in key else []
        with pytest.raises(ConfigError) as caught:
            load_config("demo", [*extra, f"{key}={value}"])
        assert_one_line(str(caught.value))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
FILES = {
    "an alias bomb": BOMB,
    "a key twice": "name: a\nname: b\n",
    "an inner key twice": "sampling:\n  steps: 17\n  steps: 18\n",
    "nested brackets": "name: " + "[" * 100_000,
    "nested mappings": "".join(" " * i + "a:\n" for i in range(200)),
    "a list": "- 1\n",
    "a text": "hello\n",
    "a number": "3\n",
    "false": "false\n",
    "no YAML": "a: b: c\n",
    "a NUL": "name: a\x00\n",
    "an escape code": "name: \x1b[31m\n",
    "a tag": "name: !!python/object/apply:os.system ['true']\n",
    "an anchor in itself": "a: &a [*a]\n",
    "a number as a key": "1: 2\n",
    "a list as a key": "? [a]\n: 1\n",
    "two documents": "name: a\n---\nname: b\n",
    "more than a megabyte": "# " + "x" * 1_100_000 + "\n",
    "a tab": "\tname: a\n",
    "itself extended": "extends: FILE\n",
    "extends a list": "extends: [demo]\n",
    "extends a number": "extends: 3\n",
    "extends nothing there": "extends: nowhere\n",
    "options as a list": "rewards: [{name: shapes, options: [1]}]\n",
    "options of a number": "rewards: [{name: shapes, options: {1: 2}}]\n",
}


@pytest.mark.parametrize("kind", FILES)
def test_broken_files_are_refused_at_once(kind: str, attempt: Attempt, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILES[kind].replace("FILE", str(path)), encoding="utf-8")
    started = time.process_time()
    with attempt(PART, "broken files"):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert_one_line(str(caught.value))
        assert time.process_time() - started < 2


def test_a_chain_of_recipes_ends(attempt: Attempt, tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {tmp_path / f'{number + 1}.yaml'}\n")
    (tmp_path / "60.yaml").write_text("name: end\n")
    with attempt(PART, "broken files"), pytest.raises(ConfigError, match="chain of more than 20"):
        load_config(tmp_path / "0.yaml")
    assert load_config(tmp_path / "45.yaml").name == "end"


def test_binary_files_are_refused(attempt: Attempt, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for number in range(20):
        path.write_bytes(os.urandom(300 + number))
        with attempt(PART, "broken files"), pytest.raises(ConfigError) as caught:
            load_config(path)
        assert_one_line(str(caught.value))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted({each.name for each in every_key()})), JSON)
def test_any_value_of_any_setting(key: str, value: Any) -> None:
    tried(key, value)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=60))
def test_any_text_as_a_change(text: str) -> None:
    try:
        load_config("demo", [text])
    except ConfigError as error:
        assert_one_line(str(error))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(sorted(Config.model_fields)), JSON, max_size=3))
def test_any_sections(sections: dict[str, Any]) -> None:
    try:
        parse_config(sections)
    except ConfigError as error:
        assert_one_line(str(error))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=120))
def test_a_name_stays_one_folder(name: str) -> None:
    try:
        check_run_name(name)
    except ConfigError as error:
        assert_one_line(str(error))
    else:
        assert "\x00" not in name
        assert Path("/runs", name).resolve().parent == Path("/runs")


# --- through the command line -------------------------------------------------------------------

COMMANDS = [["train", "demo", "--set", f"{key}={value}"] for key, value in REFUSED
            if "\x00" not in key + value and len(value) < 10_000
            and key not in ("sampling.prompts", "objective.window.indices")]  # fmt: skip
COMMANDS += [
    ["train", "nothing"], ["train", "demo", "--set", "seed"], ["train", "--chunks", "/nowhere"],
    ["train", "--resume", "/nowhere"], ["train", "--model", "/nowhere"],
    ["train", "--model", "./no where"], ["train", "--reward", "nothing"], ["train", "--reward", ""],
    ["train", "--prompts", "/nowhere.txt"], ["config", "nothing"], ["config", "--set", "x=1"],
    ["chunks", "demo", "--set", "x=1"], ["plan", "demo", "--set", "seed=true"],
    ["sample", "/nowhere"], ["evaluate", "/nowhere"], ["export", "/nowhere", "/tmp/x"],
    ["report", "/nowhere"], ["train", "/nowhere.yaml"], ["train", "demo", "--wrong"],
    ["wrong"], ["train", "demo", "demo"],
]  # fmt: skip


def assert_refused(code: int, stderr: str, args: list[str]) -> None:
    assert code == 2, (args, code, stderr)
    (line,) = stderr.splitlines()
    assert line.startswith("chunkgrpo: ")
    assert_one_line(line)


def test_nothing_prints_past_the_one_function() -> None:
    """All output of commands is printed by ``echo`` or by the display, which spell out codes."""
    folder = Path(chunkgrpo.cli.__file__).parent
    wrong = [
        path.name
        for path in folder.glob("*.py")
        if path.name != "common.py" and ("typer.echo" in path.read_text() or
                                         re.search(r"\bprint\(|[^n]Console\(",
                                                   path.read_text().replace("console.print(", "")))
    ]  # fmt: skip
    assert not wrong, "print by chunkgrpo.cli.common.echo"


def test_commands_end_with_one_line(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    for args in COMMANDS:
        with attempt("command line", "wrong arguments, within the process"):
            result = runner.invoke(app, args)
            assert_refused(result.exit_code, result.stderr, args)
            assert not list(tmp_path.iterdir()), args


def test_warnings_are_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What a server or a prompt says reaches the log of a command without its escape codes."""
    log = logging.getLogger("chunkgrpo")
    said = PlainLog(logging.WARNING)
    log.addHandler(said)
    try:
        log.warning("reward %r %s", "a", "failed: \x1b[2J\x9b2J\n\rgone\u202e")
    finally:
        log.removeHandler(said)
    assert capsys.readouterr().err == "reward 'a' failed: \\x1b[2J\\x9b2J gone\\u202e\n"


def test_prompts_are_echoed_without_their_codes(capsys: pytest.CaptureFixture[str]) -> None:
    from chunkgrpo.cli.results import judge_marks

    assert judge_marks("a \x1b[31mred\x07 thing", {}) is None
    error = capsys.readouterr().err
    assert error.startswith("not judged: ")
    assert "\x1b" not in error
    assert "\x07" not in error


def test_real_commands_end_with_one_line(attempt: Attempt, full: bool, tmp_path: Path) -> None:
    cases = [
        ["train", "demo", "--set", f"{key}={value!r}"]
        for key, value in CASES
        if isinstance(value, int | float) and is_number(key) and abs(value) > 1e300
    ]
    chosen = (COMMANDS + cases)[:100] if full else COMMANDS[:: len(COMMANDS) // 5]
    for args in chosen:
        with attempt("command line", "wrong arguments, a process each"):
            done = subprocess.run(
                [sys.executable, "-m", "chunkgrpo", *args],
                cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert_refused(done.returncode, done.stderr, args)


def test_every_reward_is_looked_at_before_the_first_is_made(monkeypatch) -> None:
    """Making one may load a model for minutes; a slip in the second is known before."""
    made: list[str] = []
    monkeypatch.setattr(build, "make_reward", lambda name, options: made.append(name))
    with pytest.raises(ConfigError, match=r"^rewards\.1: unknown reward 'nothing'"):
        load_config("demo", ["rewards=[{name: shapes}, {name: nothing}]"])
    with pytest.raises(ConfigError, match=r"^watched_rewards\.0: .*options: foo; it takes"):
        load_config("demo", ["watched_rewards=[{name: shapes, options: {foo: 1}}]"])
    with pytest.raises(ConfigError, match=r"scoring\.combine 'product' needs positive weights"):
        load_config("demo", ["scoring.combine=product", "rewards.0.weight=-1"])
    assert not made


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.device=cuda:99", r"model\.device is 'cuda:99', and torch finds .* devices? here"),
        ("model.device=mps", r"model\.device is 'mps', and torch finds no such devices here"),
        ("model.compile={kind: blocks, backend: foo}", r"unknown model\.compile\.backend 'foo'"),
    ],
)
def test_what_this_machine_lacks_is_said_before_anything_is_made(
    setting: str, message: str, monkeypatch: pytest.MonkeyPatch, attempt: Attempt, tmp_path: Path
) -> None:
    """Torch answers a missing device with an AssertionError, while the model is moved there."""
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    monkeypatch.setattr(build, "build_rewards", lambda config: pytest.fail("a reward was made"))
    config = load_config("demo", [setting])
    with attempt(PART, "a device or compiler that is not there"):
        with pytest.raises(ValueError, match=message):
            build.build_trainer(config, tmp_path)
        with pytest.raises(ValueError, match=message):
            build.policy_options(config.model)


def test_a_folder_with_another_name_is_refused_everywhere(tmp_path: Path) -> None:
    from chunkgrpo.runs import new_folder

    for name in ("../x", "..", "", "a/b", "/x", "a\x00", "x" * 300):
        with pytest.raises(ConfigError):
            new_folder(tmp_path / "runs", name)
    assert new_folder(tmp_path / "runs", "x") == tmp_path / "runs" / "x"


def test_the_settings_of_a_run_are_checked_as_a_recipe_is(tmp_path: Path) -> None:
    from chunkgrpo.runs import read_run

    text = dump_config(load_config("demo"))
    (tmp_path / "config.yaml").write_text(text)
    assert read_run(tmp_path) == load_config("demo")
    (tmp_path / "config.yaml").write_text(text.replace("updates: 2", "updates: 1000"))
    with pytest.raises(ConfigError, match=r"objective\.updates = 1000 share"):
        read_run(tmp_path)


def test_a_window_that_stays_for_long_takes_no_memory() -> None:
    longest = int(LIMITS["objective.window.every"][1])
    window = SlidingWindow(4, longest)
    starts = [window.start_at(i, 20, torch.Generator()) for i in (0, longest - 1, longest)]
    assert starts == [0, 0, 1]
    assert SlidingWindow(4, 3, decay="exponential", rate=1e3, after=0).stays(16, 20) == 1


def test_the_schema_says_the_bounds() -> None:
    schema = json_schema()
    shown = schema["properties"]["iterations"]
    assert (shown["minimum"], shown["maximum"]) == LIMITS["iterations"]
    clip = schema["$defs"]["Clip"]["properties"]["low"]
    assert (clip["minimum"], clip["maximum"]) == LIMITS["objective.trust.low"]
    sizes = schema["$defs"]["ExplicitPlan"]["properties"]["sizes"]["items"]
    assert (sizes["minimum"], sizes["maximum"]) == LIMITS["objective.plan.sizes"]
    betas = schema["$defs"]["Optimization"]["properties"]["betas"]["prefixItems"]
    assert all((e["minimum"], e["maximum"]) == LIMITS["optimizer.betas"] for e in betas)
    weight = schema["$defs"]["RewardConfig"]["properties"]["weight"]
    assert (weight["minimum"], weight["maximum"]) == LIMITS["rewards.0.weight"]
    rate = schema["$defs"]["SlidingWindow"]["properties"]["rate"]["anyOf"][0]
    assert (rate["minimum"], rate["maximum"]) == LIMITS["objective.window.rate"]


def test_what_is_written_is_read_again() -> None:
    config = load_config("demo")
    assert parse_config(yaml.safe_load(yaml.safe_dump(values(config)))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{foo: 1}", "unknown option of .*'foo'; .*known: decode_batch"),
        ("{guidance: 3.0}", "unknown option of"),  # it would override model.guidance
        ("{precision: fp32}", "unknown option of"),
        ("{decode_batch: many}", "must be of type int"),
        ("{decode_batch: true}", "must be of type int"),
    ],
)
def test_options_of_a_model_are_known(options: str, message: str, attempt: Attempt) -> None:
    from chunkgrpo.config.build import policy_options

    config = load_config("demo", [f"model.options={options}"])
    with attempt(PART, "options of a model"), pytest.raises(ValueError, match=message):
        policy_options(config.model)
    assert "decode_batch" not in policy_options(load_config("demo").model)
