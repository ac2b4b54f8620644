# SPDX-License-Identifier: Apache-2.0
"""Code that settings name runs only from where the user put it, and weights never hold code."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from attack.conftest import Attempt
from chunkgrpo.cli import app
from chunkgrpo.config import ConfigError, load_config
from chunkgrpo.imported_code import code_allowed, import_named
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.rewards import make_reward

SOURCE = Path(__file__).resolve().parents[2] / "src" / "chunkgrpo"
CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()

def bright(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of imports that is neither the working directory nor installed."""
    folder = tmp_path / "elsewhere"
    (folder / "strangepack").mkdir(parents=True)
    (folder / "strange.py").write_text(CODE)
    (folder / "strangepack" / "__init__.py").write_text(CODE)
    (folder / "strangepack" / "inner.py").write_text(CODE)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("strange", "strangepack", "strangepack.inner"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "path", ["strange:bright", "strangepack:bright", "strangepack.inner:bright"]
)
def test_code_elsewhere_is_refused_and_does_not_run(
    path: str, elsewhere: Path, attempt: Attempt
) -> None:
    with attempt("code", "module:function outside the working directory"):
        with pytest.raises(ValueError, match=r"outside the working directory .* --allow-code"):
            make_reward(path)
        with pytest.raises(ConfigError, match="--allow-code"):
            load_config("demo", [f"objective.trust={{kind: imported, path: '{path}'}}"])
        assert not list(elsewhere.rglob("ran"))
    with code_allowed():
        assert make_reward(path).name == "bright"
    assert list(elsewhere.rglob("ran"))


@pytest.mark.parametrize("path", ["os:system", "subprocess:run", "builtins:exec", "pathlib:Path"])
def test_functions_of_python_itself_are_refused(path: str, attempt: Attempt) -> None:
    refusal = pytest.raises(ValueError, match="belongs to Python itself")
    with attempt("code", "a function of Python itself"), refusal:
        make_reward(path)


BAD_PATHS = ["os", ":f", "a:", "a b:c", "a..b:c", ".a:b", "a:b.c", "a:b:c", "../a:b", "a:b()"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_other_forms_are_refused(path: str, attempt: Attempt) -> None:
    with (
        attempt("code", "a path of another form"),
        pytest.raises(ValueError, match=r"must look|names no"),
    ):
        import_named(path)


def test_a_link_into_elsewhere_is_elsewhere(elsewhere: Path, attempt: Attempt) -> None:
    Path("linked.py").symlink_to(elsewhere / "strange.py")
    sys.path.insert(0, str(Path.cwd()))
    try:
        refusal = pytest.raises(ValueError, match="--allow-code")
        with attempt("code", "a link out of the working directory"), refusal:
            make_reward("linked:bright")
    finally:
        sys.path.remove(str(Path.cwd()))


def test_code_of_the_working_directory_and_of_packages_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nearby.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    scores = make_reward("nearby:bright")(torch.full((2, 3, 4, 4), 0.25), ["a", "b"])
    assert scores.tolist() == [0.25, 0.25]
    sys.modules.pop("nearby")
    assert import_named("torch:relu") is torch.relu
    assert import_named("chunkgrpo.core.trust:Clip").__name__ == "Clip"
    with pytest.raises(ImportError, match="No module named 'nowhere'"):
        import_named("nowhere:f")


def test_the_command_asks_for_permission(elsewhere: Path, attempt: Attempt) -> None:
    command = [sys.executable, "-m", "chunkgrpo", "config", "demo", "--set",
               "objective.trust={kind: imported, path: 'strange:bright'}"]  # fmt: skip
    paths = f"{elsewhere}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths}
    with attempt("code", "module:function outside the working directory, a process"):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2
        assert "--allow-code" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not list(elsewhere.rglob("ran"))
    again = subprocess.run(
        [*command, "--allow-code"], capture_output=True, text=True, env=environment, check=False
    )
    assert "cannot be built" in again.stderr  # it ran, and is no trust region
    assert list(elsewhere.rglob("ran"))


def test_permission_ends_with_the_command(elsewhere: Path) -> None:
    trust = "objective.trust={kind: imported, path: 'strange:bright'}"
    arguments = ["config", "demo", "--set", trust]
    allowed = CliRunner().invoke(app, [*arguments, "--allow-code"])
    assert "cannot be built" in allowed.stderr
    sys.modules.pop("strange")
    refused = CliRunner().invoke(app, arguments)
    assert "--allow-code" in refused.stderr


@pytest.mark.parametrize(
    "named", [["strange", "bright"], ["strangepack.inner", "bright"], ["os", "system"], ["", "x"]]
)
def test_a_model_does_not_choose_what_is_imported(
    named: list[str], elsewhere: Path, tiny_pipeline_path: Path, attempt: Attempt
) -> None:
    """Of a pipeline of someone else diffusers would import any module that the index names."""
    model = elsewhere.parent / "model"
    shutil.copytree(tiny_pipeline_path, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "scheduler": named}))
    with attempt("code", "a model that names code"):
        with pytest.raises(ValueError, match=r"takes scheduler from .* must not choose code"):
            load_policy(model)
        assert not list(elsewhere.rglob("ran"))
    with code_allowed(), pytest.raises(ValueError, match="must not choose code"):
        load_policy(model)  # a permission for settings is none for models


FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def test_nothing_here_loads_or_runs_code_from_data(attempt: Attempt) -> None:
    """No pickle, eval or exec; torch.load and numpy.load say that they want none."""
    wrong: list[str] = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            names = []
            if isinstance(node, ast.Import):
                names = [each.name.partition(".")[0] for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            wrong += [f"{where} imports {name}" for name in names if name in FORBIDDEN]
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if called in ("eval", "exec", "compile", "__import__"):
                wrong.append(f"{where} calls {called}")
            if called == "torch.load" and given.get("weights_only") != "True":
                wrong.append(f"{where}: torch.load without weights_only=True")
            if called == "np.load" and given.get("allow_pickle") != "False":
                wrong.append(f"{where}: np.load without allow_pickle=False")
            if "trust_remote_code" in given and given["trust_remote_code"] != "False":
                wrong.append(f"{where}: trust_remote_code")
            if (
                called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
                and "Loader" not in given
            ):
                wrong.append(f"{where}: {called} without a loader")
    with attempt("code", "loading that could run code"):
        assert not wrong, "\n".join(wrong)
