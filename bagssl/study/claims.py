"""The ledger of claims: what the paper says, the rule that decides it, and the verdict on the evidence.

The rules were fixed before the results were known, but for two: `Claim.change` says how C2 and C4 were changed later,
and why, and the ledger has the verdict under the rule before beside today's. Evidence is a tidy frame, one measured
value with its 95 % interval per row:

    dataset, setting ("simclr, multi-scale, K = 256"), measure, value, low, high, unit

and `encoder`, for encoders that others trained, `scale`, the patches' share of the image's area, where a rule asks for
it, and `weights`, "random" for a control, of which the ledger says what the same rule would say. An exact check has
low = high = value. A claim holds if every condition has rows and each row's interval lies on the right side of the
threshold, and does not hold if one lies wholly on the wrong side: `Condition.judge` judges a row, and the worst decides
(`judged`). Rows whose measure no rule names, of patches of another scale than it asks for, or of random weights, are
kept, and decide nothing.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from bagssl.errors import InputError
from bagssl.paths import write_text
from bagssl.runs import machine, read_json
from bagssl.study import names, tables

HOLDS, FAILS, UNDECIDED, MISSING = "holds", "does not hold", "undecided", "not measured"
COLUMNS = ["dataset", "setting", "measure", "value", "low", "high", "unit"]
ENCODER = "encoder"  # a further column: of models that others trained; empty for our own
SCALE = "scale"  # a further column: the patches' share of the image's area; empty where that is of no matter
WEIGHTS = "weights"  # a further column: "random" for a control, which decides nothing; empty for what was trained
FURTHER = {SCALE: np.nan, ENCODER: "", WEIGHTS: ""}  # the columns that evidence may lack -> what they say then
NUMBERS = ["value", "low", "high"]
WORDS = [ENCODER, WEIGHTS, *(name for name in COLUMNS if name not in NUMBERS)]  # a dataset may be called 007
DRAWN = 12  # intervals drawn for a verdict at most, the worst
CONTROL = "random weights"  # the verdict on them, by those conditions that can be asked of them
FORMER = "verdict before"  # under the rule as it was before it was changed
LEDGER = ["claim", "dataset", ENCODER, "statement", "measure", "value", "rule", "verdict", CONTROL, FORMER, "hardware",
          "table", "notebook"]  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """The whole interval must lie above, or below, a threshold; on one dataset or, if none is named, on each."""

    measure: str
    above: float | None = None
    below: float | None = None
    unit: str = ""  # what the threshold is in, and then the evidence must be too; else a plain number
    dataset: str = ""
    added: bool = False  # since the results were known

    def judge(self, low: float, high: float) -> tuple[str, float]:
        """The state of an interval, and how far its unfavourable end is on the right side of the threshold."""
        if self.below is not None:
            return Condition(self.measure, above=-self.below).judge(-high, -low)
        state = HOLDS if low > self.above else FAILS if high <= self.above else UNDECIDED
        return state, low - self.above

    def __str__(self) -> str:
        threshold = f"above {self.above:g}" if self.below is None else f"below {self.below:g}"
        return f"{self.measure} {threshold} {self.unit}".rstrip()


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the conditions that must all be met for it to hold."""

    statement: str
    conditions: tuple[Condition, ...]
    expected: tuple[str, ...] = ()  # datasets that the paper's claim is about: in the ledger even if not measured
    caveat: str = ""  # what the rule does not ask
    scales: tuple[float, float] | None = None  # from which patch scale to which it decides; None: at any
    change: str = ""  # how the rule was changed since the results were known, and why

    def on(self, dataset: str) -> list[Condition]:
        return [each for each in self.conditions if each.dataset in ("", dataset)]

    def asked(self, evidence: pd.DataFrame) -> pd.Series:
        """Which rows the rule asks for: those of its scales, and those that name none."""
        if self.scales is None:
            return pd.Series(True, index=evidence.index)
        return evidence[SCALE].isna() | evidence[SCALE].between(*self.scales)

    @property
    def notes(self) -> str:
        """What stands beside the conditions: the scales, what is not asked, and the change."""
        scales = self.scales and "decided with patches of {:g} to {:g} of the image's area".format(*self.scales)
        return "; ".join(filter(None, [scales, self.caveat, self.change and f"changed: {self.change}"]))


