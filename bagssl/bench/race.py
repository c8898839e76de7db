"""Works that take turns on one machine, and what is made of their rates."""

import contextlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bagssl import catalogue, data, devices
from bagssl.config import PretrainConfig
from bagssl.paths import cores

Work = Callable[[], int | tuple[int, float]]  # does a piece of work: its units, and the seconds by its own clock
ROUNDS = 5

# What a machine is asked to do. crops: of a training run; product: side of the matrices; cut, embedded, bagged: images
# to augment, to embed with 16 patches, and with 256 by the plain way too; whole: images to embed with 256; seconds: of
# a round; judged and probed: training and test images; coding rate: V, B, D; imported: JPEGs; gathered: images.
CPU = {"encoder": "resnet10", "width": 16, "crops": {16: 25600, 32: 10240}, "batch": 128, "product": 2048,
       "cut": 1024, "embedded": 64, "bagged": 64, "whole": 256, "seconds": 1.0, "judged": (10_000, 2_000),
       "probed": (50_000, 10_000), "coding rate": (20, 100, 1024), "imported": 2400, "gathered": 2048}  # fmt: skip
CUDA = {"encoder": "resnet18", "width": 64, "crops": {32: 204800}, "batch": 512, "product": 8192,
        "cut": 4096, "embedded": 2048, "bagged": 64, "whole": 60_000, "seconds": 1.0, "judged": (50_000, 10_000),
        "probed": (50_000, 10_000), "coding rate": (20, 100, 1024), "imported": 24_000, "gathered": 8192}  # fmt: skip
QUICK = {"crops": {16: 512}, "batch": 64, "product": 256, "cut": 128, "embedded": 8, "bagged": 8, "whole": 8,
         "seconds": 0.02, "judged": (500, 100), "probed": (200, 50), "coding rate": (2, 10, 64),
         "imported": 60, "gathered": 64}  # fmt: skip


class Machine:
    """The device, the real images at hand, and the sizes that suit it."""

    def __init__(self, dataset: str | None = None, quick: bool = False):
        self.device = torch.device(devices.pick_device("auto"))
        self.dtype = devices.pick_precision("auto", self.device)
        self.long = devices.pick_compiled("auto", self.device, devices.COMPILE_FROM)  # what a long run compiles
        self.quick = quick
        self.size = {**(CUDA if self.device.type == "cuda" else CPU), **(QUICK if quick else {})}
        self.cores = cores()
        known = [row["name"] for row in catalogue.status() if row["state"] == "ready"]
        self.dataset = dataset or ("cifar10" if "cifar10" in known else "synthetic")
        self.train, self.test = (data.load(self.dataset, split) for split in ("train", "test"))

    def config(self, size: int, **settings: Any) -> PretrainConfig:
        """The encoder of the bench, trained as lightly's SimCLR is: two multi-scale crops of each image."""
        recipe = {"objective": "simclr", "training": "multi-scale", "size": size, "views": 2,
                  "encoder": self.size["encoder"], "width": self.size["width"], "batch_size": self.size["batch"],
                  "projector_hidden": 256, "projector_dim": 128, "dataset": self.dataset}  # fmt: skip
        return PretrainConfig.from_dict({**recipe, **settings})

    def race(self, works: Mapping[str, Work]) -> dict[str, list[float]]:
        return race(works, self.size["seconds"])


def race(works: Mapping[str, Work], seconds: float, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Units per second of each work in each round: one call to warm up, then calls for `seconds` at least, in turns."""
    for work in works.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            units, elapsed = 0, 0.0
            while elapsed < seconds or not units:
                done, took = timed(work)
                units, elapsed = units + done, elapsed + took
            rates[name].append(units / elapsed)
    return rates


def timed(work: Work) -> tuple[int, float]:
    """Units and seconds of one call."""
    synchronise()
    begun, done = time.perf_counter(), work()
    synchronise()
    return done if isinstance(done, tuple) else (done, time.perf_counter() - begun)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compared(measure: str, rates: Mapping[str, Sequence[float]], unit: str, aim: float | None = None,
             **more: Any) -> dict[str, Any]:
    """A row: the first of two rates over the second."""
    (ours, first), (theirs, second) = rates.items()
    ratios = np.divide(first, second)
    return {"measure": measure, "ours": ours, "theirs": theirs, "unit": unit, "rate": float(np.median(first)),
            "their rate": float(np.median(second)), "ratio": float(np.median(ratios)), "low": float(ratios.min()),
            "high": float(ratios.max()), "rounds": len(ratios), "aim": aim, **more}  # fmt: skip


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def memory_of(machine: Machine, peak: bool = False) -> float:
    """MiB now, from where on the peak counts; or the peak since then. Without /proc the peak of the whole process."""
    if machine.device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM" if peak else "VmRSS"].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 if peak else 0.0
