"""The committed notebooks as documents: their shape, their captions, and prose that takes no figure from a result."""

import importlib.util
import re
import subprocess
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
    """Decimals, percentages and points in markdown cells, and any figure of three digits that an output shows too."""
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
    entries.pop("order-of-worth")
    assert {path.name for path in PATHS} == {entry["notebook"] for entry in entries.values()}
    assert [path.name[:2] for path in PATHS] == [f"{number:02d}" for number in range(13)]


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
    assert cells[-1].source.startswith("tables.Table(comparison.provenance(")
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code"), "executed, from top to bottom"


SAVES = re.compile(r"\b(save_figure|write_table)\(")
NAMED = re.compile(SAVES.pattern + r'.*?\boutput, f?"([^"]+)"')


def tag_faults(notebook) -> list[str]:
    """What the tags leave open: a figure or table that is saved and has no caption of its name, a caption of none."""
    cells, saved, faults = notebook.cells, [], []
    for source in (cell.source for cell in cells if cell.cell_type == "code"):
        names = [("figures/" if kind == "save_figure" else "tables/") + re.sub(r"\{.*?\}", "*", name)
                 for kind, name in NAMED.findall(source)]
        faults += [f"no name in {source}"] * (len(names) != len(SAVES.findall(source)))
        saved += names
    captions = {}
    for cell in cells:
        displayed = [output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", [])]
        words = cell.source if cell.cell_type == "markdown" else "".join(displayed)
        captions |= {tag.removeprefix("caption:"): words.strip() for tag in tags_of(cell) if tag.startswith("caption:")}
    faults += [f"no caption of {name}" for name in saved if name not in captions]
    faults += [f"a caption of {name}, which is not saved" for name in captions if name not in saved]
    faults += [f"no words on {name}" for name, words in captions.items() if not words or words[0] in "#|"]
    claims = [number for number, cell in enumerate(cells) if "claim" in tags_of(cell)]
    faults += ["not one claim, in the first cell"] * (claims != [0])
    return faults + ["no reading"] * (not any("reading" in tags_of(cell) for cell in cells))


def tags_of(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def test_every_figure_and_table_has_a_caption_that_names_it(notebook):
    assert tag_faults(notebook) == []


@pytest.mark.parametrize(("number", "tags", "source", "fault"), [
    (0, [], None, "not one claim, in the first cell"), (3, ["claim"], None, "not one claim, in the first cell"),
    (1, [], "figures.save_figure(figure, output, name)", "no name in "), (3, [], None, "no reading"),
    (1, [], 'figures.save_figure(figure, output, f"{name}_curve")', "no caption of figures/*_curve"),
    (2, [], None, "no caption of figures/curve"), (2, ["caption:figures/curves"], None, "no caption of figures/curve"),
    (2, ["caption:figures/curve", "caption:tables/curve"], None, "a caption of tables/curve, which is not saved"),
    (2, ["caption:figures/curve"], "## A heading", "no words on figures/curve"),
])  # fmt: skip
def test_a_figure_without_a_caption_is_found(number, tags, source, fault):
    new, tagged = nbformat.v4, lambda *tags: {"tags": list(tags)}
    cells = [new.new_markdown_cell("# A title", metadata=tagged("claim")),
             new.new_code_cell('figures.save_figure(figure, output, "curve")', metadata=tagged()),
             new.new_markdown_cell("*A curve.*", metadata=tagged("caption:figures/curve")),
             new.new_markdown_cell("It rises.", metadata=tagged("reading"))]
    assert tag_faults(new.new_notebook(cells=cells)) == []
    cells[number].metadata.tags, cells[number].source = tags, source or cells[number].source
    assert any(found.startswith(fault) for found in tag_faults(new.new_notebook(cells=cells)))


def test_every_notebook_checks_its_parameters_first(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.metadata.get("tags") for cell in code[:2]] == [["install"], ["parameters"]]
    assert "check_parameters(globals())" in code[2].source
    assert code[-1].source.startswith("tables.Table(comparison.provenance(")
    assert re.search(r", parameters(,\s+opened=True)?\)\)$", code[-1].source)


def test_every_notebook_begins_with_what_installs_the_package_where_it_is_missing(notebook, monkeypatch, capsys):
    cell = notebook.cells[1]
    assert cell.metadata.tags == ["install"] and not cell.outputs
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append((command[1:], check)))
    exec(cell.source, {})  # noqa: S102 - the notebook's own cell
    assert asked == [] and capsys.readouterr().out == ""  # it is here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(cell.source, {})  # noqa: S102
    assert asked == [(["-m", "pip", "install", "--quiet", ".."], True)]
    assert capsys.readouterr().out == "installing bagssl, and what it needs\n"
