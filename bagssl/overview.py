"""What the store holds, run by run, and what was measured of one: for `bagssl runs` and `bagssl evaluate`."""

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagssl.errors import InputError
from bagssl.paths import write_atomically
from bagssl.runs import WEIGHTS, Run, known, list_runs, machine, read_json


def choose(names: Sequence[str], root: Path | None = None) -> list[Run]:
    """The runs of the store whose names or keys begin with one of `names`; none given: all that are finished.

    Raises InputError for a name that no run has.
    """
    def called(run: Run, name: str) -> bool:
        return run.path.name.startswith(name) or run.key.startswith(name)

    everything = list_runs(root)
    if unknown := [name for name in names if not any(called(run, name) for run in everything)]:
        raise InputError(f"no run is called {unknown[0]}, nor has such a key: `bagssl runs list` shows them")
    return [run for run in everything if any(called(run, name) for name in names) or not names and run.finished]


def row(run: Run) -> tuple[str, ...]:
    """Name, state, crops, seconds, machine, weights and accuracy of a run, as text; what is damaged stays empty."""
    state = "finished" if run.finished else f"has lost {run.lost[0]}" if run.lost else "not finished"
    weights = "fp32" if (run.path / WEIGHTS).exists() else "fp16" if run.halved else ""
    return (run.path.name, state, known(lambda: f"{run.metrics['crops']:,}"),
            known(lambda: f"{run.metrics['seconds']:,.0f}"), known(lambda: machine(run.provenance["hardware"])),
            weights, known(lambda: "{accuracy:.1f} %, {probe}, {feature}, K = {k}".format(**headline(run))))


def headline(run: Run) -> dict[str, Any] | None:
    """The one row of all that was measured on a run's test images that stands for it: linear before kNN, h before z,
    the largest K, by a probe on all training images if there is one. None when nothing was measured."""
    found = []
    for path in sorted((run.path / "evaluations").glob("*.json")):
        with contextlib.suppress(InputError, KeyError):
            content = read_json(path)
            protocol = content["protocol"]
            if isinstance(protocol["test"], str) and not isinstance(protocol["scale"], list):
                whole = protocol["train"] == run.provenance.get("data")
                found += [((row["probe"] == "linear", row["feature"] == "h", whole, row["k"]), row)
                          for row in content["rows"]]
    return max(found, key=lambda each: each[0])[1] if found else None


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
