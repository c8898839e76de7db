"""Parameters of notebooks take their types, by the batch and by plain papermill, or are refused in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_experiments import PARAMETERS, write_notebook

from bagssl.batch.notebook import normalise_notebook
from bagssl.errors import InputError
from bagssl.parameters import check_parameters, conform, notebook_parameters, read_yaml

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("text, annotation, value", [
    ("{tcr: {learning_rate: 1e-3, options: {a: 2}}}", "dict", {"tcr": {"learning_rate": 1e-3, "options": {"a": 2}}}),
    ("4", "int", 4), ("1", "float", 1.0), ("1e-3", "float", 1e-3), ("true", "bool", True), ("no", "str", "no"),
    ("[1, 4]", "list[int]", [1, 4]), ("1,4", "list[int]", [1, 4]), ("3", "list[int]", [3]),
    ("tcr,simclr", "list[str]", ["tcr", "simclr"]), ("{a: 1}", "dict", {"a": 1}), ("null", "float | None", None),
    ("2", "float | None", 2.0), (3, "float", 3.0), ([1], "list[float]", [1.0]), ("0.2, 1", "tuple[float, float]",
                                                                                 [0.2, 1]),
])  # fmt: skip
def test_values_take_the_type_of_the_parameter(text, annotation, value):
    found = conform("p", text, annotation)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cells": []}'])
def test_a_notebook_that_is_none_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "n.ipynb").write_text(content)
    with pytest.raises(InputError) as error:
        notebook_parameters(tmp_path / "n.ipynb")
    assert len(str(error.value).splitlines()) == 1


CHECK = "from bagssl.parameters import check_parameters\nfound = check_parameters(globals())"


USE = "print(sorted(found.items())); print(type(on), numbers, rate)"


@pytest.fixture(scope="module")
def checking(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a folder, with é")
    write_notebook(folder / "check.ipynb", [CHECK, USE])
    normalise_notebook(folder / "check.ipynb")  # it then names its kernel
    (folder / "some.yaml").write_text("rate: 1e-3\nnumbers: [2]\n")
    return folder / "check.ipynb"


def by_papermill(notebook: Path, folder: Path, *words: str) -> tuple[int, nbformat.NotebookNode]:
    """Plain papermill, called from elsewhere, into another folder."""
    target = folder / "out put.ipynb"
    words = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(target), *words]
    process = subprocess.run(words, check=False, cwd=folder, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    return process.returncode, nbformat.read(target, as_version=4)


def test_plain_papermill_gives_each_parameter_its_type(checking, tmp_path):
    code, executed = by_papermill(checking, tmp_path, "-p", "on", "true", "-p", "numbers", "2,3",
                                  "-y", "{rate: 1e-3, options: {lr: 1e-3}}", "--cwd", str(tmp_path))  # fmt: skip
    said = executed.cells[-1].outputs[0].text
    assert code == 0 and "<class 'bool'> [2, 3] 0.001" in said
    assert "('options', {'lr': 0.001})" in said and "('count', 2)" in said
    code, executed = by_papermill(checking, tmp_path, "-f", str(checking.parent / "some.yaml"))
    assert code == 0 and "[2] 0.001" in executed.cells[-1].outputs[0].text


@pytest.mark.parametrize("words, answer", [
    (("-p", "count", "many"), "InputError: parameter count must be int, not 'many'"),
    (("-p", "rates", "0.5"), "InputError: there is no parameter 'rates'; did you mean 'rate'?")])  # fmt: skip
def test_plain_papermill_refuses_in_the_first_cell_in_one_line(checking, tmp_path, words, answer):
    code, executed = by_papermill(checking, tmp_path, *words)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    (error,) = [output for output in outputs if output.output_type == "error"]
    assert code and error.traceback == [answer]
    assert [cell.execution_count for cell in executed.cells if cell.source == USE] == [None]


@given(st.from_regex(r"[-+]?[0-9_.:xobeE]{1,6}", fullmatch=True))
def test_a_number_is_decimal_or_refused(text):
    """YAML 1.1 reads 010 as 8, 1:30 as 90, 0x10 as 16, 1_000 as 1000: never another number than the text says."""
    for kind, pattern in ((int, r"[-+]?[0-9]+"), (float, r"[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)([eE][-+]?[0-9]+)?")):
        try:
            found = conform("p", text, kind.__name__), conform("p", f"{text},{text}", f"list[{kind.__name__}]")
        except InputError:
            assert not re.fullmatch(pattern, text) or float(text) == float("inf")
        else:
            assert re.fullmatch(pattern, text) and found == (kind(text), [kind(text)] * 2)


@pytest.mark.parametrize("text", ["010", "012", "1:30", "0x10", "0b11", "1_000", "190:20:30", "no", "on", "2020-01-01"])
def test_yaml_1_1_would_read_it_otherwise(text):
    """Negative control: what the list of experiments and the parameters were read by."""
    assert read_yaml(text) != yaml.safe_load(text)
    assert read_yaml(text) == (int(text, 10) if text.isdigit() else text)


@pytest.mark.parametrize("value, annotation", [(0, "list[int]"), ("0", "list[int]"), (0.5, "list[float]"),
                                               ("tcr", "list[str]"), (3, "tuple[int, ...]")])  # fmt: skip
def test_a_single_value_passes_for_a_list_of_one(value, annotation):
    (found,) = conform("p", value, annotation)
    assert str(found) == str(value)
    for wrong in (None, {}, True):
        with pytest.raises(InputError):
            conform("p", wrong, annotation)


def checked(*cells, **values):
    """What a notebook makes of its parameters after cells were executed; no Python's annotations are asked."""
    return check_parameters({"name": "x", "numbers": [1, 4], "rate": 0.5, "count": 2, "on": False, "options": {},
                             "limit": None, "output": "", **values, "In": ["", PARAMETERS, *cells]})  # fmt: skip


def test_annotations_are_read_from_the_text_of_the_cell():
    assert checked(CHECK, numbers="2,3", count="010", rate="1e-3")["numbers"] == [2, 3]
    assert checked(CHECK, count="010")["count"] == 10
    with pytest.raises(InputError, match="count must be int"):
        checked(CHECK, count="many")
    assert checked("x: int = 3\nprint(x)", "%matplotlib inline", CHECK).keys() == checked(CHECK).keys()


def test_the_last_injected_cell_counts_and_none_of_the_readers_own():
    wrong, right, own = (f"# Parameters\n{name} = 3\n" for name in ("cuont", "count", "colour"))
    with pytest.raises(InputError, match="no parameter 'cuont'; did you mean 'count'"):
        checked(wrong, CHECK)
    assert checked(wrong, CHECK, right, CHECK)
    assert checked(CHECK, "print(1)", own, CHECK)
    assert checked("# Parameters\ncolour = plot.colour\n", CHECK)  # not papermill's: it passes literals
    assert checked("# Parameters\nPAPERMILL_INPUT_PATH = 'a.ipynb'\ncount = 3\n", CHECK)


def test_papermills_own_names_pass(checking, tmp_path):
    code, executed = by_papermill(checking, tmp_path, "--inject-paths", "-p", "numbers", "7")
    assert code == 0 and "[7] 0.5" in executed.cells[-1].outputs[0].text
