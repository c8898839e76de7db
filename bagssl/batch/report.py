"""The gallery: results/index.html, one page that needs no server and no network, made from what results/ holds.

What it says comes from the ledger, the tables and figures, and the executed notebooks (title, captions, reading).
"""

from __future__ import annotations

import base64
import io
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jinja2
import latex2mathml.converter
import mistune
import pandas as pd
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from bagssl.batch.experiments import PROFILES
from bagssl.errors import InputError
from bagssl.paths import results_root, write_atomically
from bagssl.runs import read_json
from bagssl.study import claims, figures

WIDTH = 1200  # pixels of an embedded figure at most: two per pixel of the column on a screen
ARM = {"objective", "training", "k", "probe", "feature"}


def write_report(results: Path | None = None) -> Path:
    """Write the ledger of each profile that has results, and the page; the path of the page.

    Raises InputError when there are no results, and for evidence or figures that cannot be read.
    """
    root = Path(results or results_root())
    profiles = [_profile(root, name) for name in PROFILES if claims.experiment_folders(root, name)]
    if not profiles:
        raise InputError(f"there are no results in {root}; `bagssl reproduce` makes them")
    page = figures.render(
        "report.html.j2", Path(__file__).parent, profiles=profiles, verdicts=(claims.HOLDS, claims.FAILS, claims.UNDECIDED, claims.MISSING),
        paper=figures.paper_values().to_dict("records"))  # fmt: skip
    with write_atomically(root / "index.html") as path:
        path.write_text(page, encoding="utf-8")
    return root / "index.html"


def _profile(root: Path, name: str) -> dict[str, Any]:
    ledger, evidence = claims.write_ledger(root, name), claims.collect(root, name)
    cards = []
    for claim, entries in ledger.groupby("claim", sort=False):
        datasets = []
        for entry in entries.to_dict("records"):
            own = evidence[(evidence["claim"] == claim) & (evidence["dataset"] == entry["dataset"])]
            rows = claims.judged(claim, own) if len(own) else own
            shown: dict[str, list] = {}  # rule -> what it decides on, worst first
            for row in rows.to_dict("records"):
                shown.setdefault(row["rule"], []).append({**row, "text": claims.text(row)})
            datasets.append({**entry, "caveat": claims.CLAIMS[claim].caveat, "experiment": entry["table"].split("/")[0], "rows": shown,
                             "strip": claims.strip(claim, entry, rows)})  # fmt: skip
        verdicts = set(entries["verdict"])
        order = (claims.FAILS, claims.UNDECIDED, claims.HOLDS, claims.MISSING)
        cards.append({"claim": claim, "statement": entries["statement"].iloc[0], "datasets": datasets,
                      "verdict": next(each for each in order if each in verdicts)})  # fmt: skip
    found = [_experiment(folder) for folder in claims.experiment_folders(root, name)]
    decided = {(row.claim, row.dataset): row.verdict for row in ledger.itertuples()}
    for each in found:
        own = evidence[evidence["experiment"] == each["name"]]
        pairs = dict.fromkeys(zip(own["claim"], own["dataset"], strict=True))
        each["decides"] = [(*pair, decided[pair]) for pair in pairs]
        each["badges"] = list(dict.fromkeys((claim, verdict) for claim, _, verdict in each["decides"]))
    found.sort(key=lambda each: (each["notebook"], each["name"]))
    return {"name": name, "claims": cards, "experiments": found, "hardware": sorted({e["hardware"] for e in found})}


# ---- one experiment


def _experiment(folder: Path) -> dict[str, Any]:
    made, notebook = read_json(folder / "provenance.json"), folder / f"{folder.name}.ipynb"
    story, page = _story(notebook), notebook.with_suffix(".html")
    if story["title"] and not page.exists():  # pages of committed results are not committed
        with write_atomically(page) as path:
            path.write_text(notebook_page(notebook), encoding="utf-8")
    dataset = next(iter(made.get("data") or {}), "")
    artefact = folder.name.removesuffix(f"-{dataset}")
    pictures = sorted(folder.glob("figures/*.png"))
    shown = [path for path in sorted(folder.glob("tables/*.md")) if not path.stem.startswith("claim_c")]
    images = [{**_embedded(path), **_about(path, story, ("png", "pdf"))} for path in pictures]
    tables = [{**_table(path, dataset, artefact), **_about(path, story, ("csv", "md", "tex"))} for path in shown]
    spoken = {each["caption"] for each in images}
    for each in tables:  # what is said below the figure of the same cell is not said again
        each["caption"] = "" if each["caption"] in spoken else each["caption"]
    for each in (images, tables):
        each.sort(key=lambda item: item["place"])
    lines = [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1))
             for name, value in made.items()]  # fmt: skip
    return {
        "name": folder.name, "dataset": dataset, "notebook": str(made.get("notebook", "")), "provenance": lines,
        "hardware": claims.hardware(folder), "title": story["title"] or folder.name, "figures": images, "tables": tables,
        "claim": _inline(story["claim"]), "says": _html(story["says"]),
        "files": {suffix: f"{folder.name}/{folder.name}.{suffix}" for suffix in ("html", "ipynb")
                  if (folder / f"{folder.name}.{suffix}").exists()},
    }  # fmt: skip


