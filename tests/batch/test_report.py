"""The page needs no other file and no network, shows each experiment, and trusts nothing it is given."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pandas as pd
import pytest
import torch
from PIL import Image
from test_claims import GOOD
from test_experiments import write_list, write_notebook

from bagssl import cli, curves, data, records
from bagssl.batch import kernels, report
from bagssl.batch.reproduce import reproduce
from bagssl.config import PretrainConfig
from bagssl.errors import InputError, Stopped
from bagssl.pretraining import pretrain
from bagssl.study import claims, tables

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'
NAME = "<img src=x onerror=alert(3)> & #1"
STORY = [  # tags, source, and what a code cell displays
    (["claim"], f"# A title {HOSTILE}\n\nThe claim {HOSTILE} in a sentence.\n\nAnother paragraph."),
    ([], 'figures.save_figure(figure, output, "curve")', ""),
    (["caption:figures/cur*"], "*What to see: [here](javascript:alert(4)) ![there](https://example.org/x.png).*\n\nMore."),
    ([], 'tables.write_table(table, output, "accuracy")', "| a |\n| - |\n| 1 |\n"),
    (["nbval-ignore-output", "caption:tables/accuracy", "caption:tables/other"], "Markdown(words)", "*In per cent.*"),
    (["caption:tables/rule", "reading"], "*A caption, too.*\n\n## What it says\n\n*By* a rule."),
    (["reading"], "Markdown(reading)", f"- one: **+3.0 points**\n- two {HOSTILE}\n\n| a |\n| - |\n| 1 |"),
    ([], "## Provenance"),
    ([], "provenance", "not of the reading"),
]


def story(cells=STORY) -> str:
    written = []
    for tags, source, *outputs in cells:
        data = [{"output_type": "display_data", "data": {"text/markdown": text}} for text in outputs]
        kind = {"cell_type": "code", "outputs": data} if data else {"cell_type": "markdown"}
        written.append({"source": source, "metadata": {"tags": tags} if tags else {}} | kind)
    return json.dumps({"cells": written})


def accuracies() -> pd.DataFrame:
    arm = {"objective": "tcr", "training": "patch-based", "k": 16, "probe": "linear", "feature": "h"}
    return pd.DataFrame([{**arm, "accuracy_mean": 61.0, "accuracy_std": 0.5, "seeds": 2},
                         {**arm, "objective": HOSTILE, "accuracy_mean": 52.0, "accuracy_std": 0.5, "seeds": 2}])


def write_experiment(results: Path, profile: str, name: str, dataset: str = "cifar10") -> Path:
    folder = results / profile / name
    good = [{**GOOD, "measure": each.measure, "dataset": dataset, "setting": HOSTILE}
            for each in claims.CLAIMS["C2"].conditions]
    claims.write_evidence(folder, "C2", pd.DataFrame(good))
    tables.write_table(accuracies(), folder, "accuracy")
    (folder / "figures").mkdir()
    Image.new("RGB", (1400, 700), "red").save(folder / "figures/curve.png")
    (folder / f"{name}.ipynb").write_text(story())
    (folder / f"{name}.html").write_text("<p>executed</p>")
    provenance = {"experiment": name, "notebook": "02.ipynb", "data": {dataset: "0123"}, "commit": HOSTILE,
                  "parameters": {"name": HOSTILE}, "hardware": {"processor": HOSTILE, "cores": 2, "gpu": None}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.inside = "", ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


def faults(source: str, root: Path) -> list[str]:
    """What would make the page load something, run something foreign, or lead nowhere."""
    page, found = Page(source), []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    for tag, attributes in page.tags:
        if tag in ("link", "iframe", "object", "embed", "base", "form", "video", "audio", "source"):
            found.append(f"a {tag}")
        found += [f"{tag} with {name}" for name in attributes if name.startswith("on") or name in ("srcset", "style")]
        if "src" in attributes and not (tag == "img" and attributes["src"].startswith("data:image/")):
            found.append(f"{tag} from {attributes['src']}")
        target = unquote(attributes.get("href") or "")
        if target.startswith("#"):
            found += [] if target[1:] in ids else [f"no {target}"]
        elif "href" in attributes and not target.startswith("https://arxiv.org/") and not (root / target).is_file():
            found.append(f"no file {target}")
    scripts = sum(tag == "script" for tag, _ in page.tags)
    styles = source.partition("<style>")[2].partition("</style>")[0]
    found += [f"{scripts} scripts"] * (scripts != 1)
    found += ["a style that loads"] * ("url(" in styles or "@import" in styles)
    return found + ["an id twice"] * (len(set(ids)) < len(ids))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for profile, name in (("smoke", "plain"), ("smoke", NAME), ("laptop", "plain-cifar10")):
        write_experiment(root, profile, name)
    (root / "laptop" / ".plain.partial").mkdir()
    (root / "by-hand" / "plain").mkdir(parents=True)
    assert report.write_report(root) == root / "index.html"
    return root


@pytest.fixture(scope="module")
def source(results) -> str:
    return (results / "index.html").read_text(encoding="utf-8")


def test_the_page_stands_alone_and_escapes_what_it_shows(results, source):
    assert faults(source, results) == []
    assert "default-src 'none'" in source
    page = Page(source)
    assert page.text.count(HOSTILE) >= 3 * 5  # title, claim, reading, evidence, provenance of three experiments
    assert NAME in page.text and HOSTILE not in source


@pytest.mark.parametrize(("added", "fault"), [
    ('<img src="https://example.org/x.png">', "img from"), ("<script>alert(1)</script>", "2 scripts"),
    ('<script src="http://example.org/x.js"></script>', "script from"),
    ('<link rel="stylesheet" href="x.css">', "a link"),
    ('<p onclick="alert(1)">', "p with onclick"), ('<a href="#nowhere">', "no #nowhere"),
    ('<a href="smoke/gone.html">', "no file smoke/gone.html"), ('<a href="javascript:alert(1)">', "no file javascript"),
    ('<p id="smoke">', "an id twice"),
])  # fmt: skip
def test_a_page_that_does_not_would_be_found(added, fault, results, source):
    assert any(fault in found for found in faults(source.replace("</main>", f"{added}</main>"), results))
    loads = source.replace("</style>", "p { background: url(https://example.org/x.png) }</style>")
    assert faults(loads, results) == ["a style that loads"]


def test_each_profile_experiment_and_claim_has_its_place(results, source):
    ids = {attributes.get("id") for _, attributes in Page(source).tags}
    assert {"smoke", "laptop", "smoke/plain", f"smoke/{NAME}", "laptop/plain-cifar10"} <= ids
    assert {f"{profile}/{claim}" for profile in ("smoke", "laptop") for claim in claims.CLAIMS} <= ids
    assert not any("partial" in str(each) or "by-hand" in str(each) for each in ids)
    for profile in ("smoke", "laptop"):
        ledger = pd.read_csv(results / profile / "claims.csv", keep_default_na=False)
        assert ledger["verdict"].value_counts().to_dict() == {claims.MISSING: 6, claims.HOLDS: 1}
    assert "+3.0 points (2.0 to 4.0)" in Page(source).text


def test_a_number_is_two_clicks_away(results, source):
    """The profile, then the verdict in the table of subjects and claims: it leads to the place where the number is."""
    tags = Page(source).tags
    links = {unquote(attributes["href"][1:]) for name, attributes in tags if name == "a" and attributes.get(
        "href", "").startswith("#")}  # fmt: skip
    assert {"laptop", "laptop/C2/cifar10", "smoke/C2/cifar10"} <= links
    assert {link for link in links if link.count("/") == 2} <= {attributes.get("id") for _, attributes in tags}


def test_the_models_of_a_record_have_a_row_and_a_card(results, tmp_path):
    images = data.load("synthetic", "train").take(torch.arange(0, 3920, 49))
    run = pretrain(PretrainConfig(width=8, size=8, batch_size=16, views=2, epochs=1), images, progress=False)
    shutil.copytree(results, tmp_path / "copy")
    records.keep(run.path, tmp_path / "copy/laptop/runs" / run.path.name, True)
    page = Page(report.write_report(tmp_path / "copy").read_text(encoding="utf-8"))
    assert run.path.name in page.text and "fp32" in page.text and "laptop/models" in {
        attributes.get("id") for _, attributes in page.tags}
    link = f"laptop/runs/{run.path.name}/README.md"
    assert link in {unquote(attributes.get("href", "")) for _, attributes in page.tags}
    assert (tmp_path / "copy" / link).exists()


def test_every_run_of_the_record_and_the_store_has_its_curves_on_a_page_that_stands_alone(results, tmp_path):
    images = data.load("synthetic", "train").take(torch.arange(0, 3920, 49))
    config = PretrainConfig(width=8, size=8, batch_size=16, views=2, epochs=24)  # 120 rows
    kept = pretrain(config, images, progress=False, online="knn:800")
    alone = pretrain(replace(config, seed=1), images, progress=False)
    pretrain(replace(config, training="untrained"), images, progress=False)
    for _ in range(3):  # a step each
        with pytest.raises(Stopped):
            pretrain(replace(config, seed=2), images, progress=False, time_limit=0)
    shutil.copytree(results, tmp_path / "copy")
    records.keep(kept.path, tmp_path / "copy/laptop/runs" / kept.path.name, True)
    source = (report.write_report(tmp_path / "copy").parent / "curves.html").read_text(encoding="utf-8")
    assert [fault for fault in faults(source, tmp_path / "copy") if fault != "0 scripts"] == []
    blocks = {part.partition('"')[0]: part for part in source.split('<article id="')[1:]}
    stopped = next(name for name in blocks if "seed2" in name)
    assert list(blocks) == [kept.path.name, alone.path.name, stopped]  # the random one has none
    assert source.index(">laptop<") < source.index(kept.path.name) < source.index(">the store<")
    assert "stopped or in training" in blocks[stopped]
    for name, block in blocks.items():
        labels = re.findall(r'aria-label="(.+?)"', block)
        measured = ["knn", "effective_rank"] * (name == kept.path.name)  # it is kept, and was measured in the store
        assert labels == ["loss", *measured, "similarity", "coding_rate", "spread", "learning_rate", "crops_per_second"]
        assert all(2 <= points.count(",") <= 104 for points in re.findall(r'points="([^"]+)"', block))
        assert len(block) < 10_000
    last = kept.history[-1]
    assert f"<b>loss</b> {last['loss']:.4g}," in blocks[kept.path.name]


def test_a_thinned_curve_keeps_its_ends_its_lowest_and_its_highest():
    places = [(float(i), float(i % 10)) for i in range(1000)]
    places[501], places[703] = (501.0, -99.0), (703.0, 99.0)
    thin = curves.thinned(places, 100)
    assert {places[0], places[501], places[703], places[-1]} <= set(thin) and 100 <= len(thin) <= 104
    assert curves.thinned(places[:100], 100) == places[:100]
    with pytest.raises(KeyError):
        curves.points([{"loss": 1.0}], "step", "loss")
    assert curves.points([{"step": 1, "loss": float("nan")}, {"step": 2}], "step", "loss") == []


def test_title_captions_and_reading_come_from_the_tags_of_the_executed_notebook(tmp_path):
    (tmp_path / "one.ipynb").write_text(story())
    found = report._story(tmp_path / "one.ipynb")
    assert found["title"] == f"A title {HOSTILE}" and found["claim"] == f"The claim {HOSTILE} in a sentence."
    captions = found["captions"]
    assert list(captions) == ["figures/cur*", "tables/accuracy", "tables/other", "tables/rule"]
    assert captions["figures/cur*"].startswith("What to see") and captions["figures/cur*"].endswith("x.png).")
    assert captions["tables/accuracy"] == captions["tables/other"] == "In per cent."
    assert found["says"] == f"*By* a rule.\n\n- one: **+3.0 points**\n- two {HOSTILE}\n\n"
    (tmp_path / "one.ipynb").write_text(story([([], *cell[1:]) for cell in STORY]))
    assert not any(report._story(tmp_path / "one.ipynb").values()), "without tags it says nothing"
    for damaged in ("", "{}", "[1]", '{"cells": []}', '{"cells": [{}]}', '{"cells": [1]}'):  # the page does without
        (tmp_path / "one.ipynb").write_text(damaged)
        assert report._story(tmp_path / "one.ipynb")["title"] == ""


def test_words_are_shown_and_pictures_from_elsewhere_are_not():
    shown = report.inline("*a* [b](javascript:alert(1)) ![c](https://example.org/x.png) <b>d</b>")
    assert "<em>a</em>" in shown and "javascript" not in shown and "example.org" not in shown and "&lt;b&gt;" in shown


def test_figures_are_embedded_at_a_reasonable_width(results):
    found = report._embedded(results / "smoke/plain/figures/curve.png")
    assert (found["width"], found["height"]) == (report.WIDTH, report.WIDTH // 2)
    assert found["uri"].startswith("data:image/webp;base64,")


def test_a_verified_figure_of_the_paper_stands_beside_ours(results, monkeypatch):
    path = results / "smoke/plain/tables/accuracy.md"
    assert report._table(path, "cifar10", "plain")["known"] == 0
    known = {"artefact": "plain", "dataset": "cifar10", "setting": "tcr patch-based k=16 linear h", "value": 60}
    monkeypatch.setattr(tables, "paper_values", lambda: pd.DataFrame([known]))
    found = report._table(path, "cifar10", "plain")
    cells = Page(found["paper"]).text.split()
    assert found["known"] == 1 and " ".join(cells).count("61.0 ± 0.5 60 1") == 1
    assert report._table(path, "cifar100", "plain")["known"] == 0


def test_the_page_is_the_same_twice(results, source):
    assert report.write_report(results).read_text(encoding="utf-8") == source


def test_no_results_are_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "results" / "smoke" / ".good.failed").mkdir(parents=True)
    assert cli.main(["report"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "bagssl reproduce" in err
    assert not (tmp_path / "results" / "index.html").exists()


def test_a_figure_that_is_none_is_named(tmp_path):
    folder = write_experiment(tmp_path, "smoke", "plain")
    (folder / "figures/curve.png").write_bytes(b"no figure")
    with pytest.raises(InputError, match=r"curve\.png"):
        report.write_report(tmp_path)
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("error", [{}, {"ename": "ValueError", "evalue": "no"}])
def test_reproduce_refreshes_the_page_when_a_stage_is_fresh(error, tmp_path, monkeypatch, capsys):
    write_notebook(tmp_path / "good.ipynb", ["1"])
    monkeypatch.setattr("test_experiments.NOTEBOOKS", {"good": []})
    write_list(tmp_path)

    def run(kernels, notebook, target, *_):
        target.write_text(story())
        target.with_suffix(".html").write_text("")
        target.with_name("log.txt").write_text("")
        return error

    monkeypatch.setattr(kernels.Kernels, "run", run)
    results = tmp_path / "results"
    assert reproduce(notebooks=tmp_path, results=results) == (1 if error else 0)
    assert (results / "index.html").exists() != bool(error)
    assert ("index.html" in capsys.readouterr().out) != bool(error)


def test_formulas_are_mathml_and_never_markup():
    assert "<msubsup>" in report.mathml(r"z_1^\top") and 'display="block"' in report.mathml("x", "block")
    for formula in (r"\text{<script>alert(1)</script>}", "<script>alert(1)</script>", r"\frac{<img src=x>"):
        assert not {tag for tag, _ in Page(report.mathml(formula)).tags} & {"script", "img"}
    assert report._html("For $x<y$:\n\n$$\n\\frac{a}{b}\n$$\n").count("<math") == 2


def test_the_page_of_a_notebook_loads_nothing_and_sets_its_formulas(tmp_path):
    output = nbformat.v4.new_output("display_data", {"text/markdown": "$x*y*z$"})
    cells = [nbformat.v4.new_markdown_cell("# Title\n\nWith $z_1$, `$not_this$`, and\n\n$$\n\\frac{a}{b}\n$$\n"),
             nbformat.v4.new_code_cell("1", outputs=[output])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    page = Page(report.notebook_page(tmp_path / "a.ipynb"))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [found for _, found in page.tags if {"src", "href"} & set(found) and "https:" in str(found)]
    assert [tag for tag, _ in page.tags].count("math") == 3 and "<mfrac>" in report.notebook_page(tmp_path / "a.ipynb")
    assert "$not_this$" in page.text and "elsewhere" not in page.text
