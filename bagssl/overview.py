"""What the store holds, run by run, and what was measured of one: for `bagssl runs` and `bagssl evaluate`."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagssl import records
from bagssl.cards import headline
from bagssl.errors import InputError
from bagssl.paths import write_atomically
from bagssl.runs import WEIGHTS, Run, known, list_runs, machine


def choose(names: Sequence[str], root: Path | None = None) -> list[Run]:
    """The runs whose names or keys begin with one of `names`, as by `named`; none given: all that are finished.

    Raises InputError for a name that no run has.
    """
    if not names:
        return [run for run in list_runs(root) if run.finished]
    found = {name: named(name, root) for name in names}
    if unknown := [name for name, own in found.items() if not own]:
        raise InputError(f"no run is called {unknown[0]}, nor has such a key: `bagssl runs list` shows them")
    return sorted({run for own in found.values() for run in own}, key=lambda run: run.path.name)


def named(name: str, root: Path | None = None) -> list[Run]:
    """The runs of the store whose name or key begins so; or else those of the record, which are copied into the store.

    Raises InputError where what the record has is damaged.
    """
    def called(run: Run) -> bool:
        return run.path.name.startswith(name) or run.key.startswith(name)

    return [run for run in list_runs(root) if called(run)] or [
        records.stored(run) for run in records.only_there(root) if called(run)]


def the_one(found: Sequence[Run], name: str) -> Run:
    """The finished run that a name, by which one or more were found, means; InputError for several, or another."""
    if len(found) > 1:
        raise InputError(f"{len(found)} runs begin with {name!r}: write more of {found[0].path.name}")
    if not found[0].finished:
        raise InputError(f"{found[0].path} is not finished: train it to its end")
    return found[0]


def rows() -> list[tuple[str, ...]]:
    """A row for each run of the store, then for those that the record alone has."""
    return [row(run) for run in (*list_runs(), *records.only_there())]


def row(run: Run) -> tuple[str, ...]:
    """Name, state, crops, seconds, machine, weights and accuracy of a run, as text; what is damaged stays empty."""
    state = "finished" if run.finished else f"has lost {run.lost[0]}" if run.lost else "not finished"
    if run.path.parent in records.roots():
        state = "in the record"
    weights = "fp32" if (run.path / WEIGHTS).exists() else "fp16" if run.halved else ""
    return (run.path.name, state, known(lambda: f"{run.metrics['crops']:,}"),
            known(lambda: f"{run.metrics['seconds']:,.0f}"), known(lambda: machine(run.provenance["hardware"])),
            weights, known(lambda: "{accuracy:.1f} %, {probe}, {feature}, K = {k}".format(**headline(run))))


def measured(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of `evaluation.over_scales` as text: per cent and points, each with the ends of its interval."""
    what = "centre crop" if row["scale"] is None else f"scale {row['scale']:g}"
    shares = [f"{row[name]:.2f}" for name in ("accuracy", "low", "high", "top5") if name in row]
    gain = [f"{row[name]:+.2f}" if name in row else "" for name in ("gain", "gain_low", "gain_high")]
    return what, str(row["k"]), row["probe"], *shares, *gain


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of `evaluation.over_scales`, with what they are about, as a table."""
    columns = ["encoder", "dataset", "train_images", "test_images", "scale", "k", "probe", "feature", "accuracy", "low",
               "high", "gain", "gain_low", "gain_high"]  # fmt: skip
    columns += [name for name in rows[0] if name.startswith("top5")]
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
