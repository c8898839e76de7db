"""The gallery: results/index.html, one page that needs no server and no network, made from what results/ holds; and
results/curves.html, beside it, with the curves of every run of the record and the store.

What it says comes from the ledger, the tables and figures, and the executed notebooks: title, claim, captions and
reading, which these name by the tags of their cells.
"""

import base64
import contextlib
import functools
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from html import unescape
from pathlib import Path
from typing import Any

import jinja2
import latex2mathml.converter
import mistune
import pandas as pd
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from bagssl import curves, online, overview
from bagssl.batch.experiments import PROFILES
from bagssl.errors import InputError
from bagssl.parameters import notebook_cells
from bagssl.paths import cores, home, results_root, runs_root, write_text
from bagssl.records import FOREIGN
from bagssl.runs import Run, known, known_history, lines, list_runs, read_json
from bagssl.study import claims, tables

WIDTH = 1200  # pixels of an embedded figure at most: two per pixel of the column on a screen
POINTS = 100  # of a curve at most, about: a run then takes a few kB
ARM = {"objective", "training", "k", "probe", "feature"}


def write_report(results: Path | None = None) -> Path:
    """Write the ledger of each profile that has results, and the two pages; the path of the first.

    Raises InputError when there are no results, and for evidence or figures that cannot be read.
    """
    root = Path(results or results_root())
    folders = {name: found for name in PROFILES if (found := claims.experiment_folders(root, name))}
    everything = [folder for found in folders.values() for folder in found]
    with ProcessPoolExecutor(cores()) as pool:  # each takes a second or two
        experiments = dict(zip(everything, pool.map(_experiment, everything), strict=True))
    profiles = [_profile(root, name, [experiments[folder] for folder in found]) for name, found in folders.items()]
    if not profiles:
        raise InputError(f"there are no results in {root}; `bagssl reproduce` makes them")
    verdicts = (claims.HOLDS, claims.FAILS, claims.UNDECIDED, claims.MISSING)
    page = tables.render("report.html.j2", Path(__file__).parent, profiles=profiles, verdicts=verdicts,
                          links=_links(root), paper=tables.paper_values().to_dict("records"))  # fmt: skip
    drawn = tables.render("curves.html.j2", Path(__file__).parent, places=_places(root, list(folders)))
    for name, text in (("curves.html", drawn), ("index.html", page)):
        write_text(root / name, text)
    return root / "index.html"


def _links(root: Path) -> dict[str, str]:
    """Of the pages beside this one those that are there: words -> path from `root`."""
    docs = home() / "build" / "docs" / "index.html"
    pages = {"what we learnt": root / "README.md", "the notebooks and the code": docs}
    return {words: os.path.relpath(path, root) for words, path in pages.items() if path.exists()}


