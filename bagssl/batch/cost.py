"""`bagssl cost`: what an experiment will take, before it is spent.

What is to be done the notebook itself says (rehearsal.py); how fast it goes, a row of `bagssl bench` that was measured
on a machine of the kind. Seconds of a network are its FLOPs over that row's FLOP/s, those of fresh crops in training
grow with their pixels, those of a probe with images and dimensions. Where no row was measured, or of far larger
networks alone, there are no seconds; and what `bench` has no row for (reading from a disk, decoding, figures) is not in
them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import IGNORECASE, fullmatch
from typing import Any

import torch

from bagssl import catalogue, pretraining, runs
from bagssl.batch.experiments import choose, load_experiments
from bagssl.batch.rehearsal import PUBLISHED, Rehearsal, Work, rehearse, trained_flops
from bagssl.batch.stages import resolve, settings
from bagssl.config import PretrainConfig
from bagssl.devices import COMPILE_FROM, pick_precision
from bagssl.errors import InputError, check_choice
from bagssl.paths import home, results_root

MOMENTS = {"sgd": 1, "lars": 1, "adamw": 2}  # what an optimiser keeps for each parameter
SMALLER = 20  # times: networks so much smaller than those measured wait for other things than products
ONE = 2  # crops on which activations are measured, and as many again


@dataclass(frozen=True)
class Row:
    """Work with its price. seconds: None where no rate was measured; source: the row of the bench that gave the rate.

    disk: bytes of the weights that stay; checkpoint: bytes beside them while it trains; memory: bytes of a device.
    """

    work: Work
    seconds: float | None
    source: str
    disk: int = 0
    checkpoint: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Cost:
    """What an experiment will take on machines of one kind."""

    rows: list[Row]
    done: Rehearsal
    machine: str
    absent: str = ""  # a dataset that is not here, and counted as it is published

    @property
    def seconds(self) -> float:
        """Of one device, of all rows that have a rate."""
        return sum(row.seconds or 0.0 for row in self.rows)

    def wall(self, devices: int) -> float:
        """Seconds on so many devices, each with a model and its measurements at a time, the longest first."""
        models: dict[str, float] = {}
        for row in self.rows:
            models[row.work.model] = models.get(row.work.model, 0.0) + (row.seconds or 0.0)
        busy = [0.0] * devices
        for seconds in sorted(models.values(), reverse=True):
            busy[busy.index(min(busy))] += seconds
        return max(busy)


def cost(name: str, profile: str = "smoke", overrides: Mapping[str, Any] | None = None, *, gpus: int | None = None,
         machine: str | None = None, rate: float | None = None, notebooks: Path | None = None) -> Cost:  # fmt: skip
    """What the experiment will take in a profile, with overrides as of `reproduce`.

    gpus: on GPUs, else on this machine; machine: on one of `measured()`. rate: crops trained per second, in the place
    of a measured one. Raises InputError for what is unknown, refused by the notebook, or has no data here.
    """
    (experiment,) = choose(load_experiments(notebooks), [name], profile)
    parameters = resolve(experiment, profile, overrides or {})
    dataset = settings(experiment, parameters).get("dataset")
    there = dataset is None or catalogue.available(dataset)
    if not there and dataset not in PUBLISHED:
        raise catalogue.absent(dataset, None)
    rates = _Rates(*_machine(gpus, machine), rate)
    done = rehearse(experiment.notebook, parameters)
    return Cost([_row(work, rates) for work in done.works.values()], done, rates.name, "" if there else dataset)


def _row(work: Work, rates: "_Rates") -> Row:
    seconds, source = rates.seconds(work)
    if (config := work.config) is None:
        return Row(work, seconds, source)
    model = pretraining.build_model(config)
    weights, state = _bytes(config, model)
    memory = _memory(config, model, rates.half, work.resident) if work.crops else 0
    return Row(work, seconds, source, weights, state * bool(work.crops), memory)


def training_hours(config: PretrainConfig, images: int) -> dict[str, float]:
    """Machine -> hours of a training on so many images, for each machine that `bench` has measured; one device."""
    crops, hours = config.steps(images) * config.crops_per_step, {}
    work = Work("", "training", crops=crops, flops=crops * trained_flops(config), encoder=config.encoder,
                size=config.size, config=config)  # fmt: skip
    for table in measured().values():
        name = runs.machine(table["hardware"])
        seconds, _ = _Rates(name, table).seconds(work)
        if seconds is not None:
            hours[name] = seconds / 3600
    return hours


# ---- rates


def measured() -> dict[str, dict[str, Any]]:
    """The tables of `bagssl bench` by their names: those of this checkout, and among the results."""
    folders = dict.fromkeys([home() / "results" / "bench", results_root() / "bench"])
    return {path.stem: runs.read_json(path) for folder in folders for path in sorted(folder.glob("*.json"))}


def _machine(gpus: int | None, name: str | None) -> tuple[str, dict[str, Any]]:
    """The name of a machine, and its table: the one named, else of this machine, else the first that has a GPU."""
    tables = measured()
    if name is not None:
        check_choice("machine", name, list(tables))
        if gpus and not tables[name]["hardware"]["gpu"]:
            raise InputError(f"machine {name} has no GPU: leave out --gpus, or name another")
        return runs.machine(tables[name]["hardware"]), tables[name]
    here = runs.hardware()
    found = [each for each in tables.values() if not gpus or each["hardware"]["gpu"]]
    own = [each for each in found if runs.machine(each["hardware"]) == runs.machine(here)]
    half = str(pick_precision("auto", torch.device("cuda" if here["gpu"] else "cpu"))).removeprefix("torch.")
    own.sort(key=lambda each: each.get("precision", "float32") != half)  # processors of one name differ in that
    if chosen := own or (found if gpus else []):
        return runs.machine(chosen[0]["hardware"]), chosen[0]
    return "a GPU" if gpus else runs.machine(here), {}


class _Rates:
    """The rates of one machine; `table` as `bench` writes it, {} where nothing was measured."""

    def __init__(self, name: str, table: Mapping[str, Any], crops: float | None = None):
        self.name, self.crops, self.half = name, crops, table.get("precision", "float32") != "float32"
        self.rows = [row for rows in table.get("rows", {}).values() for row in rows]
        self.cuda = bool(table.get("hardware", {}).get("gpu"))

    def seconds(self, work: Work) -> tuple[float | None, str]:
        """How long work takes, and by which row of the bench; None, and a word on it, where there is none."""
        if not work.crops and not work.fits:
            return 0.0, ""
        if work.kind == "training" and self.crops:
            return work.crops / self.crops, f"--rate: {self.crops:,.0f} crops/s"
        return self._probe(work) if work.fits else self._network(work)

    def _network(self, work: Work) -> tuple[float | None, str]:
        found = []
        for row in self.rows:
            match = fullmatch(rf"{work.kind}, (\w+) at (\d+) px: share of .* product rate", row["measure"])
            if match and row["unit"] == "FLOP/s":
                away = abs(math.log(int(match[2]) / work.size)) if work.size else math.inf
                found.append((away, match[1] != work.encoder, row))
            if self.cuda and work.kind == "embedding" and work.largest >= COMPILE_FROM:  # a long pass is compiled
                match = fullmatch(r"[\d,]+ images, \d+ patches of each at (\d+) px: share of .*", row["measure"])
                if match:
                    found.append((abs(math.log(int(match[1]) / work.size)), False, row | {"long": True}))
        if not found:
            return None, "no rate measured"
        if work.kind == "training" and self._smaller(work):
            return None, "no rate measured of networks so small"
        away, other, row = min(found, key=lambda each: (each[0], not each[2].get("long"), each[1]))
        measure = row["measure"].split(": share")[0]
        scaled = ", taken for it by FLOPs" if away or other else ""
        cut, crops = self._augmentation(work) if work.kind == "training" else (0.0, "")
        return work.flops / row["rate"] + cut, f"{measure}: {row['rate']:.3g} FLOP/s{scaled}{crops}"

    def _smaller(self, work: Work) -> bool:
        """Whether a crop takes so much less than one of the networks measured that other things decide its time."""
        measured = []
        for row in self.rows:
            if match := fullmatch(r"training at (\d+) px, fresh crops.*", row["measure"]):
                measured += [each["rate"] / row["rate"] for each in self.rows if each["unit"] == "FLOP/s" and fullmatch(
                    rf"training, \w+ at {match[1]} px: share of .*", each["measure"])]  # fmt: skip
        return bool(measured) and work.flops / work.crops < min(measured) / SMALLER

    def _augmentation(self, work: Work) -> tuple[float, str]:
        """What the crops of a training take before they come to the network; nothing where it was not measured."""
        what = "multi-scale crops" if work.config and work.config.training == "multi-scale" else "patches"
        found = []
        for row in self.rows:
            if match := fullmatch(rf"augmentation, {what} of (\d+) px", row["measure"]):
                found.append((abs(math.log(int(match[1]) / work.size)), int(match[1]), row))
        if not found:
            return 0.0, ""
        _, size, row = min(found, key=lambda each: each[0])
        return (work.crops / row["rate"] * (work.size / size) ** 2,
                f"; augmentation, {what} of {size} px: {row['rate']:,.0f} crops/s")

    def _probe(self, work: Work) -> tuple[float | None, str]:
        for row in self.rows:
            match = fullmatch(rf"{work.kind} probe, ([\d,]+) and ([\d,]+) images x (\d+)", row["measure"], IGNORECASE)
            if match:
                train, test, dim = (int(text.replace(",", "")) for text in match.groups())
                units = [n * d * (t / test if work.kind == "knn" else 1) for n, t, d in work.fits]
                return row["ratio"] * sum(units) / (train * dim), f"{row['measure']}: {row['ratio']:.3g} s"
        return None, "no rate measured"


# ---- disk and memory


def _bytes(config: PretrainConfig, model: pretraining.Model) -> tuple[int, int]:
    """Bytes of a run's weights, and of its checkpoint: weights, the optimiser's moments, the averaged network."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = MOMENTS[config.optimiser] * sum(each.nbytes for each in model.parameters())
    return weights, weights + moments + _teacher(config, model)