SMALL = (0.2, 0.25)  # the patches that the claims are about, as shares of the image's area: the paper says small

CLAIMS = {
    "C1": Claim("Self-supervised objectives model which patches occur together.", (
        Condition("identity error", below=1e-10, dataset="discrete joints"),
        Condition("gap to the closed form", below=1e-4, dataset="discrete joints"),
        Condition("correlation, spectral", above=0.9, dataset="synthetic"),
        Condition("correlation, spectral over untrained", above=0, dataset="synthetic"),
    )),
    "C2": Claim("Bags of patches of one scale are on par with multi-scale training by the same objective.", (
        Condition("patch-based bag over multi-scale centre crop", above=-2, unit="points"),
        Condition("patch-based bag over multi-scale bag", above=-2, unit="points", added=True),
    ), change="the lead over the bag was not asked for before; it makes the claim harder"),
    "C3": Claim("Small patches are enough for a strong representation of the image.", (
        Condition("small-patch bag over untrained", above=0, unit="points"),
        Condition("small-patch bag over the largest scale", above=-2, unit="points"),
    ), expected=("imagenet",)),
    "C4": Claim("A multi-scale model embeds the whole image close to the mean over its patches.", (
        Condition("centred cosine", above=0.8),
        Condition("centred cosine over another image's patches", above=0),
        Condition("centred cosine over an untrained encoder", above=0),
    ), scales=SMALL, change="before, patches of whatever scale was asked for decided; large ones come near to the "
                            "whole image by being nearly all of it"),
    "C5": Claim("The representation is local in its patches and invariant in their bag.", (
        Condition("position R2 of patches", above=0),
        Condition("neighbours of the same class over chance", above=0),
        Condition("shift sensitivity, patch over bag", above=0),
    ), caveat="not asked: whether an untrained encoder does the same"),
    "C6": Claim("The projection is the more invariant, the embedding the more local and equivariant.", (
        Condition("position R2, h over z", above=0),
        Condition("shift sensitivity, h over z", above=0),
        Condition("scale sensitivity, h over z", above=0),
        Condition("colour sensitivity, h over z", above=0),
    )),
    "C7": Claim("Averaging the embeddings of patches improves existing multi-scale models by a large margin.", (
        Condition("bag over centre crop", above=0, unit="points"),
        Condition("median gain over objectives", above=2, unit="points"),
    ), caveat="not asked: whether an untrained encoder gains less"),
}  # fmt: skip


# ---- evidence


def write_evidence(output: Path, claim: str, frame: pd.DataFrame) -> "Ruling":
    """Check the evidence, write output/tables/claim_c4.csv, .md and .tex, and say what it decides.

    Raises InputError for evidence that cannot be judged.
    """
    rows = checked(claim, frame, f"evidence for {claim}")
    further = {SCALE: rows[SCALE].notna().any(), **{name: rows[name].any() for name in (ENCODER, WEIGHTS)}}
    written = rows[[*COLUMNS, *(name for name, used in further.items() if used)]]
    shown = written[[name for name in ("dataset", ENCODER, "setting", "measure") if name in written]]
    shown = shown.assign(value=[text(row) for row in rows.to_dict("records")])
    tables.write_table(written, output, f"claim_{claim.lower()}", shown)
    return Ruling(claim, rows)


