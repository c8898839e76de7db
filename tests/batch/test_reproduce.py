"""Experiments run whole or leave what was there: every way to end, every wrong question."""

from __future__ import annotations

import itertools
import os
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock
from test_experiments import write_notebook

from bagssl import cli, paths
from bagssl.batch import kernels, reproduce, stages
from bagssl.batch.experiments import load_experiments
from bagssl.errors import InputError, Stopped


def test_fresh_is_not_run_again_and_a_failure_keeps_the_last_good_results(results, notebooks, capsys):
    folder, settings = results / "smoke" / "good", {"notebooks": notebooks, "results": results}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert reproduce.reproduce(["good"], **settings) == 0
    assert "good: fresh" in capsys.readouterr().out
    assert reproduce.reproduce(["good"], overrides={"count": "13"}, **settings) == 1
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and "AssertionError: unlucky" in message and ".good.failed" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_failures_are_named_again_at_the_end_with_their_logs(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels.Kernels, "run", lambda *_: {"ename": "ValueError", "evalue": "no", "cell": 3})
    assert reproduce.reproduce(["good", "left"], notebooks=notebooks, results=tmp_path) == 1
    head, *named = capsys.readouterr().err.splitlines()[-3:]
    assert head == "2 of 2 failed:" and [line.split()[0] for line in named] == ["good:", "left:"]
    assert named[0].endswith("smoke/.good.failed/log.txt")


def test_results_that_make_no_page_are_named_and_leave_the_code_of_the_experiments(
        notebooks, results, monkeypatch, capsys):
    def none(results):
        raise InputError("claim_c2.csv is no table")

    monkeypatch.setattr("bagssl.batch.report.write_report", none)
    settings = {"notebooks": notebooks, "results": results}
    for names, code in ((["good"], 1), (["good", "stopped"], 3), (["good", "refused"], 2)):
        assert reproduce.reproduce(names, time_limit=600, **settings) == code
        assert capsys.readouterr().err.endswith("bagssl: no page of all results: claim_c2.csv is no table\n")


def test_a_record_is_not_replaced_by_one_with_other_parameters_unless_that_is_said(notebooks, tmp_path, capsys):
    settings, record = {"notebooks": notebooks, "results": tmp_path / "ours"}, tmp_path / "ours" / "paper" / "good"
    assert reproduce.reproduce(["good"], "paper", **settings) == 0  # with count = 3
    before = {path: path.read_bytes() for path in record.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"record of other parameters \(count\): give --results FOLDER .* --replace"):
        reproduce.reproduce(["good"], "paper", {"count": "4"}, **settings)
    assert {path: path.read_bytes() for path in record.rglob("*") if path.is_file()} == before
    assert reproduce.reproduce(["good"], "paper", {"count": "3"}, **settings) == 0  # the same by another way
    assert reproduce.reproduce(["good"], "paper", {"count": "4"}, notebooks=notebooks, results=tmp_path / "mine") == 0
    assert reproduce.reproduce(["good"], "paper", {"count": "4"}, replace=True, **settings) == 0
    assert stages.read_record(record / "provenance.json")["parameters"] == {"count": 4}
    # what is made again whenever it is wanted is no record
    for count in "34":
        assert reproduce.reproduce(["good"], overrides={"count": count}, **settings) == 0