def _about(path: Path, story: dict[str, Any], suffixes: tuple[str, ...]) -> dict[str, Any]:
    """Name, place and caption in the notebook, files (suffix -> path from results/<profile>) of a figure or table."""
    found = {suffix: path.with_suffix(f".{suffix}") for suffix in suffixes}
    files = {suffix: "/".join(each.parts[-3:]) for suffix, each in found.items() if each.exists()}
    captions = [*story["captions"].items(), ("*", "")]
    place, caption = next((i, words) for i, (name, words) in enumerate(captions) if fnmatchcase(f"{path.parent.name}/{path.stem}", name))
    return {"name": path.stem, "place": place, "caption": _inline(caption), "files": files}


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
        frame = figures.with_paper(frame, artefact, dataset)
        deviation = frame.get("accuracy_std", pd.Series(float("nan"), frame.index))
        ours = [figures.cell(*each) for each in zip(frame["accuracy_mean"], deviation, strict=True)]
        names = [name for name in frame if name in ARM | {"setting"}]
        known = int(frame["paper"].notna().sum())
        beside = figures.markdown(frame[names].assign(ours=ours, paper=frame["paper"], delta=frame["delta"]))
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


def notebook_page(path: Path) -> str:
    """The HTML of an executed notebook."""
    here = Path(__file__).parent
    return _Page(extra_template_basedirs=[str(here)], template_file=str(here / "notebook.html.j2")).from_filename(str(path))[0]


def _story(notebook: Path) -> dict[str, Any]:
    """Title, claim, captions and reading of an executed notebook of the project's shape; empty where it has none."""
    found: dict[str, Any] = {"title": "", "claim": "", "says": "", "captions": {}}
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        return found
    before, waiting, saying = "", [], False
    for cell in cells:
        source, texts = "".join(cell["source"]), []
        if cell["cell_type"] == "markdown":
            texts = [source]
        else:
            for kind, name in re.findall(r'(save_figure|write_table)\(.*?\boutput, f?"([^"]+)"', source, re.DOTALL):
                folder = "figures" if kind == "save_figure" else "tables"
                waiting.append(f"{folder}/" + re.sub(r"\{.*?\}", "*", name))  # its caption comes next, or came before
                found["captions"].setdefault(waiting[-1], before)
            texts = ["".join(each["data"]["text/markdown"]) for each in cell.get("outputs", [])
                     if "text/markdown" in each.get("data", {})]  # fmt: skip
        for paragraph in (each.strip() for text in texts for each in text.split("\n\n") if each.strip()):
            if paragraph.startswith("# ") and not found["title"]:
                found["title"] = paragraph.removeprefix("# ")
            elif paragraph.startswith("#"):
                before, waiting, saying = "", [], bool(re.match(r"#+ What it says", paragraph))
            elif re.match(r"\*[^*]", paragraph):
                found["captions"] |= dict.fromkeys(waiting, paragraph.strip("* "))
                waiting = []
            elif not paragraph.startswith("|"):
                found["claim"] = found["claim"] or paragraph
                before = paragraph if cell["cell_type"] == "markdown" else before
                found["says"] += f"{paragraph}\n\n" if saying else ""
    return found


class _Words(_Formulas, mistune.HTMLRenderer):
    """Markdown to HTML that a template may trust: raw HTML is text; pictures, which would be loaded, and links that
    lead from the notebook, not from this page, are their words."""

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, url) if url.startswith("https://") else text

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return text


_html = mistune.create_markdown(renderer=_Words(escape=True), plugins=["table", "math"])


def _inline(source: str) -> str:
    return re.sub(r"</?p>", "", _html(source)).strip()
