"""Experiments run whole or leave what was there: every way to end, every wrong question."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import yaml
from filelock import FileLock

from bagssl.batch import experiments
from bagssl.errors import InputError, Stopped
from bagssl.paths import cores

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = """name: str = "x"
numbers: list[int] = [1, 4]  # several
rate: float = 0.5
count: int = 2
on: bool = False
options: dict = {}
limit: float | None = None
output: str = ""
"""
WRITE = """import os, pathlib
tables = pathlib.Path(os.environ["BAGSSL_OUTPUT"]) / "tables"
tables.mkdir()
(tables / "sum.md").write_text(f"{count} {rate} {numbers} {pathlib.Path.cwd().name}")
print("a"); print("b")"""
NOTEBOOKS = {
    "good": [WRITE, "assert count != 13, 'unlucky\\nnumber'"],
    "killed": ["import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"],
    "left": ["raise SystemExit(0)", "1"],
    "stopped": ["import os\nassert float(os.environ['BAGSSL_DEADLINE']) > 0",
                "from bagssl.errors import Stopped\nraise Stopped('at crop 100')"],
    "refused": ["from bagssl.errors import InputError\nraise InputError('epochs = -1 is outside 0 to 10')"],
    "long": ["import pathlib, os\npathlib.Path(os.environ['BAGSSL_OUTPUT'], 'pid').write_text(str(os.getpid()))",
             "import time\ntime.sleep(100)"],
}  # fmt: skip


def write_notebook(path: Path, cells: list[str], parameters: str = PARAMETERS) -> None:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    text = nbformat.v4.new_markdown_cell("# A title")
    nbformat.write(nbformat.v4.new_notebook(cells=[text, first, *map(nbformat.v4.new_code_cell, cells)]), path)


def write_list(folder: Path, **changed) -> None:
    entries = {name: {"artefact": "Table 1", "notebook": f"{name}.ipynb",
                      "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}} for name in NOTEBOOKS}
    entries["good"]["profiles"]["paper"] = {"cost": "1 h, GPU", "parameters": {"count": 3}}
    (folder / "experiments.yaml").write_text(yaml.safe_dump({**entries, **changed}))


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks") / "Zoë's notebooks"
    folder.mkdir()
    for name, cells in NOTEBOOKS.items():
        write_notebook(folder / f"{name}.ipynb", cells)
    write_list(folder)
    return folder


@pytest.fixture(scope="module")
def results(notebooks, tmp_path_factory) -> Path:
    """Five notebooks, two side by side, of which one ends well; `codes.json` holds the exit codes."""
    folder = tmp_path_factory.mktemp("results") / "Zoë's \"results\"\nof [to]day"
    folder.mkdir()
    how = {"jobs": 2, "notebooks": notebooks, "results": folder}
    codes = {"bad": experiments.reproduce(["good", "killed", "left", "refused"], **how),
             "stopped": experiments.reproduce(["good", "stopped"], time_limit=600, **how)}
    (folder / "codes.json").write_text(json.dumps(codes))
    return folder


def ended(results: Path, name: str) -> dict:
    return json.loads((results / "smoke" / f".{name}.failed" / "status.json").read_text())


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


@pytest.mark.parametrize("name, ename", [("killed", "DeadKernelError"), ("left", "SystemExit")])
def test_a_kernel_that_dies_or_leaves_early_has_failed(results, name, ename):
    assert json.loads((results / "codes.json").read_text())["bad"] == 1
    assert ended(results, name)["error"]["ename"] == ename
    assert (results / f"smoke/.{name}.failed/{name}.ipynb").exists()
    assert (results / f"smoke/.{name}.failed/log.txt").exists()
    assert not (results / "smoke" / name).exists()


def test_stopped_by_the_time_limit_is_code_3(results):
    assert json.loads((results / "codes.json").read_text())["stopped"] == 3
    assert ended(results, "stopped")["state"] == "stopped"


def test_parameters_that_the_notebook_refuses_are_code_2(results, capsys):
    assert ended(results, "refused")["code"] == 2


def test_fresh_is_not_run_again_and_a_failure_keeps_the_last_good_results(results, notebooks, capsys):
    folder, how = results / "smoke" / "good", {"notebooks": notebooks, "results": results}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert experiments.reproduce(["good"], **how) == 0
    assert "good: fresh" in capsys.readouterr().out
    assert experiments.reproduce(["good"], overrides={"count": "13"}, **how) == 1
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and "AssertionError: unlucky" in message and ".good.failed" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_failures_are_named_again_at_the_end_with_their_logs(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments.Kernels, "run", lambda *_: {"ename": "ValueError", "evalue": "no", "cell": 3})
    assert experiments.reproduce(["good", "left"], notebooks=notebooks, results=tmp_path) == 1
    head, *named = capsys.readouterr().err.splitlines()[-3:]
    assert head == "2 of 2 failed:" and [line.split()[0] for line in named] == ["good:", "left:"]
    assert named[0].endswith("smoke/.good.failed/log.txt")


def test_what_makes_results_stale(results, notebooks, tmp_path, monkeypatch):
    def state(overrides=None, folder=notebooks):
        good = experiments.load_experiments(folder)["good"]
        return experiments.state(experiments.plan(good, "smoke", overrides, results=results))

    assert state() == "fresh"
    assert state({"count": 2}) == "fresh"  # the default, said aloud
    assert state({"count": 3}) != "fresh"
    for name, cells in NOTEBOOKS.items():
        write_notebook(tmp_path / f"{name}.ipynb", cells)
    write_list(tmp_path)
    assert state(folder=tmp_path) == "fresh"  # the same cells, other ids
    write_notebook(tmp_path / "good.ipynb", [*NOTEBOOKS["good"], "1"])
    assert state(folder=tmp_path) != "fresh"
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "package_hash", lambda: "other sources")
        assert state() != "fresh"
    assert state() == "fresh"
    table = results / "smoke/good/tables/sum.md"
    text = table.read_text()
    table.write_text("changed by hand")
    assert state() != "fresh"
    table.unlink()
    assert state() != "fresh"
    table.write_text(text)
    assert state() == "fresh"


def test_every_source_that_a_result_depends_on_is_in_the_key(tmp_path):
    package = Path(experiments.__file__).parent
    shutil.copytree(package, tmp_path / "a")
    before, names = experiments.package_hash(tmp_path / "a"), {path.name for path in package.iterdir() if path.is_file()}
    assert before == experiments.package_hash()
    beside = set()
    for name in names:
        copy = tmp_path / name / "package"
        shutil.copytree(package, copy)
        (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
        beside |= {name} if experiments.package_hash(copy) == before else set()
    assert beside == {"bench.py", "cli.py", "experiments.py", "report.py", "report.html.j2", "notebook.html.j2"}


def test_results_that_make_no_page_are_named_and_leave_the_code_of_the_experiments(notebooks, results, monkeypatch, capsys):
    def none(results):
        raise InputError("claim_c2.csv is no table")

    monkeypatch.setattr("bagssl.report.write_report", none)
    how = {"notebooks": notebooks, "results": results}
    for names, code in ((["good"], 1), (["good", "stopped"], 3), (["good", "refused"], 2)):
        assert experiments.reproduce(names, time_limit=600, **how) == code
        assert capsys.readouterr().err.endswith("bagssl: no page of all results: claim_c2.csv is no table\n")


@pytest.mark.parametrize("content", ["", "[]", "null", '{"state": "done", "key": "', "\0" * 100])
def test_a_damaged_status_means_running_again(results, notebooks, tmp_path, content):
    shutil.copytree(results / "smoke/good", tmp_path / "smoke/good")
    stage = experiments.plan(experiments.load_experiments(notebooks)["good"], "smoke", results=tmp_path)
    assert experiments.state(stage) == "fresh"
    (stage.folder / "status.json").write_text(content)
    assert experiments.state(stage) == "missing"


def test_data_is_part_of_the_key(notebooks, tmp_path, monkeypatch):
    write_notebook(tmp_path / "d.ipynb", ["1"], 'dataset: str = "synthetic"\n')
    entry = {"artefact": "x", "notebook": "d.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}}
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"d": entry}))
    experiment = experiments.load_experiments(tmp_path)["d"]
    monkeypatch.setattr(experiments, "_fingerprint", lambda name: "one")
    one = experiments.plan(experiment, "smoke")
    monkeypatch.setattr(experiments, "_fingerprint", lambda name: "two")
    assert experiments.plan(experiment, "smoke").key != one.key
    assert one.data == {"synthetic": "one"}
    with pytest.raises(InputError, match=r"d \(d.ipynb\): the dataset 'nowhere'"):
        experiments.plan(experiment, "smoke", {"dataset": "nowhere"})
    with pytest.raises(InputError, match=r"'synthetik' is not in .*: did you mean 'synthetic'\? Or add it"):
        experiments.plan(experiment, "smoke", {"dataset": "synthetik"})


def test_a_swap_that_was_cut_short_is_mended(tmp_path, notebooks, results):
    good = experiments.load_experiments(notebooks)["good"]
    stage = experiments.plan(good, "smoke", results=results)
    os.replace(stage.folder, stage.beside("old"))  # killed between the two renames
    assert experiments.reproduce(["good"], notebooks=notebooks, results=results) == 0
    assert experiments.state(stage) == "fresh" and not stage.beside("old").exists()


def test_what_another_process_executes_is_waited_for_with_a_line(notebooks, results, monkeypatch, capsys):
    stage = experiments.plan(experiments.load_experiments(notebooks)["good"], "smoke", results=results)
    held = FileLock(stage.beside("lock"), thread_local=False)  # released by another thread
    held.acquire()
    waited = experiments.Board.say

    def say(board, text, **how):
        waited(board, text, **how)
        held.release()  # the other one ends as soon as it is waited for

    monkeypatch.setattr(experiments.Board, "say", say)
    assert experiments.reproduce(["good"], notebooks=notebooks, results=results) == 0
    out = capsys.readouterr().out
    assert "another process executes it: waiting for that" in out and "good: fresh" in out


def test_a_clock_that_is_set_does_not_end_the_batch(tmp_path, notebooks, monkeypatch):
    """Kernels are told their deadline in Unix time, by the clock as it then is."""
    hours, told = itertools.count(0, 36_000), []
    monkeypatch.setattr(experiments, "time", SimpleNamespace(**{**vars(time), "time": lambda: 1e9 + next(hours)}))

    def run(kernels, notebook, target, parameters, environment):
        told.append(float(environment["BAGSSL_DEADLINE"]))
        return {"ename": "Stopped", "evalue": "at crop 100"}

    monkeypatch.setattr(experiments.Kernels, "run", run)
    assert experiments.reproduce(["good", "long"], time_limit=600, notebooks=notebooks, results=tmp_path) == 3
    assert len(told) == 2 and all(300 < (deadline - 1e9) % 36_000 <= 600 for deadline in told)


def test_ctrl_c_stops_all_kernels_within_seconds(tmp_path, notebooks):
    # a shell's background job ignores Ctrl-C and so do its children: as in the foreground, then
    shutil.copytree(notebooks, tmp_path / "notebooks")
    write_list(tmp_path / "notebooks", too={"artefact": "none", "notebook": "long.ipynb", "profiles": {"smoke": {"cost": "", "parameters": {}}}})
    script = ("import sys, pathlib, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
              "from bagssl import experiments as e; sys.exit(e.reproduce(['long', 'too'], jobs=2, "
              "notebooks=pathlib.Path(sys.argv[1]), results=pathlib.Path(sys.argv[2])))")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "notebooks"), str(tmp_path)], text=True,
                               stdout=subprocess.PIPE, cwd=Path(experiments.__file__).parent.parent)
    pids, until = [tmp_path / f"smoke/.{name}.partial/pid" for name in ("long", "too")], time.monotonic() + 90
    while not all(pid.exists() and pid.read_text() for pid in pids):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.1)
    kernels = [psutil.Process(int(pid.read_text())) for pid in pids]
    assert all(kernel.is_running() for kernel in kernels)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stdout.read().count("interrupted") == 2
    assert not any(kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE for kernel in kernels)
    assert ended(tmp_path, "long")["state"] == ended(tmp_path, "too")["state"] == "stopped"


def test_refresh_rewrites_in_place_and_twice_the_same(tmp_path):
    write_notebook(tmp_path / "a.ipynb", ["print('a')", "print('b')\n2"])
    write_notebook(tmp_path / "b.ipynb", ["1 / 0"])
    broken = (tmp_path / "b.ipynb").read_bytes()
    assert experiments.refresh_notebooks(notebooks=tmp_path) == 1
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
    experiments.normalise_notebook(tmp_path / "a.ipynb")
    assert (tmp_path / "a.ipynb").read_bytes() == once


@pytest.mark.parametrize("text, annotation, value", [
    ("{tcr: {learning_rate: 1e-3, options: {a: 2}}}", "dict", {"tcr": {"learning_rate": 1e-3, "options": {"a": 2}}}),
    ("4", "int", 4), ("1", "float", 1.0), ("1e-3", "float", 1e-3), ("true", "bool", True), ("no", "str", "no"),
    ("[1, 4]", "list[int]", [1, 4]), ("1,4", "list[int]", [1, 4]), ("3", "list[int]", [3]),
    ("tcr,simclr", "list[str]", ["tcr", "simclr"]), ("{a: 1}", "dict", {"a": 1}), ("null", "float | None", None),
    ("2", "float | None", 2.0), (3, "float", 3.0), ([1], "list[float]", [1.0]), ("0.2, 1", "tuple[float, float]",
                                                                                 [0.2, 1]),
])  # fmt: skip
def test_values_take_the_type_of_the_parameter(text, annotation, value):
    found = experiments.conform("p", text, annotation)
    assert found == value and type(found) is type(value)


WRONG = [
    ({"names": ["godo"]}, "did you mean 'good'"),
    ({"names": ["long"], "profile": "paper"}, "it has: smoke"),
    ({"profile": "smokey"}, "did you mean 'smoke'"),
    ({"names": ["good"], "overrides": {"conut": "1"}}, "did you mean 'count'"),
    ({"overrides": {"nope": "1"}}, "no parameter 'nope'"),
    ({"names": ["good"], "overrides": {"output": "x"}}, "runner's own"),
    *(({"names": ["good"], "overrides": dict([pair])}, f"parameter {pair[0]} must be") for pair in [
        ("count", "two"), ("count", "1.5"), ("count", True), ("count", ""), ("on", "1"), ("rate", "fast"),
        ("rate", ".nan"), ("rate", "true"), ("numbers", "[1, x]"), ("numbers", "[1, 2"), ("numbers", "[true]"),
        ("options", "3"), ("name", 3), ("limit", "soon")]),
]  # fmt: skip


@pytest.mark.parametrize("question, answer", WRONG, ids=[str(question) for question, _ in WRONG])
def test_wrong_questions_are_refused_before_anything_runs(question, answer, notebooks, tmp_path):
    with pytest.raises(InputError) as error:
        experiments.reproduce(**question, notebooks=notebooks, results=tmp_path)
    assert answer in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not any(tmp_path.iterdir())


ENTRY = {"artefact": "x", "notebook": "n.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {}}}}


@pytest.mark.parametrize("text, answer", [
    (None, "is missing"), ("a: [1", "not readable YAML"), ("- a", "a mapping"), ("", "a mapping"),
    (yaml.safe_dump({"A b": ENTRY}), "no experiment name"), (yaml.safe_dump({"a": {**ENTRY, "kost": 1}}), "kost"),
    (yaml.safe_dump({"a": {**ENTRY, "notebook": "m.ipynb"}}), "no notebook m.ipynb"),
    (yaml.safe_dump({"a": {**ENTRY, "profiles": {"fast": {}}}}), "unknown profile 'fast'"),
    (yaml.safe_dump({"a": {**ENTRY, "profiles": []}}), "profiles must map"),
    (yaml.safe_dump({"a": {**ENTRY, "profiles": {"smoke": {"cost": "1 s"}}}}), "parameters"),
    (yaml.safe_dump({"a": {**ENTRY, "profiles": {"smoke": {"cost": "1", "parameters": []}}}}), "{} for none"),
])  # fmt: skip
def test_a_malformed_list_is_refused_in_one_line(text, answer, tmp_path):
    write_notebook(tmp_path / "n.ipynb", [])
    if text is not None:
        (tmp_path / "experiments.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        experiments.load_experiments(tmp_path)
    assert answer in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cells": []}'])
def test_a_notebook_that_is_none_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "n.ipynb").write_text(content)
    with pytest.raises(InputError) as error:
        experiments.notebook_parameters(tmp_path / "n.ipynb")
    assert len(str(error.value).splitlines()) == 1


BARE = """import bagssl.errors, inspect, pathlib
inspect.getmodule(inspect.currentframe())  # looks into every module that is loaded
import matplotlib.pyplot as plt
plt.subplots()
from IPython.display import HTML, Markdown
Markdown(filename="nowhere"); display(HTML(""))
if not on: raise bagssl.errors.InputError("on must be on")
if count == 13: 1 / 0
if count == 14: raise bagssl.errors.Stopped("at crop 100")
if count == 15: raise SystemExit(0)
if count == 16: raise bagssl.errors.Stopped("at crop 100", interrupted=True)
import os
pathlib.Path(name).write_text(f"{count} {os.environ.get('BAGSSL_DEADLINE')}")"""


def test_bare_needs_no_jupyter_and_has_the_same_ends(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "bare.ipynb", [BARE])
    entry = {"artefact": "none", "notebook": "bare.ipynb", "profiles": {"smoke": {"cost": "1 s", "parameters": {"count": 7}}}}
    (tmp_path / "notebooks" / "experiments.yaml").write_text(yaml.safe_dump({"bare": entry}))
    for name in ("papermill", "nbclient", "nbformat", "IPython", "ipykernel"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delenv("BAGSSL_DEADLINE", raising=False)

    def bare(time_limit=None, **overrides):
        given = {"name": str(tmp_path / "made"), "on": True, **overrides}
        return experiments.reproduce_bare(["bare"], "smoke", given, time_limit=time_limit, notebooks=tmp_path / "notebooks")

    assert bare() == 0 and (tmp_path / "made").read_text() == "7 None" and sys.modules["IPython"] is None
    assert bare(count=13) == 1
    assert capsys.readouterr().err == "[1/1] bare: failed: bare.ipynb, cell [2]: ZeroDivisionError: division by zero\n"
    for overrides, code, said in (({"on": False}, 2, "InputError: on must be on"), ({"count": 14}, 3, "at crop 100"),
                                  ({"count": 15}, 1, "SystemExit: 0"), ({"time_limit": -1}, 3, "the time is up")):  # fmt: skip
        assert bare(**overrides) == code and said in capsys.readouterr().err
    with pytest.raises(Stopped):
        bare(count=16)  # Ctrl-C
    (tmp_path / "made").unlink()
    entries = {name: {**entry, "profiles": {"smoke": {"cost": "1 s", "parameters": {"count": count}}}}
               for name, count in {"a": 13, "b": 14, "c": 15, "bare": 7}.items()}
    (tmp_path / "notebooks" / "experiments.yaml").write_text(yaml.safe_dump(entries))
    assert experiments.reproduce_bare([], "smoke", {"name": str(tmp_path / "made"), "on": True}, notebooks=tmp_path / "notebooks") == 1
    assert (tmp_path / "made").read_text() == "7 None", "what fails or leaves takes no other with it"
    monkeypatch.setenv("BAGSSL_DEADLINE", "")  # to be put back as it was
    assert bare(time_limit=100) == 0 and float((tmp_path / "made").read_text().split()[1]) > time.time()


CHECK = "from bagssl import experiments\nfound = experiments.check_parameters(globals())"
USE = "print(sorted(found.items())); print(type(on), numbers, rate)"


@pytest.fixture(scope="module")
def checking(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a folder, with é")
    write_notebook(folder / "check.ipynb", [CHECK, USE])
    experiments.normalise_notebook(folder / "check.ipynb")  # it then names its kernel
    (folder / "some.yaml").write_text("rate: 1e-3\nnumbers: [2]\n")
    return folder / "check.ipynb"


def by_papermill(notebook: Path, folder: Path, *words: str) -> tuple[int, nbformat.NotebookNode]:
    """Plain papermill, called from elsewhere, into another folder."""
    target = folder / "out put.ipynb"
    words = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(target), *words]
    process = subprocess.run(words, check=False, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return process.returncode, nbformat.read(target, as_version=4)


def test_plain_papermill_gives_each_parameter_its_type(checking, tmp_path):
    code, made = by_papermill(checking, tmp_path, "-p", "on", "true", "-p", "numbers", "2,3", "-y", "{rate: 1e-3, options: {lr: 1e-3}}",
                              "--cwd", str(tmp_path))  # fmt: skip
    said = made.cells[-1].outputs[0].text
    assert code == 0 and "<class 'bool'> [2, 3] 0.001" in said and "('options', {'lr': 0.001})" in said and "('count', 2)" in said
    code, made = by_papermill(checking, tmp_path, "-f", str(checking.parent / "some.yaml"))
    assert code == 0 and "[2] 0.001" in made.cells[-1].outputs[0].text


@pytest.mark.parametrize("words, answer", [
    (("-p", "count", "many"), "InputError: parameter count must be int, not 'many'"),
    (("-p", "rates", "0.5"), "InputError: there is no parameter 'rates'; did you mean 'rate'?")])  # fmt: skip
def test_plain_papermill_refuses_in_the_first_cell_in_one_line(checking, tmp_path, words, answer):
    code, made = by_papermill(checking, tmp_path, *words)
    (error,) = [output for cell in made.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert code and error.traceback == [answer]
    assert [cell.execution_count for cell in made.cells if cell.cell_type == "code" and cell.source == USE] == [None]


def test_every_notebook_checks_its_parameters_first():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert code[0].metadata.tags == ["parameters"] and "experiments.check_parameters(globals())" in code[1].source, path.name
        assert code[-1].source.startswith("figures.Table(comparison.provenance(") and code[-1].source.endswith(", parameters))")
