"""What the store holds, run by run, and what was measured of one: for `bagssl runs` and `bagssl evaluate`."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagssl import records
from bagssl.cards import headline
from bagssl.errors import InputError, nearest
from bagssl.paths import write_atomically
from bagssl.runs import WEIGHTS, Run, known, list_runs, machine

FEW = 6  # candidates that one line names


def choose(names: Sequence[str], root: Path | None = None) -> list[Run]:
    """The runs of the store whose names or keys begin with one of `names`; where it has none, those of the record,
    which are copied into it. None given: all of the store that are finished.

    Raises InputError for a name that no run has, and where what the record has is damaged.
    """
    if not names:
        return [run for run in list_runs(root) if run.finished]
    found = [_begins(name, list_runs(root)) or _begins(name, records.only_there(root)) for name in names]
    if unknown := [name for name, own in zip(names, found, strict=True) if not own]:
        raise InputError(f"no run is called {unknown[0]}, nor has such a key: `bagssl runs list` shows them")
    return sorted({records.stored(run) for own in found for run in own}, key=lambda run: run.path.name)


def _begins(name: str, runs: Sequence[Run]) -> list[Run]:
    """The one that has this name or key, else all whose name or key begins so."""
    return [run for run in runs if name in (run.path.name, run.key)] or [
        run for run in runs if name and (run.path.name.startswith(name) or run.key.startswith(name))]


def find(name: str, *, record: bool = True) -> Run:
    """The one run that a folder, a name or a key means, the last two perhaps by their beginning; where it lies.

    record: those that the record alone has as well. Raises InputError, with the candidates, for none or several.
    """
    if record and (Path(name) / "config.json").is_file():
        return Run(Path(name).absolute())
    if not (found := matching(name, record=record)):
        names = [run.path.name for run in _every(record)]
        raise InputError(f"no run is called {name!r}, nor has such a key: {_instead(name, names)}")
    if len(found) > 1:
        raise InputError(f"{len(found)} runs begin with {name!r}: {_some([run.path.name for run in found])}: write "
                         "more of the one that is meant")  # fmt: skip
    return found[0]


def matching(name: str, *, record: bool = True) -> list[Run]:
    """The runs that a name or a key, or its beginning, can mean, where they lie; `record` as in `find`."""
    return _begins(name, _every(record))


def _every(record: bool) -> list[Run]:
    return [*list_runs(), *(records.only_there() if record else ())]


def _instead(name: str, names: Sequence[str]) -> str:
    if not names:
        return "there is none"
    meant = nearest(name, names)
    return meant if meant.startswith("did") else f"known: {_some(names)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:FEW]) + f" and {len(names) - FEW} more" * (len(names) > FEW)


def the_one(name: str) -> Run:
    """The finished run that a name means, as by `find`, in the store. Raises InputError for none, several or another.
    """
    if not (run := find(name)).finished:
        raise InputError(f"{run.path} is not finished: train it to its end")
    return records.stored(run)


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