def _teacher(config: PretrainConfig, model: pretraining.Model) -> int:
    parts = (model.encoder, model.projector) if config.needs_target else ()
    return sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())


def _memory(config: PretrainConfig, model: pretraining.Model, half: bool, resident: int) -> int:
    """Bytes of a device in training, at least: networks, gradients, moments, activations for all crops of a step, and
    the images that lie there. half: activations of two bytes a number. The model is on the meta device afterwards.
    """
    networks = (2 + MOMENTS[config.optimiser]) * sum(each.nbytes for each in model.parameters())
    networks += _teacher(config, model)
    few, more = (_kept(model.to("meta"), config, crops) for crops in (ONE, 2 * ONE))  # what crops share goes out
    return int(networks + (more - few) / ONE * config.crops_per_step / (1 + half)) + resident


def _kept(model: pretraining.Model, config: PretrainConfig, crops: int) -> int:
    """Bytes that the forward pass of so many crops keeps for the backward pass."""
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage  # held, or its address would be another's
        return tensor

    patches = torch.empty(1, crops, 3, config.size, config.size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.project(patches)
    return sum(storage.nbytes() for storage in seen.values())


# ---- to read


def table(found: Cost, price: float | None = None) -> list[list[str]]:
    """The rows as text under a header, and their sum; the number of a rate is that of `sources`."""
    head = ["MODEL", "WORK", "IMAGES", "CROPS", "FLOP", "READ", "HOURS", "RATE", "DISK", "MEMORY"]
    head += ["EUR"] * bool(price)
    numbers, lines = {source: f"[{n}]" for n, source in enumerate(sources(found), 1)}, [head]
    for row in found.rows:
        work = row.work
        what = f"{work.kind} × {len(work.fits)}" if work.fits else f"{work.kind}, {work.size} px"
        what = "random weights" if work.config and not work.config.epochs else what
        images = work.images or sum(train + test for train, test, _ in work.fits)
        lines.append([work.model, what, *_counts(images, work.crops, work.flops, work.read), _hours(row.seconds),
                      numbers.get(row.source, row.source), size_text(row.disk), size_text(row.memory),
                      *_money(row.seconds, price)])  # fmt: skip
    works, least = [row.work for row in found.rows], _least(found)
    lines.append(["sum", f"{len(found.rows)} works", *_counts(
        *(sum(getattr(work, name) for work in works) for name in ("images", "crops", "flops", "read"))),
        least + _hours(found.seconds), "", size_text(sum(row.disk for row in found.rows)),
        size_text(max((row.memory for row in found.rows), default=0)),
        *(least + money for money in _money(found.seconds, price))])  # fmt: skip
    return lines


def _least(found: Cost) -> str:
    return "≥ " * (bool(found.done.ended) or any(row.seconds is None for row in found.rows))


def sources(found: Cost) -> list[str]:
    """The rows of the bench, or what was given, that rates come from; in the order in which they are used."""
    return list(dict.fromkeys(row.source for row in found.rows if row.seconds is not None and row.source))


def notes(found: Cost, gpus: int | None, price: float | None) -> list[str]:
    """What the table does not say: where rates come from, what costs nothing, what is not in it."""
    lines = [f"[{n}] {found.machine}: {source}" for n, source in enumerate(sources(found), 1)]
    if any(row.seconds is None for row in found.rows):
        known = ", ".join(measured()) or "none"
        lines.append(f"no rate measured on {found.machine}: not in the sum; `bagssl bench` there, give --rate, or "
                     f"--machine; measured: {known}")  # fmt: skip
    if found.absent:
        side, classes, counts = PUBLISHED[found.absent]
        lines.append(f"{found.absent} is not here, and counted as it is published: {counts['train']:,} and "
                     f"{counts['test']:,} images of {classes:,} classes, imported at {side} px")  # fmt: skip
    done = found.done
    lines.append(f"in the store, and costs nothing: models {len(done.models)}, measurements {len(done.evaluations)}")
    if done.ended:
        lines.append(f"counted up to {done.ended}: what comes after it is not in the table, which is the least")
    if checkpoint := max((row.checkpoint for row in found.rows), default=0):
        lines.append(f"disk: beside it up to {size_text(checkpoint)} for the checkpoint of each model in training; "
                     "memory: of a device, at least, the most in the sum; where one has less, several processes "
                     "share a model, or --recompute")  # fmt: skip
    if gpus:
        wall = found.wall(gpus)
        paid = f"; {gpus} held so long: {_least(found)}{_money(wall * gpus, price)[0]} EUR" if price else ""
        lines.append(f"{gpus} GPU{'s' * (gpus > 1)}, each with one model at a time: {_least(found)}{_hours(wall)} "
                     f"hours{paid}")  # fmt: skip
    return lines


def _counts(*counts: float) -> list[str]:
    images, crops, flops, read = counts
    return [f"{images:,}", f"{crops:,}", f"{flops:.3g}", size_text(read)]


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 3600:.3g}"


def _money(seconds: float | None, price: float | None) -> Sequence[str]:
    return [] if not price else [""] if seconds is None else [f"{seconds / 3600 * price:.2f}"]


def size_text(count: float) -> str:
    """Bytes to read: 0, 12.3 MB, 4.56 GB."""
    power = min(int(math.log10(count)) // 3, 5) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}" if count else "0"
