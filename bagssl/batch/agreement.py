"""Whether the parts of an experiment's results agree: a table's three forms, its evaluations, the executed notebook.

Each function gives the faults that it finds, none where all agree, and looks at nothing but files. Numbers that were
rounded to be shown agree with any that may have been rounded so.
"""

import base64
import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from bagssl import runs
from bagssl.errors import InputError
from bagssl.parameters import notebook_cells
from bagssl.records import FOREIGN
from bagssl.runs import Run
from bagssl.study import claims, comparison, names, tables

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
DIGITS = 1e-5  # of a number in a .csv, as a share of it, what its six digits leave open
ALIKE, STRETCH = 0.4, 0.05  # least correlation of a figure with itself at another resolution; most change of its form
EMPTY = ("", tables.DASH, "None", "nan")
Rows = list[list[str]]


# ---- reading


def read_csv(path: Path) -> pd.DataFrame:
    """A table; of evidence with its words as words. Raises InputError for a file that is none."""
    words = {"dtype": dict.fromkeys(claims.WORDS, str)} if path.stem.startswith("claim_c") else {"na_values": [""]}
    try:
        return pd.read_csv(path, keep_default_na=False, **words)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table: {' '.join(str(error).split())}") from None


def markdown_rows(text: str) -> tuple[Rows, Rows]:
    """The cells of a table in Markdown, its head first, as plain text; and in their place `bold`, or nothing."""
    cells = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in text.strip().splitlines()]
    cells = [[each.strip() for each in row] for row in cells[:1] + cells[2:]]
    bold = [["bold" * bool(re.fullmatch(r"\*\*.+\*\*", each)) for each in row] for row in cells]
    plain = [[_unmarked(each[2:-2] if mark else each) for each, mark in zip(row, marks, strict=True)]
             for row, marks in zip(cells, bold, strict=True)]  # fmt: skip
    return plain, bold


def _unmarked(cell: str) -> str:
    """What `names.cell` has made a cell of."""
    cell = re.sub(r"\\([^\w\s])", r"\1", cell)
    return re.sub(r"<span>&#(\d+);</span>", lambda found: chr(int(found[1])), cell)


def html_rows(text: str) -> Rows:
    rows = [re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall(r"<tr\b[^>]*>(.*?)</tr>", text, re.DOTALL)]  # fmt: skip
    return [[unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in row] for row in rows]


# ---- a table's three forms


def forms(path: Path) -> dict[str, str]:
    """Suffix -> fault of a table given by its .csv, where one of .csv, .md and .tex says what the other two do not."""
    frame, texts, faults = read_csv(path), {}, {}
    for suffix in ("md", "tex"):
        try:
            texts[suffix] = path.with_suffix(f".{suffix}").read_text(encoding="utf-8")
        except (OSError, ValueError):
            faults[suffix] = "cannot be read" if path.with_suffix(f".{suffix}").exists() else "missing"
    if "md" in faults:
        return faults
    cells, bold = markdown_rows(texts["md"])
    if not cells or not cells[0] or any(len(row) != len(cells[0]) for row in cells):
        return {"md": "no table", **faults}
    of_csv, of_tex = _of_csv(path, frame, cells), "tex" in texts and _as_latex(cells, bold, texts["tex"])
    if of_csv and of_tex == "":  # two against one
        faults["csv"] = f"its .md and .tex say otherwise: {of_csv}"
    elif of_csv:
        faults["md"] = of_csv
    elif of_tex:
        faults["tex"] = of_tex
    return faults


def _as_latex(cells: Rows, bold: Rows, text: str) -> str:
    rows = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r" \\")]
    expected = [" & ".join(rf"\textbf{{{names.tex(cell)}}}" if mark else names.tex(cell)
                           for cell, mark in zip(row, marks, strict=True))
                for row, marks in zip(cells, bold, strict=True)]  # fmt: skip
    return _first_difference(rows, expected, "its .md")


