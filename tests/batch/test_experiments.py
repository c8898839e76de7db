"""The list of experiments: what it may hold, and notebooks and lists for the tests of the batch."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import yaml

from bagssl.batch.experiments import load_experiments
from bagssl.errors import InputError

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
        load_experiments(tmp_path)
    assert answer in str(error.value) and len(str(error.value).splitlines()) == 1
