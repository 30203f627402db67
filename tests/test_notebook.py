"""The notebook in scripts/ runs from top to bottom, without network, on the bundled model."""

import os
from pathlib import Path

import pytest

REASON = "runs the notebook: needs the extras notebook and eval"
nbclient = pytest.importorskip("nbclient", reason=REASON)
nbformat = pytest.importorskip("nbformat", reason=REASON)
pytest.importorskip("ipykernel", reason=REASON)
pytest.importorskip("lm_eval", reason=REASON)

NOTEBOOK = Path(__file__).parents[1] / "scripts" / "sled_colab.ipynb"
FEWER = {"limit=50": "limit=4", "steps=40, warmup=4": "steps=4, warmup=2", "save_every=20": "save_every=2"}


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)  # kept without, so that changes can be read
    for many, few in FEWER.items():  # the same code, in seconds
        [cell] = [cell for cell in code if many in cell.source and not cell.metadata.get("tags")]
        cell.source = cell.source.replace(many, few)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cpu")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") or str(output.get("data", "")) for cell in code for output in cell.outputs)
    assert "of the drafts accepted" in printed and "sled_demo: exact_match" in printed and "4 samples" in printed
    for left in ("lens.html", "lens.png", "eval/report.json", "run/model/config.json", "exported/README.md",
                 "program/run.py"):
        assert (tmp_path / left).is_file(), left
    assert "#### " in code[-4].outputs[-1]["text"]  # the exported program solved the problem
    hub = [cell for cell in code if "hub" in cell.metadata.get("tags", ())]
    assert len(hub) == 3 and all(cell.source.startswith("if RUN_HUB") for cell in hub)