def _first_difference(found: Sequence[Any], expected: Sequence[Any], where: str) -> str:
    if len(found) != len(expected):
        return f"{len(found) - 1} rows, in {where} {len(expected) - 1}"
    return next((f"{one!r}, in {where} {other!r}" for one, other in zip(found, expected, strict=True) if one != other),
                "")  # fmt: skip


def _of_csv(path: Path, frame: pd.DataFrame, cells: Rows) -> str:
    """What a table in Markdown has otherwise than the .csv, of which it may show a part or a rearrangement."""
    head, *rows = cells
    if path.stem.startswith("claim_c"):
        return _as_evidence(frame, cells)
    if head == list(frame):
        truth = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))[1:]
        if len(rows) != len(truth):
            return f"{len(rows)} rows, in its .csv {len(truth)}"
        wrong = ((cell, true) for row, trues in zip(rows, truth, strict=True)
                 for cell, true in zip(row, trues, strict=True) if not _shows(cell, true))  # fmt: skip
        return next((f"{cell!r}, in its .csv {true!r}" for cell, true in wrong), "")
    if head[:3] == ["probe", "objective", "training"] and {*comparison.COLUMNS} <= {*frame}:
        return _as_comparison(frame, cells)
    numbers = [float(value) for value in frame.select_dtypes("number").to_numpy().ravel() if not math.isnan(value)]
    shown = [(cell, token) for row in rows for cell in row for token in NUMBER.findall(cell)
             if cell not in set(frame.astype(str).to_numpy().ravel())]  # fmt: skip
    known = set(NUMBER.findall(" ".join(map(str, frame.select_dtypes(exclude="number").to_numpy().ravel()))))
    wrong = (cell for cell, token in shown if token not in known
             and not any(rounded(token, value) for value in numbers))  # fmt: skip
    return next((f"{cell!r} is no number of its .csv" for cell in wrong), "")


def rounded(text: str, value: float) -> bool:
    """Whether a number may have been rounded to this text; the number itself is known to six digits."""
    places, off = len(text.partition("e")[0].partition(".")[2]), abs(float(text) - value)
    if not places and float(value).is_integer() and abs(value) < 1e6:
        return off == 0
    return off <= 0.5000001 * 10.0**-places + DIGITS / 2 * abs(value) + 1e-12


def _shows(cell: str, true: str) -> bool:
    """Whether a cell in Markdown is this one of a .csv, or that one rounded."""
    if cell in (true, names.line(true), tables.title(true)) or (cell in EMPTY and true in EMPTY):
        return True
    return all(NUMBER.fullmatch(each) for each in (cell, true)) and rounded(cell, float(true))


def _as_comparison(frame: pd.DataFrame, cells: Rows) -> str:
    made = []
    for factor in (1, 1 - DIGITS / 2, 1 + DIGITS / 2):
        scaled = frame.assign(accuracy_mean=frame["accuracy_mean"] * factor,
                              accuracy_std=frame["accuracy_std"].astype(float) * factor)  # fmt: skip
        feature = "h" if "h" in set(frame["feature"]) else frame["feature"].iloc[0]
        made.append(markdown_rows(tables.markdown(tables.comparison_table(scaled, feature)))[0])
    if [len(row) for row in cells] != [len(row) for row in made[0]]:
        return "other rows or columns than its .csv gives"
    wrong = ((cell, ours[0]) for row, *others in zip(cells, *made, strict=True)
             for cell, *ours in zip(row, *others, strict=True) if cell not in ours)  # fmt: skip
    return next((f"{cell!r}, by its .csv {ours!r}" for cell, ours in wrong), "")


