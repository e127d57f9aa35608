"""The notebook for Kaggle, executed as Jupyter does it, on two CPU processes."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/05_kaggle_two_t4s.ipynb"


def test_no_output_is_committed() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_every_cell_runs_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in {"PYTHONPATH": str(NOTEBOOK.parents[1]), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises what a cell raises
    text = "".join(o.get("text", "") or str(o.get("data", "")) for cell in notebook.cells for o in cell.get("outputs", ()))
    for said in (
        "two CPU processes",
        "Plan (inferred), tp=2",
        "Shards of GPT",
        "Throughput: ",
        "after 60 steps",
        "after 120 steps",
        "the same logits in a new model",
    ):
        assert said in text, said
    assert (tmp_path / "checkpoints/last.ckpt/plan.json").is_file() and (tmp_path / "gpt.ckpt").is_file()
