"""One run in full, and several side by side: for `bagssl runs show` and `bagssl runs compare`."""

import csv
import functools
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from bagssl import catalogue, records, runs
from bagssl.config import PretrainConfig
from bagssl.errors import InputError
from bagssl.paths import data_root, write_text
from bagssl.runs import Run, known, machine

BLOCKS = "▁▂▃▄▅▆▇█"
_LEAST = {"k": 0, "probe": "", "feature": "", "accuracy": 0.0, "low": 0.0, "high": 0.0}


# ---- settings


def settings(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that differ from the defaults, then those that do not. Raises InputError for a damaged config."""
    defaults = {each.name: {} if each.default is MISSING else each.default for each in fields(PretrainConfig)}
    every = {**defaults, **run.config}
    own = {name: value for name, value in every.items() if name not in defaults or value != defaults[name]}
    return own, {name: value for name, value in every.items() if name not in own}


def _text(value: Any) -> str:
    """A setting as it would be written behind `--set`."""
    return value if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


# ---- what was measured


def accuracies(run: Run) -> dict[tuple, dict[str, Any]]:
    """(protocol, K, probe, feature) -> the row of an evaluation; by the same protocol on two runs, the same key.

    The protocol is all that decides what is measured but the encoder: its weights and the size that it takes. A
    damaged evaluation is left out.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for path in sorted((run.path / "evaluations").glob("*.json")):
        content = known(lambda path=path: runs.read_json(path), {})
        protocol, rows = content.get("protocol"), content.get("rows")
        for row in rows if isinstance(protocol, dict) and isinstance(rows, list) else ():
            if isinstance(row, dict) and all(isinstance(row.get(name), type(least)) for name, least in _LEAST.items()):
                found[(_protocol(protocol, row["k"]), row["k"], row["probe"], row["feature"])] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][3], item[0][2] != "linear", item[0][1], item[0][0])))


def _protocol(protocol: dict[str, Any], k: int) -> str:
    aside = ("ks", "probes", "features", "weights", "rounded", "size", "top5")
    kept = {name: value for name, value in protocol.items() if name not in aside}
    if not k and kept.get("pool") is None:  # the whole image has no scale
        kept.pop("scale", None)
    return json.dumps(kept, sort_keys=True)


def _named(key: tuple) -> str:
    """`K = 16 at 0.25, linear, h; train 3f2a91c0, test all of cifar10`."""
    protocol, (k, probe, feature) = json.loads(key[0]), key[1:]
    what = f"K = {k} at {_scales(protocol.get('scale'))}" if k else "centre crop"
    more = [f"{name} {protocol[name]}" for name in ("pool", "crop") if name in protocol]
    more += ["coloured"] * bool(protocol.get("colour")) + [f"seed {protocol['seed']}"] * bool(protocol.get("seed"))
    images = ", ".join(f"{split} {_images(protocol.get(split))}" for split in ("train", "test"))
    return f"{', '.join([what, probe, feature, *more])}; {images}"


def _scales(scale: Any) -> str:
    return " and ".join(f"{each:g}" for each in (scale if isinstance(scale, list) else [scale]))


@functools.cache
def _splits(root: Path) -> dict[str, str]:
    """SHA-256 -> the dataset of which it is all of a split; of those that are at hand."""
    found = {name: known(lambda name=name: catalogue.recorded(name, root), None) or {}
             for name in catalogue.names(root)}  # fmt: skip
    return {digest: f"all of {name}" for name, splits in found.items() for digest in splits.values()}


def _images(told: Any) -> str:
    if isinstance(told, str) and (whole := _splits(data_root()).get(told)):
        return whole
    return told[:8] if isinstance(told, str) else f"{told['held_out']:g} held out" if isinstance(told, dict) else "?"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


# ---- one run


def show(run: Run) -> str:
    """All that is known of a run, whatever state it is in; what is damaged is left out."""
    own, usual = known(lambda: settings(run), ({}, {}))
    about = [(name, text) for name, text in _about(run) if text]
    state = repr(run).removesuffix(">").partition(": ")[2].partition("; ")[0]
    lines = [run.path.name, state, ""]
    lines += _aligned([("settings", ""), *((f"  {name}", _text(value)) for name, value in own.items())])
    lines += ["  as by default: " + ", ".join(f"{name}={_text(value)}" for name, value in usual.items())] * bool(usual)
    lines += _aligned(about)
    measured = [(f"  {_named(key)}", _interval(row)) for key, row in accuracies(run).items()]
    lines += ["accuracy, per cent (95 %)", *_aligned(measured)] if measured else ["accuracy   not measured"]
    return "\n".join(lines)


def _about(run: Run) -> Iterator[tuple[str, str]]:
    """Name and text of each further line."""
    yield "data", known(lambda: _data(run))
    yield "machine", known(lambda: _machine(run))
    yield "crops", known(lambda: _crops(run))
    yield "final", known(lambda: ", ".join(f"{name} {value:.4g}" for name, value in run.metrics["final"].items()))
    yield "loss", curve([row.get("loss", math.nan) for row in runs.known_history(run)])
    yield "on disk", f"{size(run):,} bytes" + known(lambda: _weights(run))
    yield "lies in", _place(run)
    yield "load", f'bagssl.load("{run.path.name}")' if run.finished else "not yet: train it to its end"