def _as_evidence(frame: pd.DataFrame, cells: Rows) -> str:
    """As `claims.write_evidence` shows it."""
    head, *rows = cells
    if len(rows) != len(frame):
        return f"{len(rows)} rows, in its .csv {len(frame)}"
    for row, true in zip(rows, frame.to_dict("records"), strict=True):
        shown = dict(zip(head, row, strict=True))
        for name in head[:-1]:
            if shown[name] != names.line(true[name]):
                return f"{shown[name]!r}, in its .csv {true[name]!r}"
        expected, found = claims.text(true), shown["value"]
        values = [true[name] for name in (claims.NUMBERS if "(" in expected else ["value"])]
        tokens = NUMBER.findall(found)
        alike = NUMBER.sub("#", found) == NUMBER.sub("#", expected) and len(tokens) == len(values)
        if not alike or not all(rounded(token, value) for token, value in zip(tokens, values, strict=True)):
            return f"{found!r}, by its .csv {expected!r}"
    return ""


# ---- tables and the evaluations that they follow from


def evaluations(folders: Sequence[Path]) -> pd.DataFrame:
    """A row for each accuracy that was measured of the models in `folders`: arm, seed, crops, and of `evaluate`.

    `objective` is None for an encoder that others trained; `of`: the model but for its seed; `by`: the protocol. What
    cannot be read is left out: it has a fault of its own.
    """
    found = []
    for folder in folders:
        try:
            about = _about(folder)
        except (InputError, KeyError, TypeError):
            continue
        for path in sorted(folder.glob("evaluations/*.json")):
            try:
                content = runs.read_json(path)
                protocol = {name: value for name, value in content["protocol"].items()
                            if name not in ("weights", "rounded", "ks", "probes")}  # fmt: skip
                found += [{**about, **row, "by": json.dumps(protocol, sort_keys=True)} for row in content["rows"]]
            except (InputError, KeyError, TypeError, AttributeError):
                continue
    return pd.DataFrame(found)


def _about(folder: Path) -> dict[str, Any]:
    if (folder / FOREIGN).exists():
        drawn = runs.read_json(folder / FOREIGN)["loaded"].partition(": ")[2].startswith("weights drawn from seed")
        return {"objective": None, "training": "untrained" if drawn else "foreign", "seed": 0, "crops": None,
                "of": folder.name}  # fmt: skip
    run = Run(folder)
    config = {name: value for name, value in run.config.items() if name != "seed"}
    return {"objective": comparison.label(run), "training": config["training"], "seed": run.config["seed"],
            "crops": run.metrics["crops"], "of": json.dumps(config, sort_keys=True)}  # fmt: skip


def follows(table: pd.DataFrame, measured: pd.DataFrame) -> str | None:
    """What a table of accuracies has otherwise than the evaluations; None where none is kept of what it is about.

    A row with a seed is one accuracy, else the mean over its `seeds`, of models and protocols that are otherwise alike.
    A row of random weights may stand where a training begins, under its name.
    """
    value = next((name for name in ("accuracy_mean", "accuracy") if name in table), None)
    if value is None or not {"k", "probe", "training"} <= {*table} or measured.empty or table.empty:
        return None
    if "objective" in table:
        table = table.assign(training=table["training"].where(table["objective"] != "none", "untrained"))
    keys = [name for name in ("objective", "training", "k", "probe", "feature", "seed") if name in table]
    if "objective" not in keys or not measured["objective"].isna().any():
        missing = _missing(table, measured, keys, value)
    else:  # its name in tables is not kept for an encoder that others trained
        own = measured.assign(objective=measured["objective"].fillna("*"))
        known = set(own["objective"])
        asked = table.assign(objective=[name if name in known else "*" for name in table["objective"]])
        missing = _missing(asked, own, keys, value)
    some = "; ".join(", ".join(str(row[name]) for name in [*keys, value]) for row in missing[:1])
    if missing and len(missing) < len(table):
        return f"{len(missing)} of {len(table)} rows follow from no evaluation that is kept: {some}"
    if missing and value == "accuracy_mean" and "crops" in table:  # as `over_seeds` gives it
        return f"no row follows from an evaluation that is kept: {some}"
    return None if missing else ""