def _profile(root: Path, name: str, experiments: list[dict[str, Any]]) -> dict[str, Any]:
    ledger, evidence = claims.write_ledger(root, name), claims.collect(root, name)
    cards = []
    for claim, entries in ledger.groupby("claim", sort=False):
        datasets = []
        for entry in entries.to_dict("records"):
            own = claims.of(entry, evidence[evidence["claim"] == claim])
            rows = claims.judged(claim, own) if len(own) else own
            shown: dict[str, list] = {}  # rule -> what it decides on, worst first
            for row in rows.to_dict("records"):
                shown.setdefault(row["rule"], []).append({**row, "text": claims.text(row)})
            about = claims.subject(entry)
            datasets.append({**entry, "subject": about, "slug": _slug(about), "notes": claims.CLAIMS[claim].notes,
                             "experiment": entry["table"].split("/")[0], "rows": shown,
                             "strip": claims.strip(claim, entry, rows)})  # fmt: skip
        order = (claims.FAILS, claims.UNDECIDED, claims.HOLDS, claims.MISSING)
        cards.append({"claim": claim, "statement": entries["statement"].iloc[0], "datasets": datasets,
                      "verdict": min(entries["verdict"], key=order.index)})  # fmt: skip
    decided = {(row["claim"], claims.subject(row)): row["verdict"] for row in ledger.to_dict("records")}
    subjects = dict.fromkeys(subject for _, subject in decided)
    glance = [{"subject": subject, "slug": _slug(subject), "verdicts": [decided.get((card["claim"], subject))
                                                                       for card in cards]} for subject in subjects]
    for each in experiments:
        own = evidence[evidence["experiment"] == each["name"]]
        pairs = dict.fromkeys((row["claim"], claims.subject(row)) for row in own.to_dict("records"))
        each["decides"] = [(*pair, decided[pair]) for pair in pairs]
        each["badges"] = list(dict.fromkeys((claim, verdict) for claim, _, verdict in each["decides"]))
    experiments.sort(key=lambda each: (each["notebook"], each["name"]))
    hardware = sorted({each["hardware"] for each in experiments})
    groups: dict[str, list] = {}  # by what they are about
    for each in experiments:
        groups.setdefault(each["subject"], []).append(each)
    return {"name": name, "claims": cards, "glance": glance, "experiments": experiments, "hardware": hardware,
            "groups": dict(sorted(groups.items())), "models": _models(root / name / "runs")}  # fmt: skip


def _slug(subject: str) -> str:
    """Of the name of a place on the page."""
    return re.sub(r"\W+", "-", subject)


def _models(folder: Path) -> list[dict[str, str]]:
    """The models of a record, as `bagssl runs list` has them."""
    names = ("name", "state", "crops", "seconds", "machine", "weights", "accuracy")
    return [dict(zip(names, overview.row(run), strict=True)) for run in list_runs(folder) if run.finished]


# ---- the curves of runs