def _data(run: Run) -> str:
    images = known(lambda: f"{run.metrics['images']:,} images, ")
    return f"{run.config['dataset']}, {images}SHA-256 {runs.read_json(run.path / 'config.json')['data'][:16]}…"


def _machine(run: Run) -> str:
    record = run.provenance
    more = [f"{record['processes']} processes"] if "processes" in record else []
    return ", ".join([machine(record["hardware"]), str(record["precision"]), *more,
                      f"commit {str(record['commit'])[:12]}", f"torch {record['versions']['torch']}"])  # fmt: skip


def _crops(run: Run) -> str:
    about, rate = run.metrics, speed(run)
    return (f"{about['crops']:,} in {about['steps']:,} steps, {about['epochs']:g} epochs, {about['seconds']:,.0f} s"
            + f", {rate:,.0f} a second" * bool(rate))  # fmt: skip


def _weights(run: Run) -> str:
    return ", weights as trained" if run.has_weights and not run.halved else ", weights as fp16" * run.halved


def _place(run: Run) -> str:
    also = records.recorded(run.path.name)
    beside = f"; as well {also}" if also and also.absolute() != run.path.absolute() else ""
    return f"{run.path}{', of the record' * (run.path.parent in records.roots())}{beside}"


def speed(run: Run) -> float | None:
    """Crops a second over a finished training; None for one that took no step."""
    return known(lambda: run.metrics["crops"] / run.metrics["seconds"] if run.metrics["crops"] else None, None)


def size(run: Run) -> int:
    """Bytes of all its files."""
    return sum(known(lambda path=path: path.stat().st_size, 0) for path in run.path.rglob("*") if path.is_file())


def curve(values: Sequence[float], width: int = 48) -> str:
    """`█▆▄▃▂▁ 5.123 to 1.234`: the means of as many pieces, from lowest to highest; empty for less than two."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    pieces = [finite[i * len(finite) // count : (i + 1) * len(finite) // count] for i in range(count)]
    means = [sum(piece) / len(piece) for piece in pieces]
    low, reach = min(means), (max(means) - min(means)) or 1
    drawn = "".join(BLOCKS[round((mean - low) / reach * (len(BLOCKS) - 1))] for mean in means)
    return f"{drawn} {finite[0]:.4g} to {finite[-1]:.4g}"


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    widest = max([len(name) for name, _ in rows], default=0)
    return [f"{name.ljust(widest)}   {text}".rstrip() for name, text in rows]


# ---- several


def compare(chosen: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of section, name and a text for each run: settings that differ, training, final terms, accuracies.

    Of accuracies those that were measured by the same protocol on two of them or more, with the ends of the interval
    in sections of their own; empty where there is none. Raises InputError for less than two runs, or a damaged config.
    """
    if len({run.path.name for run in chosen}) < max(2, len(chosen)):
        raise InputError("name at least two runs, and each once")
    every = [own | usual for own, usual in map(settings, chosen)]
    data = [known(lambda run=run: runs.read_json(run.path / "config.json")["data"][:16]) for run in chosen]
    rows = [("setting", name, *(_text(each[name]) if name in each else "" for each in every))
            for name in dict.fromkeys(name for each in every for name in each)]  # fmt: skip
    rows = [row for row in [*rows, ("setting", "data", *data)] if len(set(row[2:])) > 1]
    for name in ("crops", "seconds", "steps"):
        rows.append(("training", name, *(str(known(lambda run=run: run.metrics[name])) for run in chosen)))  # noqa: B023
    rates = [speed(run) for run in chosen]
    rows.append(("training", "crops a second", *(f"{rate:.0f}" if rate else "" for rate in rates)))
    machines = [known(lambda run=run: machine(run.provenance["hardware"])) for run in chosen]
    rows.append(("training", "machine", *machines))
    finals = [known(lambda run=run: dict(run.metrics["final"]), {}) for run in chosen]
    rows += [("final", name, *(_short(each.get(name, "")) for each in finals))
             for name in dict.fromkeys(name for each in finals for name in each)]  # fmt: skip
    measured = [accuracies(run) for run in chosen]
    for key in dict.fromkeys(key for each in measured for key in each):
        if sum(key in each for each in measured) > 1:
            rows += [(section, _named(key), *(f"{each[key][name]:.4f}" if key in each else "" for each in measured))
                     for section, name in (("accuracy", "accuracy"), ("from", "low"), ("to", "high"))]  # fmt: skip
    return rows


def side_by_side(chosen: Sequence[Run], rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """What `compare` found, for a terminal: a letter for each run, an accuracy and its interval in one cell."""
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(chosen))]
    found, before = [("", "", *letters)], ""
    for i, (section, name, *texts) in enumerate(rows):
        if section in ("from", "to"):
            continue
        if section == "accuracy":
            cells = zip(texts, rows[i + 1][2:], rows[i + 2][2:], strict=True)
            texts = [f"{float(value):.2f} ({float(low):.2f} to {float(high):.2f})" if value else "–"
                     for value, low, high in cells]  # fmt: skip
        found.append((section if section != before else "", name, *(text or "–" for text in texts)))
        before = section
    return found


def write_csv(path: str | Path, chosen: Sequence[Run], rows: Sequence[tuple[str, ...]]) -> None:
    """Write what `compare` found as a table: section, name, and a column for each run."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows([("section", "name", *(run.path.name for run in chosen)), *rows])
    write_text(path, stream.getvalue())
