"""A tidy frame as a table: in CSV, Markdown and LaTeX, on a page sorted by a click, and beside the paper's figures.

Frames are tidy: objective, training, k (0 = centre crop), probe, feature, accuracy_mean, accuracy_std, seeds.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from bagssl.errors import InputError
from bagssl.paths import write_text
from bagssl.study import names

TITLES = {"tcr": "TCR", "simclr": "SimCLR", "vicreg": "VICReg", "byol": "BYOL", "barlow": "Barlow Twins",
          "moco": "MoCo v3", "none": "untrained", "knn": "kNN", "linear": "Linear probe"}  # fmt: skip
DASH = "–"


def title(word: str) -> str:
    """How the word of a table is written where it is shown: tcr -> TCR."""
    return TITLES.get(word, word)


def render(template: str, folder: Path | None = None, **content: Any) -> str:
    """The HTML that one of the templates in `folder`, by default those beside this file, makes of `content`."""
    own = Path(__file__).parent
    loader = jinja2.FileSystemLoader([folder or own, own])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    return environment.get_template(template).render(**content)


class Bold(str):
    """A cell of a table that stands out; in a frame of dtype object."""


def of_feature(frame: pd.DataFrame, feature: str) -> pd.DataFrame:
    """The rows of one feature; of the untrained encoder, which has no objective, one copy."""
    rows = frame[frame["feature"] == feature]
    if rows.empty:
        raise InputError(f"the table has no row with feature {feature!r}")
    untrained = rows["training"] == "untrained"
    copies = rows[untrained].drop_duplicates(["k", "probe"])
    return pd.concat([rows[~untrained], copies.assign(objective="none")])


def cell(mean: float, std: float = float("nan")) -> str:
    """`65.0 ± 0.2`; without the ± for a single seed; a dash for what was not measured."""
    if pd.isna(mean):
        return DASH
    return f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}"


def comparison_table(frame: pd.DataFrame, feature: str = "h") -> pd.DataFrame:
    """Rows (probe, objective, training), columns centre crop and K; cells `mean ± std` in per cent, as text.

    The best cell of each probe and objective is `Bold`: patch-based or multi-scale, and at which K.
    """
    chosen = of_feature(frame, feature)
    best = chosen[chosen["training"] != "untrained"].groupby(["probe", "objective"])["accuracy_mean"].max()
    rows: dict[tuple, dict[str, str]] = {}
    for row in chosen.to_dict("records"):
        text, untrained = cell(row["accuracy_mean"], row["accuracy_std"]), row["training"] == "untrained"
        if not untrained and row["accuracy_mean"] == best[row["probe"], row["objective"]]:
            text = Bold(text)
        arm = (title(row["probe"]), DASH if untrained else title(row["objective"]), row["training"])
        rows.setdefault(arm, {})[row["k"]] = text
    table = pd.DataFrame.from_dict(rows, orient="index", dtype=object).sort_index(axis=1).fillna(DASH)
    table.columns = ["centre crop" if k == 0 else f"K = {k}" for k in table]
    table.index = pd.MultiIndex.from_tuples(rows, names=["probe", "objective", "training"])
    return table


def _texts(table: pd.DataFrame) -> list[list[str]]:
    """Header and rows as text; a missing number is a dash, the floats of a column have equal decimals, at most two."""
    named = table.reset_index() if any(name is not None for name in table.index.names) else table

    def texts(values: tuple) -> list[str]:
        floats = {index: round(value, 2) + 0.0 for index, value in enumerate(values)  # + 0.0: no minus zero
                  if isinstance(value, float) and not np.isnan(value)}
        places = max((len(f"{value:.2f}".rstrip("0").partition(".")[2]) for value in floats.values()), default=0)
        return [f"{floats[index]:.{places}f}" if index in floats else DASH if isinstance(value, float) else
                value if isinstance(value, Bold) else str(value) for index, value in enumerate(values)]

    columns = map(texts, zip(*named.astype(object).to_numpy().tolist(), strict=True))
    return [[str(name) for name in named.columns], *map(list, zip(*columns, strict=True))]


def markdown(table: pd.DataFrame, marked: Collection[str] = ()) -> str:
    """A Markdown table, columns aligned; a notebook shows it by `Table`. The cells of columns `marked` are Markdown."""
    head, *body = _texts(table)
    rows = [[names.cell(name) for name in head]]
    for row in body:
        cells = [text if name in marked else names.cell(text) for name, text in zip(head, row, strict=True)]
        rows.append([f"**{text}**" if isinstance(mark, Bold) else text for text, mark in zip(cells, row, strict=True)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    cells = ([text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """What a notebook shows of a table: sorted by a click on a column's head where scripts run, Markdown elsewhere."""

    frame: pd.DataFrame

    def __repr__(self) -> str:
        return markdown(self.frame)

    _repr_markdown_ = __repr__

    def _repr_html_(self) -> str:
        head, *rows = [[f"<strong>{names.html(text)}</strong>" if isinstance(text, Bold) else names.html(text)
                        for text in row] for row in _texts(self.frame)]
        return render("table.html.j2", head=head, rows=rows)


def latex(table: pd.DataFrame) -> str:
    """A LaTeX tabular for booktabs."""
    texts = [[rf"\textbf{{{names.tex(text)}}}" if isinstance(text, Bold) else names.tex(text) for text in row]
             for row in _texts(table)]
    rows = [" & ".join(row) + r" \\" for row in texts]
    columns = "l" * sum(name is not None for name in table.index.names) + "r" * len(table.columns)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"]) + "\n"


def write_table(frame: pd.DataFrame, folder: Path, name: str, table: pd.DataFrame | None = None) -> None:
    """Write folder/tables/name.csv, the tidy truth, and `table` (by default the frame) as .md and .tex."""
    shown = frame if table is None else table
    contents = {"csv": frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
                "md": markdown(shown), "tex": latex(shown)}
    for suffix, content in contents.items():
        write_text(Path(folder) / "tables" / f"{name}.{suffix}", content)


def paper_values() -> pd.DataFrame:
    """The verified figures of the paper with their sources; paper_values.csv takes more."""
    return pd.read_csv(Path(__file__).with_name("paper_values.csv"))


def setting(row: Mapping[str, Any]) -> str:
    """How paper_values.csv names a row of a tidy table: `tcr patch-based k=64 linear h`."""
    return f"{row['objective']} {row['training']} k={row['k']} {row['probe']} {row['feature']}"


def with_paper(frame: pd.DataFrame, artefact: str, dataset: str) -> pd.DataFrame:
    """Add `paper` and `delta` = ours - paper, in points; empty (shown as a dash) where no value is verified.

    A value belongs to the row whose `setting` column, or else `setting(row)`, it names.
    """
    values = paper_values()
    known = values[(values["artefact"] == artefact) & (values["dataset"] == dataset)]
    known = dict(zip(known["setting"], known["value"].astype(float), strict=True))
    names = frame["setting"] if "setting" in frame else [setting(row) for row in frame.to_dict("records")]
    paper = np.array([known.get(name, np.nan) for name in names], dtype=float)
    return frame.assign(paper=paper, delta=frame["accuracy_mean"].to_numpy(dtype=float) - paper)
