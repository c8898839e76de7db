"""One notebook, executed: what it leaves, that it gets its parameters, and that two executions look alike."""

from __future__ import annotations

import json

import nbformat
from test_experiments import write_notebook

from bagssl.batch.notebook import normalise_notebook
from bagssl.batch.reproduce import refresh_notebooks
from bagssl.paths import cores


def test_success_leaves_notebook_html_tables_status_and_provenance(results):
    folder = results / "smoke" / "good"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"good.ipynb", "good.html", "tables/sum.md", "status.json", "provenance.json"}
    assert not (results / "smoke" / ".good.partial").exists()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert {"commit", "dirty", "versions", "hardware", "start", "end", "seconds", "parameters", "data",
            "profile"} <= set(provenance)
    assert {"python", "torch", "torchvision", "lightly", "papermill"} <= set(provenance["versions"])
    # the machine's, whatever the kernels of a batch of several jobs get of it
    assert provenance["hardware"]["cores"] == cores() and "threads" not in provenance["hardware"]


def test_kernel_runs_in_the_notebooks_folder(results, notebooks):
    assert (results / "smoke/good/tables/sum.md").read_text() == f"2 0.5 [1, 4] {notebooks.name}"


def test_refresh_rewrites_in_place_and_twice_the_same(tmp_path):
    write_notebook(tmp_path / "a.ipynb", ["print('a')", "print('b')\n2"])
    write_notebook(tmp_path / "b.ipynb", ["1 / 0"])
    broken = (tmp_path / "b.ipynb").read_bytes()
    assert refresh_notebooks(notebooks=tmp_path) == 1
    assert (tmp_path / "b.ipynb").read_bytes() == broken
    found = nbformat.read(tmp_path / "a.ipynb", as_version=4)
    assert found.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                              "language_info": {"name": "python"}}
    assert [cell.get("execution_count") for cell in found.cells] == [None, 1, 2, 3]
    assert [dict(cell.metadata) for cell in found.cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    once = (tmp_path / "a.ipynb").read_bytes()
    for number, cell in enumerate(found.cells):
        cell.id, cell.metadata["papermill"] = f"other{number}", {"duration": 1.0}
    nbformat.write(found, tmp_path / "a.ipynb")
    normalise_notebook(tmp_path / "a.ipynb")
    assert (tmp_path / "a.ipynb").read_bytes() == once