def _places(root: Path, profiles: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each record and of the store, but for those that a record shows, that have curves."""
    found, shown = {}, set()
    for place, folder in [*((name, root / name / "runs") for name in profiles), ("the store", runs_root())]:
        own = [_curves(run) for run in list_runs(folder) if run.path.name not in shown]
        shown |= {each["name"] for each in own}
        found[place] = [each for each in own if each["curves"]]
    return {place: own for place, own in found.items() if own}


def _curves(run: Run) -> dict[str, Any]:
    """Its loss terms, rate and speed over the crops seen and, where they were measured, what its folder or that of the
    store has of online.csv."""
    history = known_history(run)
    measured = online.read(run) or online.read(Run(runs_root() / run.path.name))
    ways = ("learning_rate", "crops_per_second")
    terms = known(lambda: [name for name in history[-1] if name not in ("step", "epoch", "crops", *ways)], [])
    kinds = {"loss": "term", **dict.fromkeys(online.MEASURES, "measure"), **dict.fromkeys(terms, "term"),
             **dict.fromkeys(ways, "way")}  # fmt: skip
    drawn = []
    for name, kind in kinds.items():
        places = known(lambda name=name: curves.points([*history, *measured], "crops", name), [])
        if svg := curves.curve(curves.thinned(places, POINTS), name, 200, 60):
            heights = [height for _, height in places]
            drawn.append({"name": name.replace("_", " "), "kind": kind, "svg": svg, "last": heights[-1],
                          "low": min(heights), "high": max(heights), "crops": places[-1][0]})  # fmt: skip
    return {"name": run.path.name, "lines": lines(run)[:2], "curves": drawn}


# ---- one experiment


def _experiment(folder: Path) -> dict[str, Any]:
    provenance, notebook = read_json(folder / "provenance.json"), folder / f"{folder.name}.ipynb"
    story, page = _story(notebook), notebook.with_suffix(".html")
    if notebook.exists() and not page.exists():
        write_text(page, notebook_page(notebook))
    dataset = next(iter(provenance.get("data") or {}), "")
    artefact = folder.name.removesuffix(f"-{dataset}")
    shown = [path for path in sorted(folder.glob("tables/*.md")) if not path.stem.startswith("claim_c")]
    images = [_embedded(path) | _about(path, story, ("png", "pdf")) for path in sorted(folder.glob("figures/*.png"))]
    tables = [_table(path, dataset, artefact) | _about(path, story, ("csv", "md", "tex")) for path in shown]
    spoken = {each["caption"] for each in images}
    for each in tables:  # what is said below the figure of the same cell is not said again
        each["caption"] = "" if each["caption"] in spoken else each["caption"]
    for each in (images, tables):
        each.sort(key=lambda item: item["place"])
    lines = [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1))
             for name, value in provenance.items()]  # fmt: skip
    files = {suffix: f"{folder.name}/{folder.name}.{suffix}" for suffix in ("html", "ipynb")
             if (folder / f"{folder.name}.{suffix}").exists()}
    others = [read_json(model / FOREIGN)["name"] for model in claims.models(folder, provenance)
              if (model / FOREIGN).exists() and "-untrained-seed" not in model.name]  # not their random controls
    return {"name": folder.name, "dataset": dataset, "subject": ", ".join([dataset or "synthetic", *others]),
            "notebook": str(provenance.get("notebook", "")), "files": files,
            "provenance": lines, "hardware": claims.hardware(folder), "figures": images, "tables": tables,
            "title": story["title"] or folder.name, "claim": inline(story["claim"]), "says": _html(story["says"])}


def _about(path: Path, story: dict[str, Any], suffixes: tuple[str, ...]) -> dict[str, Any]:
    """Name, place and caption in the notebook, files (suffix -> path from results/<profile>) of a figure or table."""
    paths = {suffix: path.with_suffix(f".{suffix}") for suffix in suffixes}
    files = {suffix: "/".join(each.parts[-3:]) for suffix, each in paths.items() if each.exists()}
    name, captions = f"{path.parent.name}/{path.stem}", [*story["captions"].items(), ("*", "")]
    place, caption = next((i, words) for i, (tag, words) in enumerate(captions) if fnmatchcase(name, tag))
    return {"name": path.stem, "place": place, "caption": inline(caption), "files": files}


def _embedded(path: Path) -> dict[str, Any]:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGBA")
    except OSError as error:
        raise InputError(f"{path} is no readable figure ({' '.join(str(error).split())})") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((WIDTH, 4 * WIDTH), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=85, method=1)
    uri = f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"uri": uri, "width": image.width, "height": image.height}


def _table(path: Path, dataset: str, artefact: str) -> dict[str, Any]:
    """A table as the notebook shows it and, if it holds accuracies, row by row beside the paper."""
    source, csv = path.read_text(encoding="utf-8"), path.with_suffix(".csv")
    frame = pd.read_csv(csv) if csv.exists() else pd.DataFrame()
    beside, known = "", 0
    if "accuracy_mean" in frame and "paper" not in frame and ("setting" in frame or set(frame) >= ARM):
        frame = tables.with_paper(frame, artefact, dataset)
        deviation = frame.get("accuracy_std", pd.Series(float("nan"), frame.index))
        ours = [tables.cell(*each) for each in zip(frame["accuracy_mean"], deviation, strict=True)]
        names = [name for name in frame if name in ARM | {"setting"}]
        known = int(frame["paper"].notna().sum())
        beside = tables.markdown(frame[names].assign(ours=ours, paper=frame["paper"], delta=frame["delta"]))
    return {"html": _html(source), "rows": source.count("\n") - 2, "paper": _html(beside), "known": known}


# ---- the executed notebook, as a page and by what it says


def mathml(formula: str, display: str = "inline") -> str:
    """A LaTeX formula as MathML, which a browser sets without a script; one that cannot be read stays as it is."""
    formula = formula.replace("<", r"\lt ").replace(">", r"\gt ")  # the converter passes tags on
    try:
        return latex2mathml.converter.convert(formula, display=display)
    except Exception:  # noqa: BLE001 - whatever a typing error makes it stumble over
        return f"<code>{mistune.escape(formula)}</code>"


class _Formulas:
    """What mistune's renderers make of a formula."""

    def inline_math(self, text: str) -> str:
        return mathml(text)

    def block_math(self, text: str) -> str:
        return f"<p>{mathml(text, display='block')}</p>"


class _Cells(_Formulas, IPythonRenderer):
    pass


class _Page(HTMLExporter):
    """nbconvert's page of a notebook, without the scripts that it loads: it reads the same without a network."""

    @jinja2.pass_context
    def markdown2html(self, context, source: str) -> str:
        renderer = _Cells(escape=False, attachments=context.get("cell", {}).get("attachments", {}))
        return MarkdownWithMath(renderer=renderer).render(source)


@functools.cache
def _exporter() -> _Page:
    folder = Path(__file__).parent
    return _Page(extra_template_basedirs=[str(folder)], template_file=str(folder / "notebook.html.j2"))


def notebook_page(path: Path) -> str:
    """The HTML of an executed notebook."""
    return _exporter().from_filename(str(path))[0]


def _story(notebook: Path) -> dict[str, Any]:
    """What an executed notebook says of itself by the tags of its cells; empty where it has none.

    `claim`: the title and, in the paragraph below, what it is about. `caption:figures/gain`: the first paragraph is the
    caption of that figure, or of tables/...; * in the name stands for anything. `reading`: what the results say, all
    paragraphs but headings, tables and captions. A markdown cell says its source, a code cell what it displays.
    """
    story: dict[str, Any] = {"title": "", "claim": "", "says": "", "captions": {}}
    for tags, paragraphs in _tagged(notebook):
        if "claim" in tags:
            title, claim, *_ = *paragraphs, ""
            story |= {"title": title.removeprefix("# "), "claim": claim}
        names = [tag.removeprefix("caption:") for tag in tags if tag.startswith("caption:")]
        story["captions"] |= dict.fromkeys(names, paragraphs[0].strip("*: "))
        if "reading" in tags:
            silent = re.compile(r"#.*|\|.*|\*[^*].*\*", re.DOTALL)  # headings, tables, captions in italics
            story["says"] += "".join(f"{text}\n\n" for text in paragraphs if not silent.fullmatch(text))
    return story


def _tagged(notebook: Path) -> Iterator[tuple[list[str], list[str]]]:
    """The tags and the paragraphs of each cell that has both."""
    with contextlib.suppress(InputError, AttributeError, KeyError, TypeError):  # damaged, it says nothing
        for cell in notebook_cells(notebook):
            shown = [output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", ())]
            texts = [cell["source"]] if cell["cell_type"] == "markdown" else shown
            paragraphs = [each.strip() for text in texts for each in "".join(text).split("\n\n") if each.strip()]
            if (tags := cell["metadata"].get("tags")) and paragraphs:
                yield tags, paragraphs


class _Words(_Formulas, mistune.HTMLRenderer):
    """Markdown to HTML that a template may trust: raw HTML is text, but for citations and the bare spans of
    `names.cell`; pictures, which would be loaded, and links that lead from the notebook, not from this page, are their
    words."""

    def text(self, text: str) -> str:
        return mistune.escape(unescape(text))  # of `&#36;` the dollar, as in every other reader

    def inline_html(self, html: str) -> str:
        return html if re.fullmatch(r'</?span>|</cite>|<cite data-cite="\w+">', html) else super().inline_html(html)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, url) if url.startswith("https://") else text

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return text


_html = mistune.create_markdown(renderer=_Words(escape=True), plugins=["table", "math"])


def inline(source: str) -> str:
    """The HTML of a line of Markdown, which a template may trust."""
    return re.sub(r"</?p>", "", _html(source)).strip()
