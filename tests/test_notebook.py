"""docs/prime_by_hand.ipynb runs: its asserts hold, and its stored outputs are what it says."""

import shutil

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "prime_by_hand.ipynb"


def text_of(cell):
    """What a cell printed and what its last expression is, warnings left out."""
    texts = []
    for output in cell.outputs:
        if output.get("name") == "stderr":
            continue
        texts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "".join(texts).strip()


@pytest.mark.slow
def test_notebook(monkeypatch, tmp_path):
    # A copy of the repository, so that out/ stays as it is: the notebook finds its own root.
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "out", "tests", "world", "__pycache__")
    shutil.copytree(ROOT, root, ignore=ignored)
    monkeypatch.setenv("NOTEBOOK_STEPS", "1 200")
    notebook = nbformat.read(NOTEBOOK, 4)
    stored = [text_of(cell) for cell in notebook.cells if cell.cell_type == "code"]

    folder = str(root / "docs")
    NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=folder))).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [text_of(cell) for cell in cells]

    # The formulas; the run at the end is a shorter one here.
    run = next(number for number, cell in enumerate(cells) if "subprocess" in cell.source)
    assert run >= 8
    assert shown[:run] == stored[:run]
    assert "0.515 0.693" in shown[:run]
    assert "step 1/1" in shown[run]
    assert "first wrong line:" in shown[-1]
    assert (root / "out/notebook/prime/tokens.html").exists()
    assert NOTEBOOK.stat().st_size < 300_000
