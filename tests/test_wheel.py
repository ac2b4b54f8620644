# SPDX-License-Identifier: Apache-2.0
"""The wheel holds all that the package needs and nothing else, and trains when it is installed."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "chunkgrpo"
# A run of seconds: two iterations, and next to no images.
SMALL = [
    "iterations=2", "sampling.prompts=2", "sampling.group_size=3", "evaluation.every=0",
    "evaluation.prompts=6", "evaluation.final_prompts=6", "threads=1",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout; that of CHUNKGRPO_WHEEL where it is set (``make wheel``)."""
    if given := os.environ.get("CHUNKGRPO_WHEEL"):
        return Path(given).resolve()
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, and the packages of this one but the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    found = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", found, "install", "--quiet"]
    command += ["--disable-pip-version-check", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    # A folder named by a .pth file is searched, but its own .pth files, which lead an editable
    # installation to the checkout, are not read.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found


def run(command: list[str | Path], folder: Path) -> str:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if name.startswith("chunkgrpo/")}
    kept = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == kept
    (information,) = {name.split("/")[0] for name in names - inside}
    assert information.endswith(".dist-info")
    licences = {name for name in names if "/licenses/" in name}
    assert {name.rpartition("/")[2] for name in licences} == {"LICENSE", "NOTICE"}


def test_what_is_installed_trains(python: Path, tmp_path: Path) -> None:
    script = (
        "import json; from importlib import resources; import chunkgrpo\n"
        "root = resources.files('chunkgrpo')\n"
        "print(json.dumps([chunkgrpo.__file__, *(str(root / name) for name in ('py.typed',\n"
        "    'recipes/demo.yaml', 'report/templates/run.html.j2', 'rewards/templates/yes_no.txt',\n"
        "    'shapes/weights/pipeline/model_index.json'))]))"
    )
    files = json.loads(run([python, "-c", script], tmp_path))
    for file in files:
        assert Path(file).is_file()
        assert Path(file).is_relative_to(python.parents[1]), "this is not what was installed"
    settings = [part for setting in SMALL for part in ("--set", setting)]
    run([python.with_name("chunkgrpo"), "train", "demo", *settings], tmp_path)
    (report,) = tmp_path.glob("runs/*/report.html")
    assert json.loads((report.parent / "summary.json").read_text())
    assert (report.parent / "model").is_dir()