def checked(claim: str, frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Evidence with all of its FURTHER columns, numbers as numbers. InputError, in one line that begins with `where`,
    if it cannot be judged."""
    if claim not in CLAIMS:
        raise InputError(f"{where}: no such claim; known: {', '.join(CLAIMS)}")
    if missing := [name for name in COLUMNS if name not in frame]:
        raise InputError(f"{where}: missing columns: {', '.join(missing)}")
    rows = _complete(frame)[[*COLUMNS, *FURTHER]].reset_index(drop=True)
    rows[[*NUMBERS, SCALE]] = rows[[*NUMBERS, SCALE]].apply(pd.to_numeric, errors="coerce").astype(float)
    units = {each.measure: each.unit for each in CLAIMS[claim].conditions if each.unit}
    faults = {
        "value, low and high must be finite numbers": ~np.isfinite(rows[NUMBERS]).all(axis=1),
        "low is above high": rows["low"] > rows["high"],
        "its scale is no share of an image's area": (rows[SCALE] <= 0) | (rows[SCALE] > 1),
        "its weights are neither empty nor random": ~rows[WEIGHTS].isin(["", "random"]),
        "its unit is not that of its rule": [units.get(row.measure, row.unit) != row.unit for row in rows.itertuples()],
    }
    for fault, wrong in faults.items():
        if any(wrong):
            row = " | ".join(map(str, frame[COLUMNS].iloc[list(wrong).index(True)]))
            raise InputError(" ".join(f"{where}: {fault}: {row}".split()))
    for dataset, own in rows.groupby("dataset"):
        known = [each.measure for each in CLAIMS[claim].on(dataset)]
        if not own["measure"].isin(known).any():
            rule = "; ".join(known) or "none"
            raise InputError(f"{where}: on {dataset}, none of its measures is in the rule: {rule}")
    for dataset, _, own in subjects(rows):
        if own[WEIGHTS].all():
            raise InputError(f"{where}: on {dataset}, random weights alone decide nothing")
    return rows


def _complete(evidence: pd.DataFrame) -> pd.DataFrame:
    """With the columns that evidence may lack."""
    lacking = {name: nothing for name, nothing in FURTHER.items() if name not in evidence}
    return evidence.assign(**lacking).fillna({ENCODER: "", WEIGHTS: ""})


def subjects(evidence: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Of what a claim is decided, each in turn: the dataset, the encoder, and their rows."""
    for (dataset, encoder), own in _complete(evidence).groupby(["dataset", ENCODER], sort=False):
        yield dataset, encoder, own


def of(entry: Mapping[str, Any], evidence: pd.DataFrame) -> pd.DataFrame:
    """The rows of evidence, or of `judged`, that an entry of the ledger is about."""
    return evidence[(evidence["dataset"] == entry["dataset"]) & (evidence[ENCODER] == entry[ENCODER])]


def subject(entry: Mapping[str, Any]) -> str:
    """What an entry of the ledger is about: `cifar10`, or `cifar10, vicreg-cifar10`."""
    return ", ".join(filter(None, [entry["dataset"], entry[ENCODER]]))


def text(row: Mapping[str, Any]) -> str:
    """`+3.1 points (2.0 to 4.2)`: a difference with its sign, an interval if there is one."""
    if np.isnan(row["value"]):
        return MISSING
    digits = ".1f" if row["unit"] == "points" else "#.3g"
    sign = "+" if row["value"] >= 0 and (row["unit"] == "points" or " over " in row["measure"]) else ""
    value, low, high = (f"{row[name]:{digits}}".rstrip(".") for name in NUMBERS)
    value = f"{sign}{value} {row['unit']}".rstrip()
    return f"{value} ({low} to {high})" if row["low"] < row["high"] else value


def judged(claim: str, evidence: pd.DataFrame) -> pd.DataFrame:
    """What decides, worst first: each row that a condition names, with its `state` and the condition as `rule`.

    A condition without evidence has one undecided row without a value.
    """
    about = CLAIMS[claim]
    return _judged(evidence, {dataset: about.on(dataset) for dataset in evidence["dataset"]}, about.asked)


def _judged(evidence: pd.DataFrame, rules: Mapping[str, list[Condition]],
            asked: Callable[[pd.DataFrame], pd.Series]) -> pd.DataFrame:  # fmt: skip
    found = []
    for dataset, _, own in subjects(evidence[_complete(evidence)[WEIGHTS] == ""]):
        for rank, each in enumerate(rules[dataset]):
            rows = own[(own["measure"] == each.measure) & asked(own)].to_dict("records")
            unknown = dict.fromkeys([*NUMBERS, SCALE], np.nan)
            nothing = {**own.iloc[0], "setting": "", "measure": each.measure, **unknown}
            for row in rows or [nothing]:
                state, margin = each.judge(row["low"], row["high"])
                order = (FAILS, UNDECIDED, HOLDS).index(state)
                found.append({**row, "state": state, "rule": str(each), "by": (order, rank, margin)})
    return pd.DataFrame(sorted(found, key=lambda row: row["by"]))


def control(claim: str, evidence: pd.DataFrame) -> str:
    """The verdict on the random weights in one subject's evidence, by the conditions that were asked of them; or ""."""
    about, random = CLAIMS[claim], evidence[_complete(evidence)[WEIGHTS] != ""].assign(**{WEIGHTS: ""})
    random = random[about.asked(random)]
    rules = [each for each in about.conditions if each.measure in set(random["measure"])]
    return _judged(random, {random["dataset"].iloc[0]: rules}, about.asked).iloc[0]["state"] if rules else ""


def former(claim: str, evidence: pd.DataFrame) -> str:
    """The verdict on one subject's evidence under the rule before it was changed; empty if it never was.

    That is without the conditions that were added, and at each patch scale, as whichever was asked for decided: `does
    not hold at 0.2; holds at 0.4, 0.7`.
    """
    about, found = CLAIMS[claim], {}
    if not about.change or evidence.empty:
        return ""
    dataset = evidence["dataset"].iloc[0]
    rules = {dataset: [each for each in about.on(dataset) if not each.added]}
    for scale, own in evidence.groupby(SCALE, dropna=False) if about.scales else [(np.nan, evidence)]:
        state = _judged(own, rules, lambda rows: rows["measure"].notna()).iloc[0]["state"]
        found.setdefault(state, []).extend([] if np.isnan(scale) else [f"{scale:g}"])
    return "; ".join(f"{state} at {', '.join(scales)}" if scales else state for state, scales in found.items())


def story(verdicts: Mapping[int, str], unit: str = "crops") -> str:
    """Verdicts along something that grows, in words: `is undecided at 0, then holds from 100 to 3,000 crops`."""
    said = {UNDECIDED: "is undecided"}
    parts = [(word, list(at)) for word, at in itertools.groupby(sorted(verdicts), key=verdicts.__getitem__)]
    if len(parts) == 1:
        said = {FAILS: "holds at none", HOLDS: "holds at each", UNDECIDED: "is undecided at each"}
        ((word, at),) = parts
        return f"{said[word]} of {len(at)} points from {at[0]:,} to {at[-1]:,} {unit}"
    return ", then ".join(f"{said.get(word, word)} from {at[0]:,} to {at[-1]:,}" if len(at) > 1 else
                          f"{said.get(word, word)} at {at[0]:,}" for word, at in parts) + f" {unit}"


@dataclass(frozen=True, eq=False, repr=False)
class Ruling:
    """What evidence says of a claim: in a notebook the verdict, the intervals beside their threshold, and every row."""

    claim: str
    evidence: pd.DataFrame  # as `checked` gives it

    @property
    def entries(self) -> list[dict[str, str]]:
        """What the ledger says of this evidence: an entry for each dataset."""
        found = list(subjects(self.evidence)) or [("", "", self.evidence)]
        return [_entry(self.claim, *each) for each in found]

    @property
    def verdicts(self) -> str:
        """One line for each dataset: `cifar10: C4 holds`."""
        return "\n".join(f"{subject(each)}: {self.claim} {each['verdict']}" for each in self.entries)

    @property
    def rows(self) -> pd.DataFrame:
        """Every row of the evidence, what decides first, as text."""
        about = CLAIMS[self.claim]
        named = pd.Series([row.measure in [each.measure for each in about.on(row.dataset)]
                           for row in self.evidence.itertuples()], dtype=bool)
        decides = named & about.asked(self.evidence) & (self.evidence[WEIGHTS] == "")
        others = self.evidence[~decides].assign(state="decides nothing", rule="")
        rows = pd.concat([judged(self.claim, self.evidence), others], ignore_index=True).fillna({"rule": ""})
        rows["measured"] = [text(row) for row in rows.to_dict("records")]
        rows["asked"] = [row.rule.removeprefix(row.measure).strip() or tables.DASH for row in rows.itertuples()]
        differ = [name for name in ("dataset", ENCODER) if rows.get(name, pd.Series(dtype=str)).nunique() > 1]
        return rows.reindex(columns=[*differ, "setting", "measure", "measured", "asked", "state"])

    def __repr__(self) -> str:
        return "\n".join(f"{self.claim}, {subject(each)}: {each['verdict']} ({each['measure']} {each['value']})"
                         for each in self.entries)  # fmt: skip

    def _repr_markdown_(self) -> str:
        verdicts = " ".join(f"{names.cell(subject(each) or 'Evidence')}: **{each['verdict']}**."
                            for each in self.entries)  # fmt: skip
        about = CLAIMS[self.claim]
        notes = f" ({names.cell(about.notes)})" * bool(about.notes)
        beside = "".join(f" {said}, {names.cell(subject(each))}: {each[name]}."
                         for name, said in ((CONTROL, "Random weights by the same rule"), (FORMER, "Before the change"))
                         for each in self.entries if each[name])  # fmt: skip
        return f"**{self.claim}**: {about.statement} {verdicts}{notes}{beside}\n\n{tables.markdown(self.rows)}"

    def _repr_html_(self) -> str:
        rows = judged(self.claim, self.evidence)
        drawn = [({**each, "subject": subject(each)},
                  strip(self.claim, each, of(each, rows)) if each["dataset"] else None) for each in self.entries]
        head = tables.render("ruling.html.j2", claim=self.claim, about=CLAIMS[self.claim], entries=drawn)
        return head + tables.Table(self.rows)._repr_html_()


def strip(claim: str, entry: Mapping[str, Any], rows: pd.DataFrame) -> dict[str, Any] | None:
    """What strip.html.j2 draws: the intervals of the measure that decides, and the threshold, on a scale from 0 to 100.

    entry: a row of `ledger`; rows: from `judged`. None when no interval was measured.
    """
    rows = rows[rows["measure"] == entry["measure"]].dropna(subset=NUMBERS)[:DRAWN]
    if rows.empty:
        return None
    (rule,) = (each for each in CLAIMS[claim].on(entry["dataset"]) if each.measure == entry["measure"])
    threshold = rule.above if rule.below is None else rule.below
    low, high = min(rows["low"].min(), threshold), max(rows["high"].max(), threshold)

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / ((high - low) or 1), 2)

    lines = [{**{name: place(row[name]) for name in NUMBERS}, "state": row["state"],
              "label": f"{row['setting']}: {text(row)}"} for row in rows.to_dict("records")]  # fmt: skip
    edge = place(threshold)
    right = (edge, 100 - edge) if rule.below is None else (0, edge)  # where an interval should be: start, width
    return {"lines": lines, "threshold": edge, "right": right, "label": f"{threshold:g} {rule.unit}".rstrip()}


