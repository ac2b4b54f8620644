# SPDX-License-Identifier: Apache-2.0
"""The notebook runs, holds the loop of the script, and is kept without outputs."""

import ast
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

SMALL = {"iterations": 2, "group_size": 4, "num_drawn": 4}
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def notebook():
    return nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)


def code_of(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_the_notebook_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_the_notebook_and_the_script_build_the_same_parts(notebook):
    """What the script imports and calls in its loop, the notebook does too."""

    def called(code: str) -> set[str]:
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        return {ast.unparse(call.func) for call in calls}

    script = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    assert called(script) <= called(code_of(notebook))


@pytest.mark.slow
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    parameters = notebook.cells[1]
    parameters.source, changed = re.subn(
        r"^(iterations|group_size|num_drawn) = \d+",
        lambda found: f"{found[1]} = {SMALL[found[1]]}",
        parameters.source,
        flags=re.MULTILINE,
    )
    assert changed == len(SMALL), "the second cell holds the notebook's parameters"
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3, "pictures before and after, and the curve"
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert re.search(r"iteration 0: mean reward \d\.\d{3}", printed)
    assert (tmp_path / "runs/notebook/pytorch_lora_weights.safetensors").is_file()
