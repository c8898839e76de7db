"""The committed notebooks as documents: their shape, their captions, and prose that takes no figure from a result."""

import itertools
import re
from pathlib import Path

import nbformat
import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))

# What a sentence may say: the level of an interval, the ledger's margin of claims C2, C3 and C7, an arXiv number.
ALLOWED = re.compile(r"95 % (?:bootstrap |jackknife )?interval|2 points below|arXiv \d{4}\.\d{5}")
NO_PROSE = re.compile(r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)", re.DOTALL)
TYPED = re.compile(r"[-+−]?\d*\.\d+(?:e[-+]?\d+)?|\d+e-\d+|\d+(?: ?%| per cent| points?\b)")


def prose(cell) -> str:
    return ALLOWED.sub(" ", NO_PROSE.sub(" ", cell.source))


def typed_figures(notebook) -> list[str]:
    """Decimals, percentages and points in markdown cells, and any figure of three digits that an output shows as well."""
    words = [prose(cell) for cell in notebook.cells if cell.cell_type == "markdown"]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = " ".join(output.get("data", {}).get("text/markdown", output.get("text", "")) for output in outputs)
    results = {number.replace(",", "") for number in re.findall(r"\d[\d,]*\.?\d*", shown)}
    typed = [found for text in words for found in TYPED.findall(text)]
    plain = [number for text in words for number in re.findall(r"(?<![\w.])\d{3,}(?![\w.])", text.replace(",", ""))]
    years = re.compile(r"(?:19|20)\d\d")
    return typed + [number for number in plain if number in results and not years.fullmatch(number)]


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_every_notebook_of_the_list_is_here_and_no_other():
    entries = yaml.safe_load((FOLDER / "experiments.yaml").read_text())
    assert {path.name for path in PATHS} == {entry["notebook"] for entry in entries.values()}
    assert [path.name[:2] for path in PATHS] == [f"{number:02d}" for number in range(10)]


def test_prose_holds_no_typed_figure(notebook):
    assert typed_figures(notebook) == []


@pytest.mark.parametrize(("sentence", "found"), [
    ("The bag gains 4.2 and no more.", ["4.2"]), ("It is right for 67 % of them.", ["67 %"]),
    ("Two points, or 3 points.", ["3 points"]), ("Over 1250 quilts.", ["1250"]), ("A gap of 6e-10.", ["6e-10"]),
    ("Its 95 % interval, `lr=0.1`, $x = 0.5$, 16 patches, Tong et al. 2023.", []),
])  # fmt: skip
def test_a_typed_figure_is_found(sentence, found):
    output = nbformat.v4.new_output("stream", text="1,250 of 2023")
    cells = [nbformat.v4.new_markdown_cell(sentence), nbformat.v4.new_code_cell("1", outputs=[output])]
    assert typed_figures(nbformat.v4.new_notebook(cells=cells)) == found


def test_every_notebook_has_the_shape_of_the_house(notebook):
    cells = notebook.cells
    text = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert cells[0].source.startswith("# ") and "*Cost:*" in cells[0].source and "*Paper artefact:*" in cells[0].source
    assert [cell.metadata.get("tags") for cell in cells].count(["parameters"]) == 1
    assert sum("## What it says" in source for source in text) == 1
    assert cells[-1].source.startswith("figures.Table(comparison.provenance(")
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code"), "executed, from top to bottom"


def test_every_figure_has_a_caption(notebook):
    cells = notebook.cells
    drawn = [index for index, cell in enumerate(cells) if cell.cell_type == "code" and "save_figure(" in cell.source]
    assert drawn
    for index in drawn:
        after = itertools.takewhile(lambda cell: "save_figure(" not in cell.source, cells[index + 1 :])
        caption = re.compile(r"\A\*[^*]|Markdown\(f?\"\*[^*]")
        assert any(caption.search(cell.source) for cell in after), cells[index].source


def test_every_notebook_checks_its_parameters_first(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["parameters"] and "check_parameters(globals())" in code[1].source
    assert code[-1].source.startswith("figures.Table(comparison.provenance(")
    assert code[-1].source.endswith(", parameters))")