def test_results_lie_where_the_reader_says_and_models_in_the_store(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(reproduce, "reproduce", lambda *_, **settings: seen.update(
        settings, runs=paths.runs_root(), results=paths.results_root()) or 0)
    monkeypatch.setenv("BAGSSL_RUNS", "")
    monkeypatch.setenv("BAGSSL_RESULTS", "")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", "tour", "--results", "mine"]) == 0
    assert seen["results"] == tmp_path / "mine" and seen["runs"] == paths.home() / "results" / "runs"
    assert not seen["replace"]


def test_a_swap_that_was_cut_short_is_mended(tmp_path, notebooks, results):
    good = load_experiments(notebooks)["good"]
    stage = stages.plan(good, "smoke", results=results)
    os.replace(stage.folder, stage.beside("old"))  # killed between the two renames
    assert reproduce.reproduce(["good"], notebooks=notebooks, results=results) == 0
    assert stages.state(stage) == "fresh" and not stage.beside("old").exists()


def test_what_another_process_executes_is_waited_for_with_a_line(notebooks, results, monkeypatch, capsys):
    stage = stages.plan(load_experiments(notebooks)["good"], "smoke", results=results)
    held = FileLock(stage.beside("lock"), thread_local=False)  # released by another thread
    held.acquire()
    waited = kernels.Board.say

    def say(board, text, **options):
        waited(board, text, **options)
        held.release()  # the other one ends as soon as it is waited for

    monkeypatch.setattr(kernels.Board, "say", say)
    assert reproduce.reproduce(["good"], notebooks=notebooks, results=results) == 0
    out = capsys.readouterr().out
    assert "another process executes it: waiting for that" in out and "good: fresh" in out


def test_a_clock_that_is_set_does_not_end_the_batch(tmp_path, notebooks, monkeypatch):
    """Kernels are told their deadline in Unix time, by the clock as it then is."""
    hours, told = itertools.count(0, 36_000), []
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(**{**vars(time), "time": lambda: 1e9 + next(hours)}))

    def run(kernels, notebook, target, parameters, environment):
        told.append(float(environment["BAGSSL_DEADLINE"]))
        return {"ename": "Stopped", "evalue": "at crop 100"}

    monkeypatch.setattr(kernels.Kernels, "run", run)
    assert reproduce.reproduce(["good", "long"], time_limit=600, notebooks=notebooks, results=tmp_path) == 3
    assert len(told) == 2 and all(300 < (deadline - 1e9) % 36_000 <= 600 for deadline in told)


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
        reproduce.reproduce(**question, notebooks=notebooks, results=tmp_path)
    assert answer in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not any(tmp_path.iterdir())


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
    entry = {"artefact": "none", "notebook": "bare.ipynb",
             "profiles": {"smoke": {"cost": "1 s", "parameters": {"count": 7}}}}
    (tmp_path / "notebooks" / "experiments.yaml").write_text(yaml.safe_dump({"bare": entry}))
    for name in ("papermill", "nbclient", "nbformat", "IPython", "ipykernel"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delenv("BAGSSL_DEADLINE", raising=False)

    def bare(time_limit=None, **overrides):
        given = {"name": str(tmp_path / "made"), "on": True, **overrides}
        return reproduce.reproduce_bare(["bare"], "smoke", given, time_limit=time_limit,
                                        notebooks=tmp_path / "notebooks")

    assert bare() == 0 and (tmp_path / "made").read_text() == "7 None" and sys.modules["IPython"] is None
    assert bare(count=13) == 1
    assert capsys.readouterr().err == "[1/1] bare: failed: bare.ipynb, cell [2]: ZeroDivisionError: division by zero\n"
    for overrides, code, said in (
        ({"on": False}, 2, "InputError: on must be on"), ({"count": 14}, 3, "at crop 100"),
        ({"count": 15}, 1, "SystemExit: 0"), ({"time_limit": -1}, 3, "the time is up"),
    ):  # fmt: skip
        assert bare(**overrides) == code and said in capsys.readouterr().err
    with pytest.raises(Stopped):
        bare(count=16)  # Ctrl-C
    (tmp_path / "made").unlink()
    entries = {name: {**entry, "profiles": {"smoke": {"cost": "1 s", "parameters": {"count": count}}}}
               for name, count in {"a": 13, "b": 14, "c": 15, "bare": 7}.items()}
    (tmp_path / "notebooks" / "experiments.yaml").write_text(yaml.safe_dump(entries))
    given = {"name": str(tmp_path / "made"), "on": True}
    assert reproduce.reproduce_bare([], "smoke", given, notebooks=tmp_path / "notebooks") == 1
    assert (tmp_path / "made").read_text() == "7 None", "what fails or leaves takes no other with it"
    monkeypatch.setenv("BAGSSL_DEADLINE", "")  # to be put back as it was
    assert bare(time_limit=100) == 0 and float((tmp_path / "made").read_text().split()[1]) > time.time()
