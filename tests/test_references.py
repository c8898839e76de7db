"""What is cited is in references.bib, by key or by first author and year; nothing is there that nobody cites."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import bagssl
from bagssl.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
BIB = (ROOT / "notebooks" / "references.bib").read_text(encoding="utf-8")
ENTRIES = {key: dict(re.findall(r"(\w+)\s*=\s*\{(.*)\},?\n", body + "\n"))
           for key, body in re.findall(r"@\w+\{(\w+),\n(.*?)\n\}", BIB + "\n", flags=re.DOTALL)}  # fmt: skip
SAID = re.compile(r"([A-Z]\w+)(?: et al\.?,?| and [A-Z]\w+)? \(?((?:19|20)\d\d)\b")
NAMES = {key: (entry["author"].split(",")[0].split()[-1], entry["year"]) for key, entry in ENTRIES.items()}


def sources() -> dict[str, str]:
    """The docstrings and comments of the package, the text of the notebooks, and README.md."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "bagssl").rglob("*.py")}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path.name] = "\n".join("".join(cell["source"]) for cell in cells)
    return texts | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}


def test_every_entry_has_what_a_reference_needs_once():
    assert len(ENTRIES) == BIB.count("\n@") + BIB.startswith("@") == len(set(ENTRIES))
    for key, entry in ENTRIES.items():
        assert {"title", "author", "year"} <= entry.keys() and {"journal", "booktitle"} & entry.keys(), key
        assert key.startswith(re.sub(r"\W", "", NAMES[key][0]).lower() + entry["year"]), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_where_it_was_proposed(name):
    assert OBJECTIVES[name].reference in ENTRIES
    assert NAMES[OBJECTIVES[name].reference][0].split()[-1] in (OBJECTIVES[name].function.__doc__ or "")


def test_every_work_that_is_named_is_there_and_every_entry_is_named():
    known = {(each.split(",")[0].split()[-1], entry["year"]): key for key, entry in ENTRIES.items()
             for each in entry["author"].split(" and ")}  # fmt: skip
    named = {each.reference for each in OBJECTIVES.values()}
    for name, text in sources().items():
        keys = set(re.findall(r'data-cite="(\w+)"', text))
        assert keys <= ENTRIES.keys(), f"{name} cites {keys - ENTRIES.keys()}"
        said = {each for each in SAID.findall(text) if each[0] not in ("TMLR", "Unix", "Debian")}
        assert said <= known.keys(), f"{name} names {said - known.keys()}, which references.bib lacks"
        named |= keys | {known[each] for each in said}
    assert not ENTRIES.keys() - named, f"nobody cites {ENTRIES.keys() - named}"
    assert SAID.findall("as You et al. 2017, Nobody and Else 2020 and (Efron 1979)") == [
        ("You", "2017"), ("Nobody", "2020"), ("Efron", "1979")]  # fmt: skip


def test_notebooks_cite_by_key_and_so_do_their_pages():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        bare = re.sub(r"<cite .*?</cite>", "", prose)
        assert not re.findall(r"et al|arXiv", bare), path.name


def test_the_software_is_cited_with_its_paper():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper, entry = cff["preferred-citation"], ENTRIES["chen2023bagssl"]
    assert paper["title"] == entry["title"] and str(paper["year"]) == entry["year"]
    authors = [f"{who['family-names']}, {who['given-names']}" for who in paper["authors"]]
    assert authors == entry["author"].split(" and ")
    assert cff["version"] == bagssl.__version__