def _missing(table: pd.DataFrame, measured: pd.DataFrame, keys: list[str], value: str) -> list[dict[str, Any]]:
    by_key = defaultdict(list)
    for key, own in measured.groupby(keys, sort=False):
        for _, alike in own.groupby(["of", "by"], sort=False):
            by_key[key].append((alike["accuracy"].mean(), alike["low"].mean(), alike["high"].mean(), len(alike)))
    return [row for row in table.to_dict("records")
            if not any(_same(row, value, *each) for each in by_key[tuple(row[name] for name in keys)])]  # fmt: skip


def _same(row: Mapping[str, Any], value: str, mean: float, low: float, high: float, count: int) -> bool:
    ends = {} if row.get("seeds", 1) != 1 else {"low": low, "high": high}
    expected = {value: mean, **{name: end for name, end in ends.items() if not pd.isna(row.get(name, math.nan))}}
    return row.get("seeds", count) in (count, 1) and all(
        math.isclose(row[name], true, rel_tol=DIGITS) for name, true in expected.items())


def recomputed(folder: Path, measured: pd.DataFrame) -> dict[str, str]:
    """Table -> fault, or nothing, by what `comparison.gains` and `comparison.evidence` make of the evaluations; {}
    where they made none of its tables."""
    written = ("per_seed", "gains", "claim_c2")
    tables = {name: read_csv(path) for name in written if (path := folder / "tables" / f"{name}.csv").exists()}
    asked, gains = tables.get("per_seed"), tables.get("gains")
    if asked is None or gains is None or not {"first", "second"} <= {*gains} or measured.empty:  # notebook 02 alone
        return {}
    chosen = _with_correct(asked, measured)
    if len(chosen) < len(asked):  # which `follows` tells
        return {}
    again = comparison.gains(chosen, sorted(set(asked["k"])), test_images(chosen.iloc[0]))
    faults = {"gains": _frames_differ(gains, again)}
    if (evidence := tables.get("claim_c2")) is not None:
        dataset = evidence["dataset"].iloc[0]
        faults["claim_c2"] = _frames_differ(evidence, comparison.evidence(again, dataset))
    return faults


