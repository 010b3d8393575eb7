"""The notebook runs from the first cell to the last, with few steps and clips."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def test_quickstart_trains_and_shows_clips(tmp_path, monkeypatch):
    few = {"STEPS": "2", "CLIPS": "6", "SAMPLE_STEPS": "2", "RUN": str(tmp_path)}
    for name, value in few.items():
        monkeypatch.setenv(f"QUICKSTART_{name}", value)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of what it costs
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type in ("display_data", "execute_result")
    ]
    videos = [data["text/html"].count("<video") for data in shown if "text/html" in data]
    assert videos == [4, 4]
    assert sum("image/png" in data for data in shown) == 2
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 4
