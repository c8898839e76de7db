"""One notebook, executed: what it leaves, that it gets its parameters, and that two executions look alike."""

from __future__ import annotations

import json
import sys

import nbformat
import pytest
from test_experiments import write_notebook

from bagssl.batch.notebook import normalise_notebook, run_cells
from bagssl.batch.reproduce import refresh_notebooks, reproduce
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


DRAWN = """import sys, matplotlib.pyplot as plt
from bagssl.study import figures
figures.style()
figure, axis = plt.subplots()
axis.plot([1, 2]); axis.set_title("a $x^2$")
figures.save_figure(figure, output or __import__("os").environ["BAGSSL_OUTPUT"], "drawn")
print(sys.executable, [name for name in ("left_by_a_profile",) if name in globals()])"""


def test_nothing_that_the_reader_has_set_reaches_the_kernel(tmp_path, monkeypatch):
    """Another kernel called python3, a start-up file, a matplotlibrc: the same figure to the byte, the same outputs."""
    write_notebook(tmp_path / "n.ipynb", [DRAWN])
    entry = {"artefact": "x", "notebook": "n.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}}
    (tmp_path / "experiments.yaml").write_text(json.dumps({"n": entry}))

    def made(name):
        assert reproduce(notebooks=tmp_path, results=tmp_path / name) == 0
        folder = tmp_path / name / "smoke" / "n"
        return {path.name: path.read_bytes() for path in folder.glob("figures/*")}, (folder / "n.ipynb").read_bytes()

    plain = made("plain")
    assert sys.executable in plain[1].decode()
    home = tmp_path / "home"
    (home / "kernels" / "python3").mkdir(parents=True)
    (home / "kernels" / "python3" / "kernel.json").write_text(json.dumps(
        {"argv": ["false", "{connection_file}"], "display_name": "another", "language": "python"}))
    (home / "profile_default" / "startup").mkdir(parents=True)
    (home / "profile_default" / "startup" / "a.py").write_text("left_by_a_profile = print('hello')")
    (home / "matplotlibrc").write_text("text.usetex: True\nsavefig.transparent: True\naxes.xmargin: 0.3\n")
    monkeypatch.setenv("JUPYTER_PATH", str(home))
    monkeypatch.setenv("IPYTHONDIR", str(home))
    monkeypatch.setenv("MATPLOTLIBRC", str(home))
    assert made("surrounded") == plain


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


def test_run_bare_its_imports_stay_and_ipython_is_as_before(tmp_path, monkeypatch):
    """A second notebook of the same process finds what the first has imported: some libraries load only once."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loaded_once.py").write_text("import sys\nassert 'loads' not in vars(sys)\nsys.loads = 1\n")
    monkeypatch.setattr(sys, "loads", None, raising=False)
    monkeypatch.delattr(sys, "loads")
    write_notebook(tmp_path / "a.ipynb", ["import loaded_once\nfrom IPython.display import Markdown\nMarkdown('x')"])
    usual = sys.modules.get("IPython.display")
    for _ in range(2):
        run_cells(tmp_path / "a.ipynb", {})
        assert sys.modules.get("IPython.display") is usual
    monkeypatch.delitem(sys.modules, "loaded_once")
    with pytest.raises(AssertionError):  # negative control: it cannot be imported twice
        run_cells(tmp_path / "a.ipynb", {})