def _with_correct(table: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    keys = ["objective", "training", "seed", "k", "probe", "feature"]
    near = measured.assign(digits=measured["accuracy"].map("{:.6g}".format))
    asked = table[keys].assign(digits=table["accuracy"].map("{:.6g}".format))
    return asked.merge(near.drop_duplicates([*keys, "digits"]), on=[*keys, "digits"], how="inner", sort=False)


def test_images(row: Mapping[str, Any]) -> int:
    """Among how many test images those that were right, its `correct`, are the share that its `accuracy` says.

    Raises InputError when there is no such number.
    """
    packed = bytes.fromhex(row["correct"])
    right = sum(byte.bit_count() for byte in packed)
    least = 8 * len(packed) - 7
    count = round(100 * right / row["accuracy"]) if row["accuracy"] else least
    if not least <= count <= 8 * len(packed) or not math.isclose(100 * right / count, row["accuracy"], abs_tol=1e-6):
        raise InputError(f"the accuracy {row['accuracy']} is not that of the images that were right")
    return count


def _frames_differ(found: pd.DataFrame, again: pd.DataFrame) -> str:
    if list(found) != list(again) or len(found) != len(again):
        return "other rows or columns than the evaluations give"
    for name in found:
        for one, other in zip(found[name], again[name], strict=True):
            same = (pd.isna(one) and (pd.isna(other) or other == "")) or one == other
            if not same and not (isinstance(one, int | float) and math.isclose(one, other, rel_tol=DIGITS,
                                                                              abs_tol=1e-9)):  # fmt: skip
                return f"{name} is {one}, by the evaluations {other:.6g}" if isinstance(other, float) else (
                    f"{name} is {one!r}, by the evaluations {other!r}")  # fmt: skip
    return ""


# ---- the executed notebook


def outputs(notebook: Path) -> list[dict[str, Any]]:
    """The outputs of an executed notebook. Raises InputError for one that cannot be read."""
    return [output for cell in notebook_cells(notebook) for output in cell.get("outputs", ())]


def shown_tables(outputs: Sequence[dict[str, Any]], tables: Mapping[str, str]) -> Iterator[str]:
    """Faults of the tables that an executed notebook shows, in each of their forms, by `tables`: name -> Markdown."""
    files = {name: markdown_rows(text)[0] for name, text in tables.items()}
    for output in outputs:
        data = {kind: "".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
        text = data.get("text/markdown", "")
        if not re.fullmatch(r"(\|.*\|\n)+", text.rstrip("\n") + "\n"):
            continue
        rows, head = markdown_rows(text)[0], text.partition("\n")[0].strip("| ")
        own = [(name, each) for name, each in files.items() if _labels(each) == _labels(rows)]
        if own and not any(_as_shown(rows, each) for _, each in own):
            name, each = own[0]
            wrong = (f"{row}, in the file {true}" for row, true in zip(rows, each, strict=False)
                     if not _as_shown([row], [true]))  # fmt: skip
            yield f"it shows tables/{name}.md otherwise: {next(wrong, f'{len(rows)} rows')}"
        plain = data.get("text/plain", "")
        if plain.startswith("|") and plain.strip() != text.strip():
            yield f"a table with the columns {head} is another as plain text"
        shown = html_rows(data.get("text/html", ""))
        if shown and [[" ".join(cell.split()) for cell in row] for row in shown] != rows:
            yield f"a table with the columns {head} is another as HTML"


def _labels(rows: Rows) -> Rows:
    """The head, and what begins the rows: by these a table is known."""
    return [rows[0], [tables.title(row[0]) for row in rows[1:] if row]]


def _as_shown(rows: Rows, true: Rows) -> bool:
    """Whether rows are those of a file, or these rounded further."""
    return list(map(len, rows)) == list(map(len, true)) and all(
        _shows(cell, other) for row, others in zip(rows, true, strict=True)
        for cell, other in zip(row, others, strict=True))


def shown_figures(name: str, outputs: Sequence[dict[str, Any]], pictures: Sequence[Path]) -> dict[Path, str]:
    """Figure -> fault of those that the executed notebook `name` does not show, by their looks: its own are smaller."""
    found = []
    for output in outputs:
        if picture := "".join(output.get("data", {}).get("image/png", "")):
            try:
                found.append(_looks(io.BytesIO(base64.b64decode(picture))))
            except (OSError, ValueError):
                continue
    faults = {}
    for path in pictures:
        try:
            mine, form = _looks(path)
        except (OSError, ValueError):
            faults[path] = "no readable picture"
            continue
        if found and not any(abs(form / other - 1) < STRETCH and np.corrcoef(mine, each)[0, 1] > ALIKE
                             for each, other in found):  # fmt: skip
            faults[path] = f"{name} shows no such figure"
    return faults


def _looks(source: Any, side: int = 160) -> tuple[np.ndarray, float]:
    """A picture without its margin as side² shades of grey, and its form: width by height."""
    with Image.open(source) as opened:
        picture = opened.convert("RGBA")
    grey = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
    box = Image.eval(grey, lambda shade: 255 * (shade < 250)).getbbox() or (0, 0, *grey.size)
    small = grey.crop(box).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=float).ravel(), (box[2] - box[0]) / (box[3] - box[1])


def printed_verdicts(outputs: Sequence[dict[str, Any]], verdicts: Callable[[], set[str]]) -> Iterator[str]:
    """Faults of the verdicts that an executed notebook prints, a line each, `cifar10: C4 holds`, by `verdicts`."""
    words = f"{claims.HOLDS}|{claims.FAILS}|{claims.UNDECIDED}"
    for output in outputs:
        for line in "".join(output.get("text", "")).splitlines():
            if re.fullmatch(rf".+: C\d ({words})", line) and line not in verdicts():
                yield f"it prints {line!r}, which its tables do not say"