# ---- the ledger


def experiment_folders(results: Path, profile: str) -> list[Path]:
    """The folders of finished experiments; what is hidden is unfinished or failed."""
    found = sorted((Path(results) / profile).glob("*/provenance.json"))
    return [path.parent for path in found if not path.parent.name.startswith(".")]


def models(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """The folders of an experiment's models: beside its results, or named by its provenance among its profile's."""
    return [*folder.glob("runs/*"), *(folder.with_name("runs") / name for name in record.get("runs") or ())]


def hardware(folder: Path) -> str:
    """What an experiment ran on, as `runs.machine` names it, and where else its models were trained."""
    record = read_json(folder / "provenance.json")
    here, elsewhere = machine(record.get("hardware") or {}), set()
    for path in (model / "provenance.json" for model in models(folder, record)):
        with contextlib.suppress(InputError):
            elsewhere.add(machine(read_json(path).get("hardware") or {}))
    names = ", ".join(sorted(elsewhere - {here, machine({})}))
    return f"{here}; models from {names}" if names else here


def collect(results: Path, profile: str) -> pd.DataFrame:
    """All evidence of a profile, with claim, experiment, hardware, and the table and notebook that hold it."""
    found = [pd.DataFrame(columns=[*COLUMNS, *FURTHER, "claim", "experiment", "hardware", "table", "notebook"])]
    for folder in experiment_folders(results, profile):
        for path in sorted(folder.glob("tables/claim_c*.csv")):
            claim = path.stem.removeprefix("claim_").upper()
            try:
                frame = pd.read_csv(path, keep_default_na=False, dtype=dict.fromkeys(WORDS, str))
            except (OSError, ValueError) as error:
                raise InputError(f"{path} is no table: {' '.join(str(error).split())}") from None
            found.append(checked(claim, frame, str(path)).assign(
                claim=claim, experiment=folder.name, hardware=hardware(folder),
                table=f"{folder.name}/tables/{path.name}", notebook=f"{folder.name}/{folder.name}.ipynb"))  # fmt: skip
    return pd.concat([frame for frame in found if len(frame)] or found[:1], ignore_index=True)


def ledger(results: Path, profile: str) -> pd.DataFrame:
    """One row per claim, dataset and encoder, as in LEDGER; `table` and `notebook` are relative to results/<profile>.

    Raises InputError for evidence that cannot be judged.
    """
    evidence, rows = collect(results, profile), []
    for claim, about in CLAIMS.items():
        own = evidence[evidence["claim"] == claim]
        found = list(subjects(own))
        found += [(name, "", own.iloc[:0]) for name in about.expected if name not in own["dataset"].tolist()]
        rows += [_entry(claim, *each) for each in found or [("", "", own)]]
    return pd.DataFrame(rows)


def _entry(claim: str, dataset: str, encoder: str, evidence: pd.DataFrame) -> dict[str, str]:
    about = CLAIMS[claim]
    rule = "; ".join(filter(None, [*map(str, about.on(dataset) if dataset else about.conditions), about.notes]))
    entry = {**dict.fromkeys(LEDGER, ""), "claim": claim, "dataset": dataset, ENCODER: encoder,
             "statement": about.statement, "rule": rule, "verdict": MISSING,
             CONTROL: control(claim, evidence), FORMER: former(claim, evidence)}  # fmt: skip
    if evidence.empty:
        return entry
    rows = judged(claim, evidence)
    worst, value = rows.iloc[0], text(rows.iloc[0])
    alike = (rows["measure"] == worst["measure"]).sum()
    if len(rows) > 1 and worst["setting"]:
        value += f"; worst of {alike}: {worst['setting']}" if alike > 1 else f"; {worst['setting']}"
    named = ["measure", "hardware", "table", "notebook"]
    return {**entry, **worst[worst.index.intersection(named)], "value": value, "verdict": worst["state"]}


def write_ledger(results: Path, profile: str) -> pd.DataFrame:
    """Write results/<profile>/claims.csv and claims.md, and give the ledger back."""
    found = ledger(results, profile)
    links = [f"[table]({quote(row.table)}), [notebook]({quote(row.notebook)})" if row.table else ""
             for row in found.itertuples()]  # fmt: skip
    silent = ["table", "notebook", *(name for name in (ENCODER, CONTROL, FORMER) if not found[name].any())]
    shown = found.drop(columns=silent).assign(evidence=links).replace("", tables.DASH)
    page = f"# The claims, profile {profile}\n\n{tables.markdown(shown, ['evidence'])}"
    for name, text in (("claims.csv", found.to_csv(index=False, lineterminator="\n")), ("claims.md", page)):
        write_text(Path(results) / profile / name, text)
    return found
