"""`bagssl bench`: what is fast and what is not, as ratios measured side by side in one run.

The things compared take turns, round by round, so that whatever else the machine is doing falls on both. A ratio is the
median over rounds, with the lowest and the highest beside it; rates are medians too. Nothing here is a test: a
machine that is shared or hot shows other figures, and says so by its spread.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bagssl import runs
from bagssl.batch.stages import package_hash
from bagssl.bench.embedding import aggregation, coding_rate, growth, memory, probing
from bagssl.bench.feeding import gathering, importing
from bagssl.bench.race import Machine
from bagssl.bench.ranks import processes
from bagssl.bench.training import augmentation, compiled, native_size, online, training, utilisation
from bagssl.errors import InputError, Stopped
from bagssl.paths import results_root, write_text
from bagssl.study import tables

ROWS: dict[str, Callable[[Machine], Iterator[dict]]] = {
    "augmentation": augmentation, "training": training, "native-size": native_size, "online": online,
    "utilisation": utilisation, "aggregation": aggregation, "coding-rate": coding_rate, "growth": growth,
    "memory": memory, "probes": probing, "compiled": compiled, "import": importing,
    "gathering": gathering, "processes": processes,
}  # fmt: skip


def bench(names: Sequence[str] = (), dataset: str | None = None, quick: bool = False, output: Path | None = None,
          time_limit: float | None = None) -> Path:
    """Measure rows (none: all), show them as they come, and write results/bench/<machine>.json, and .md to read.

    quick: sizes that only show that everything runs; nothing is kept then but under `output`. Rows that are not
    measured again stay as they stand in the file. time_limit: seconds after which no further row is begun; rows that
    this very code measured before are then left out, so that a repeated call gets to the end. Raises Stopped when rows
    are left, InputError for a row that does not exist.
    """
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    if wrong := [name for name in names if name not in ROWS]:
        raise InputError(f"no row {wrong[0]!r} in the bench: choose among {', '.join(ROWS)}")
    machine = Machine(dataset, quick)
    made = runs.provenance()
    precision = str(machine.dtype).removeprefix("torch.")
    path = Path(output) if output else results_root() / "bench" / f"{_slug(made['hardware'], precision)}.json"
    record = {"rows": {}} if not path.exists() else runs.read_json(path)
    todo = list(names or ROWS)
    sources = package_hash(without=frozenset())
    if time_limit is not None and (output or not quick):
        todo = [name for name in todo if {sources} != {row.get("sources") for row in record["rows"].get(name, [])}]
    for i, name in enumerate(todo):
        if time.monotonic() > deadline:
            left = ", ".join(todo[i:])
            raise Stopped(f"bench: the time is up, {left} left; the next call with a time limit goes on from there")
        made_by, found = {**{key: made[key] for key in ("commit", "dirty", "time", "versions")}, "sources": sources}, []
        for row in ROWS[name](machine):
            found.append({**row, "dataset": machine.dataset, **made_by})
            print(line(row), flush=True)
        record["rows"][name] = found
        record |= {"hardware": made["hardware"], "precision": precision}
        if output or not quick:
            path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_json(path, record)
            write_text(path.with_suffix(".md"), tables.markdown(table(record)))
    return path


def line(row: Mapping[str, Any]) -> str:
    """One row for a terminal."""
    spread = f" ({row['low']:.3g} to {row['high']:.3g})" if "low" in row else ""
    rates = f": {row['rate']:.4g} over {row['their rate']:.4g} {row['unit']} ({row['theirs']})" if "rate" in row else ""
    aim = f", asked {_asked(row)}" if _asked(row) != tables.DASH else ""
    equal = (f"; kNN {row['kNN']:.1f} and {row['their kNN']:.1f}, difference {row['kNN difference']:+.2f} ± "
             f"{row['standard error']:.2f}") if "kNN" in row else ""  # fmt: skip
    return f"{row['measure']}: {row['ratio']:.3g}{spread}{aim}{rates}{equal}"


def table(record: Mapping[str, Any]) -> pd.DataFrame:
    """The record as a table to show, all of it text."""
    def shown(row: Mapping[str, Any]) -> dict[str, str]:
        sign = {"s": " s", "c": ""}.get(row["unit"], " ×")
        spread = f" ({row['low']:.3g} to {row['high']:.3g})" if "low" in row else ""
        rates = f"{_short(row['rate'])} / {_short(row['their rate'])} {row['unit']}" if "rate" in row else tables.DASH
        judged = f"{row['kNN difference']:+.1f} ± {row['standard error']:.1f}" if "kNN" in row else tables.DASH
        return {"measure": row["measure"], "value": f"{row['ratio']:.3g}{sign}{spread}",
                "asked": _asked(row), "ours / theirs": rates,
                "theirs": row.get("theirs", tables.DASH), "kNN, ours - theirs": judged}  # fmt: skip

    return pd.DataFrame([shown(row) for name in ROWS for row in record["rows"].get(name, ())])


def _asked(row: Mapping[str, Any]) -> str:
    return f"{row['aim']:g}" if row.get("aim") else f"≤ {row['most']:g}" if row.get("most") else tables.DASH


def _short(rate: float) -> str:
    return f"{rate / 1e9:.3g} G" if rate >= 1e9 else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _slug(hardware: Mapping[str, Any], precision: str) -> str:
    """A machine's name in files; processors of one name may be several times as fast if they multiply in bfloat16."""
    words = hardware["gpu"] or f"{hardware['processor']} {hardware['cores']} cores"
    words += " bfloat16" * (precision == "bfloat16" and not hardware["gpu"])
    return "-".join(re.findall(r"[^\W_]+", words.lower()))
