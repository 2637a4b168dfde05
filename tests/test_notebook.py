"""The notebook runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from pathme_jax.files import read_json

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore")
def test_quickstart_runs_and_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And with it the demo end to end: every stage, its files, and the report."""
    monkeypatch.setenv("PATHME_WORKDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "colab" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=580, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (report,) = tmp_path.glob("reports/20x-*/report.html")
    page = report.read_text()
    assert "unlabelled" in page and "too few" in page.lower()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    metrics = read_json(report.with_name("metrics.json"))
    assert set(metrics["results"]) == {"detail", "subtype"}
    assert set(metrics["results"]["subtype"]) == {"20x only", "5x only", "concatenated", "PatHME"}
    assert set(read_json(report.with_name("timings.json"))["seconds"])
    assert str(tmp_path) not in json.dumps(metrics)  # no paths: equal runs have equal metrics
