"""`bagssl bench`: what is fast and what is not, as ratios measured side by side in one run.

The things compared take turns, round by round, so that whatever else the machine is doing falls on both. A ratio is the
median over rounds, with the lowest and the highest beside it; rates are medians too. Nothing here is a test: a
machine that is shared or hot shows other figures, and says so by its spread.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import conv3x3

from bagssl import bags, data, devices, objectives, patches, pretraining, probes, runs
from bagssl.augmentation import Augmentation
from bagssl.batch.stages import package_hash
from bagssl.config import PretrainConfig
from bagssl.encoders import Conv3x3, build_encoder, build_projector
from bagssl.errors import InputError, Stopped
from bagssl.paths import cores, results_root, write_atomically
from bagssl.study import figures

Work = Callable[[], int | tuple[int, float]]  # does a piece of work; how many units it was, and seconds by its own clock
ROUNDS = 5

# What a machine is asked to do. crops: of a training run; product: side of the matrices; cut, embedded, bagged: images
# to augment, to embed with 16 patches, and with 256 by the plain way too; whole: images to embed with 256; seconds: of
# a round; judged and probed: training and test images; coding rate: V, B, D.
CPU = {"encoder": "resnet10", "width": 16, "crops": {16: 25600, 32: 10240}, "batch": 128, "product": 2048,
       "cut": 1024, "embedded": 64, "bagged": 64, "whole": 256, "seconds": 1.0, "judged": (10_000, 2_000),
       "probed": (50_000, 10_000), "coding rate": (20, 100, 1024)}  # fmt: skip
CUDA = {"encoder": "resnet18", "width": 64, "crops": {32: 409600}, "batch": 512, "product": 8192,
        "cut": 4096, "embedded": 2048, "bagged": 64, "whole": 60_000, "seconds": 1.0, "judged": (50_000, 10_000),
        "probed": (50_000, 10_000), "coding rate": (20, 100, 1024)}  # fmt: skip
QUICK = {"crops": {16: 512}, "batch": 64, "product": 256, "cut": 128, "embedded": 8, "bagged": 8, "whole": 8, "seconds": 0.02,
         "judged": (500, 100), "probed": (200, 50), "coding rate": (2, 10, 64)}  # fmt: skip


def race(works: Mapping[str, Work], seconds: float, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Units per second of each work in each round: one call to warm up, then calls for `seconds` at least, in turns."""
    for work in works.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            units, elapsed = 0, 0.0
            while elapsed < seconds or not units:
                done, took = _timed(work)
                units, elapsed = units + done, elapsed + took
            rates[name].append(units / elapsed)
    return rates


def _timed(work: Work) -> tuple[int, float]:
    """Units and seconds of one call."""
    _synchronise()
    begun, done = time.perf_counter(), work()
    _synchronise()
    return done if isinstance(done, tuple) else (done, time.perf_counter() - begun)


def compared(measure: str, rates: Mapping[str, Sequence[float]], unit: str, aim: float | None = None,
             **more: Any) -> dict[str, Any]:
    """A row: the first of two rates over the second."""
    (ours, first), (theirs, second) = rates.items()
    ratios = np.divide(first, second)
    return {"measure": measure, "ours": ours, "theirs": theirs, "unit": unit, "rate": float(np.median(first)),
            "their rate": float(np.median(second)), "ratio": float(np.median(ratios)), "low": float(ratios.min()),
            "high": float(ratios.max()), "rounds": len(ratios), "aim": aim, **more}  # fmt: skip


class Machine:
    """The device, the real images at hand, and the sizes that suit it."""

    def __init__(self, dataset: str | None = None, quick: bool = False):
        self.device = torch.device(devices.pick_device("auto"))
        self.dtype = devices.pick_precision("auto", self.device)
        self.quick = quick
        self.size = {**(CUDA if self.device.type == "cuda" else CPU), **(QUICK if quick else {})}
        self.cores = cores()
        known = [row["name"] for row in data.status() if row["state"] == "ready"]
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


# ---- 1. augmentation


class _Pictures(torch.utils.data.Dataset):
    """PIL pictures, each given to `transform`, as peers' pipelines read a dataset."""

    def __init__(self, images: data.Images, transform: Callable):
        from torchvision.transforms.functional import to_pil_image

        self.pictures, self.transform = [to_pil_image(picture) for picture in images.pixels], transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.pictures[index])


def _torchvision(a: Augmentation) -> Callable:
    from torchvision import transforms as T

    jitter = T.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
    return T.Compose([T.RandomResizedCrop(a.size, a.scale, a.ratio), T.RandomHorizontalFlip(a.flip),
                      T.RandomApply([jitter], a.jitter), T.RandomGrayscale(a.grey), T.ToTensor()])  # fmt: skip


def _lightly(config: PretrainConfig) -> Callable:
    """lightly's SimCLR transform with the strengths of `config`, without blur and without a dataset's mean."""
    from lightly.transforms import SimCLRTransform

    strengths = {"cj_bright": config.brightness, "cj_contrast": config.contrast, "cj_sat": config.saturation}
    return SimCLRTransform(input_size=config.size, cj_prob=config.jitter, cj_hue=config.hue, **strengths,
                           min_scale=config.min_scale, random_gray_scale=config.grey, gaussian_blur=0.0,
                           hf_prob=config.flip, normalize=None)  # fmt: skip


def _loader(machine: Machine, pictures: _Pictures, batch: int, workers: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(pictures, batch, shuffle=True, drop_last=True, num_workers=workers,
                                       persistent_workers=workers > 0, pin_memory=machine.device.type == "cuda")


def _fastest(machine: Machine, work: Callable[[int], int]) -> int:
    """The number of a loader's workers with which `work` is fastest here."""
    counts = (0, 1, machine.cores) if machine.cores <= 4 else (machine.cores // 2, machine.cores)
    rates = {workers: max(race({"": partial(work, workers)}, 0.0, 2)[""]) for workers in counts}
    return max(rates, key=rates.get)


def _peer(machine: Machine, images: data.Images, transform: Callable, views: int) -> tuple[str, Work]:
    """A pass over the images by a loader with the best number of workers."""
    pictures, loaders = _Pictures(images, transform), {}

    def work(workers: int) -> int:
        if workers not in loaders:
            loaders[workers] = _loader(machine, pictures, 64, workers)
        return views * 64 * sum(1 for _ in loaders[workers])

    workers = _fastest(machine, work)
    for other in set(loaders) - {workers}:
        del loaders[other]  # and with it its processes
    return f"{workers} workers", partial(work, workers)


def augmentation(machine: Machine) -> Iterator[dict]:
    """Crops per second of the whole machine, ours against torchvision's and lightly's per-image pipelines on PIL."""
    images = machine.train.take(torch.arange(min(len(machine.train), machine.size["cut"])))
    pixels, generator = images.pixels.to(machine.device), torch.Generator(machine.device)
    for size, aim in ((16, 10), (32, 4)):
        fixed, multi = machine.config(size, training="patch-based").augmentation(), machine.config(size)
        cases = [("patches", fixed, "torchvision", _torchvision(fixed), 1, aim),
                 ("multi-scale crops", multi.augmentation(), "lightly's SimCLRTransform", _lightly(multi), 2, None)]
        for crops, a, peer, transform, views, wanted in cases:

            def ours(a=a) -> int:
                return patches.augment(pixels, 2, a, generator)[:, :, 0, 0, 0].numel()

            workers, theirs = _peer(machine, images, transform, views)
            rates = machine.race({"bagssl": ours, f"{peer}, {workers}": theirs})
            yield compared(f"augmentation, {crops} of {size} px", rates, "crops/s", wanted)


# ---- 2. the training step


def _lightly_run(machine: Machine, config: PretrainConfig, pictures: _Pictures, steps: int, workers: int) -> nn.Module:
    """SimCLR as lightly's examples have it, on our encoder and schedule: the trained encoder.

    Tuned as ours is where that takes no code of its own: channels last, a fused optimiser, pinned memory.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    encoder = build_encoder(config.encoder, config.width, config.seed, conv3x3)  # torchvision's: none of our short cuts
    encoder = encoder.to(machine.device, memory_format=torch.channels_last)
    torch.manual_seed(config.seed)
    head = SimCLRProjectionHead(encoder.dim, config.projector_hidden, config.projector_dim).to(machine.device)
    criterion = NTXentLoss(temperature=0.5)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], weight_decay=config.weight_decay, fused=True)
    loader, step = _loader(machine, pictures, config.batch_size, workers), 0
    while step < steps:
        for views in loader:
            for group in optimiser.param_groups:
                group["lr"] = pretraining.learning_rate_at(step, steps, config)
            with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
                z = [head(encoder(view.to(machine.device, non_blocking=True, memory_format=torch.channels_last))) for view in views]
            loss = criterion(*(each.float() for each in z))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step == steps:
                break
    return encoder


def _accuracy(machine: Machine, encoder: nn.Module, size: int, k: int) -> float:
    """kNN accuracy in per cent of bags of k (0: the centre crops) of some of the test images."""
    train, test = (data.subset(images, min(len(images), count))
                   for images, count in zip((machine.train, machine.test), machine.size["judged"], strict=True))
    h = [bags.embed_bags(encoder, images.pixels, [k], scale=0.25, size=size, device=machine.device)[k]
         for images in (train, test)]  # fmt: skip
    return probes.knn(h[0], train.labels, h[1], test.labels).value


def training(machine: Machine) -> Iterator[dict]:
    """Whole runs of as many crops, ours against lightly's pipeline, from the images to the last step; then kNN.

    lightly's has the number of workers that is fastest here.
    """
    aims = {16: 2.0, 32: 1.3} if machine.device.type == "cpu" else {32: 2.5}
    for size, crops in machine.size["crops"].items():
        pictures = _Pictures(machine.train, _lightly(machine.config(size)))

        def ours(seed: int, steps: int, size=size) -> nn.Module:
            return _trained(machine, machine.config(size, seed=seed), steps)

        def theirs(seed: int, steps: int, workers: int, size=size, pictures=pictures) -> nn.Module:
            return _lightly_run(machine, machine.config(size, seed=seed), pictures, steps, workers)

        few = max(2, crops // (20 * machine.size["batch"]))
        workers = _fastest(machine, lambda n, few=few, theirs=theirs: bool(theirs(0, few, n)))
        ways = {"bagssl": (ours, size), f"lightly, {workers} workers": (partial(theirs, workers=workers), size)}
        yield _judged(machine, f"training, {machine.size['encoder']} at {size} px", ways, crops, 0, aims.get(size))


def native_size(machine: Machine) -> Iterator[dict]:
    """Patches trained and embedded at their own size, against the same patches enlarged to twice their side."""
    native, crops = patches.native_size(0.25, *machine.train.pixels.shape[2:]), min(machine.size["crops"].values())

    def way(size: int) -> tuple[Callable, int]:
        return lambda seed, steps: _trained(machine, machine.config(size, seed=seed, training="patch-based"), steps), size

    ways = {f"{size} px": way(size) for size in (native, 2 * native)}
    yield _judged(machine, f"training on patches of {native} px, not enlarged", ways, crops, 16, None)


def _trained(machine: Machine, config: PretrainConfig, steps: int) -> nn.Module:
    return _run(machine, config, steps)[1]


def _run(machine: Machine, config: PretrainConfig, steps: int) -> tuple[float, nn.Module]:
    """Seconds from the first step to the last, and the encoder."""
    config = replace(config, epochs=steps / (len(machine.train) // config.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        run = pretraining.pretrain(config, machine.train, Path(folder), progress=False)
        return run.metrics["seconds"], pretraining.load_encoder(run, machine.device)


def _judged(machine: Machine, measure: str, ways: Mapping[str, tuple[Callable[[int, int], nn.Module], int]], crops: int,
            k: int, aim: float | None) -> dict:
    """Two ways (seed, steps -> trained encoder, and the size of its input) to train on as many crops: a row with the
    kNN accuracy of bags of k, and its paired difference over seeds."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    accuracies: dict[str, list[float]] = {name: [] for name in ways}
    per_step = 2 * machine.size["batch"]
    for seed in range(ROUNDS + 1):  # the first warms up
        steps = max(1, crops // per_step) if seed else 2
        for name, (train, size) in ways.items():
            _synchronise()
            begun = time.perf_counter()
            encoder = train(seed, steps)
            _synchronise()
            if seed:
                rates[name].append(steps * per_step / (time.perf_counter() - begun))
                accuracies[name].append(_accuracy(machine, encoder, size, k))
    mine, others = accuracies.values()
    difference = np.subtract(mine, others)
    return compared(measure, rates, "crops/s", aim, **{
        "kNN": float(np.mean(mine)), "their kNN": float(np.mean(others)), "kNN difference": float(difference.mean()),
        "standard error": float(difference.std(ddof=1) / len(difference) ** 0.5)})  # fmt: skip


# ---- 3. and 4. the share of the machine, and what fresh crops cost


def _flops(config: PretrainConfig, *, backward: bool) -> float:
    """Floating-point operations per crop of the encoder, and of the projector where it is trained."""
    encoder = build_encoder(config.encoder, config.width)
    projector = build_projector(config.objective, encoder.dim, config.projector_hidden, config.projector_dim)
    crops = torch.rand(2, 3, config.size, config.size)
    with FlopCounterMode(display=False) as counter:
        if backward:
            projector(encoder(crops)).sum().backward()
        else:
            encoder(crops)
    return counter.get_total_flops() / len(crops)


def _product(machine: Machine) -> Work:
    """A product of two square matrices, in floating-point operations."""
    n = machine.size["product"]
    a, b = (torch.rand(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))

    def work() -> int:
        torch.mm(a, b)
        return 2 * n**3

    return work


def _steps(machine: Machine, config: PretrainConfig, count: int) -> Work:
    """A run of `count` steps, a new seed each time: crops, and the seconds from the first step to the last.

    It logs as rarely as a long run does: a log waits for the device.
    """
    seeds = iter(range(10**9))

    def work() -> tuple[int, float]:
        with mock.patch.object(pretraining, "LOGS", 10):
            seconds, _ = _run(machine, replace(config, seed=next(seeds)), count)
        return count * config.views * config.batch_size, seconds

    return work


def utilisation(machine: Machine) -> Iterator[dict]:
    """The share of the machine's own rate of matrix products that training and embedding reach; fresh crops' cost."""
    for size in machine.size["crops"]:
        yield from _shares(machine, machine.config(size))
        yield _fresh(machine, machine.config(size))


def _shares(machine: Machine, config: PretrainConfig) -> Iterator[dict]:
    kind, encoder = str(machine.dtype).removeprefix("torch."), build_encoder(config.encoder, config.width)
    pixels, work = machine.train.pixels[: machine.size["embedded"]], {f"{kind} product": _product(machine)}
    step, embed = _steps(machine, config, _count(machine, config)), _embed(machine, encoder, pixels, 16, config.size)
    per_step, per_crop = _flops(config, backward=True), _flops(config, backward=False)

    def operations() -> tuple[int, float]:
        crops, seconds = step()
        return int(crops * per_step), seconds

    work |= {"training": operations, "embedding": lambda: int(embed() * per_crop)}
    rates = machine.race(work)
    (kind, by), *ours = rates.items()
    aims = (0.30, 0.40) if machine.device.type == "cuda" else (None, None)
    for (name, mine), aim in zip(ours, aims, strict=True):
        measure = f"{name}, {config.encoder} at {config.size} px: share of the {kind} rate"
        yield compared(measure, {name: mine, kind: by}, "FLOP/s", aim)


def _fresh(machine: Machine, config: PretrainConfig) -> dict:
    kept: dict[int, Tensor] = {}

    def cached(batch: Tensor, *how: Any) -> Tensor:
        if len(batch) not in kept:
            kept[len(batch)] = patches.augment(batch, *how)
        return kept[len(batch)]

    fresh = _steps(machine, config, _count(machine, config))

    def stale() -> int:
        with mock.patch.object(pretraining, "augment", cached):
            return fresh()

    rates = machine.race({"fresh crops": fresh, "the same crops again": stale})
    aim = 0.95 if machine.device.type == "cuda" else None
    return compared(f"training at {config.size} px, fresh crops for each step", rates, "crops/s", aim)


def _count(machine: Machine, config: PretrainConfig) -> int:
    """Steps of a run that is short, but long against its beginning and end."""
    return max(2, machine.size["crops"][config.size] // (4 * config.views * config.batch_size))


def compiled(machine: Machine) -> Iterator[dict]:
    """Training with what `torch.compile` makes of a step, against the same as it stands; compiling does not count."""
    size = min(machine.size["crops"])
    config = machine.config(size)
    work = _steps(machine, config, _count(machine, config))

    def under(name: str) -> Work:
        def do() -> int:
            with mock.patch.dict(os.environ, BAGSSL_COMPILE=name):
                return work()
        return do

    for name in devices.COMPILED[1:]:
        if name == "graphs" and machine.device.type != "cuda":
            continue
        rates = machine.race({f"compiled: {name}": under(name), "as it stands": under("none")})
        yield compared(f"training at {size} px, compiled: {name}", rates, "crops/s")


# ---- 5. aggregation


def _embed(machine: Machine, encoder: nn.Module, pixels: Tensor, k: int, size: int) -> Work:
    ks = sorted({1, 4, 16, 64, k} & set(range(k + 1)))

    def work() -> int:
        bags.embed_bags(encoder, pixels, ks, scale=0.25, size=size, device=machine.device)
        return k * len(pixels)

    return work


def aggregation(machine: Machine) -> Iterator[dict]:
    """Bags of K = 1, 4, 16, 64, 256, against a pass for each K over crops that are cut one image at a time."""
    from torchvision.transforms import functional as F

    ks, size = (1, 4, 16, 64, 256), min(machine.size["crops"])
    pixels = machine.train.pixels[: machine.size["bagged"]]
    encoder, stock = (build_encoder(machine.size["encoder"], machine.size["width"], conv=conv).to(machine.device).eval()
                      for conv in (Conv3x3, conv3x3))
    side = patches.native_size(0.25, *pixels.shape[2:])

    @torch.inference_mode()
    def plain() -> int:
        room = [length - side + 1 for length in pixels.shape[2:]]
        for k in ks:
            for picture in pixels.to(machine.device):
                corners = [[int(torch.randint(free, ())) for free in room] for _ in range(k)]
                crops = [F.resized_crop(picture, *corner, side, side, [size, size], antialias=True) for corner in corners]
                with torch.autocast("cuda", torch.bfloat16, enabled=machine.device.type == "cuda"):
                    stock(torch.stack(crops).float() / 255).float().mean(0).cpu()
        return ks[-1] * len(pixels)

    rates = machine.race({"bagssl": _embed(machine, encoder, pixels, ks[-1], size), "a pass for each K": plain})
    yield compared(f"bags up to K = {ks[-1]} at {size} px", rates, "crops/s", 1.3)
    pixels = torch.cat([machine.train.pixels, machine.test.pixels])[: machine.size["whole"]]
    _, seconds = _timed(_embed(machine, encoder, pixels, ks[-1], size))  # warm from the race
    yield {"measure": f"{len(pixels):,} images, {ks[-1]} patches of each at {size} px", "unit": "s", "ratio": seconds, "rounds": 1,
           "most": 90 if machine.device.type == "cuda" else None}  # fmt: skip


# ---- 6. the coding rate


def coding_rate(machine: Machine) -> Iterator[dict]:
    """TCR forward and backward, against log det of the D x D matrix view by view."""
    views, batch, dim = machine.size["coding rate"]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(views, batch, dim, generator=generator).to(machine.device).requires_grad_()

    def rate(z: Tensor, epsilon2: float) -> Tensor:
        eye = torch.eye(dim, device=z.device)
        return torch.stack([torch.logdet(eye + each.T @ each * (dim / (batch * epsilon2))) / 2 for each in z])

    def work(how) -> int:
        z.grad = None
        with mock.patch.object(objectives, "coding_rate", how):
            objectives.tcr(z)["loss"].backward()
        return 1

    smaller = objectives.coding_rate
    rates = machine.race({"the smaller side, all views": lambda: work(smaller), "D x D, view by view": lambda: work(rate)})
    yield compared(f"TCR, B = {batch}, D = {dim}, V = {views}", rates, "losses/s", 20)


# ---- 7. growth


def _exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _once(work: Work) -> int | tuple[int, float]:
    done = work()
    return (1, done[1]) if isinstance(done, tuple) else 1


def growth(machine: Machine) -> Iterator[dict]:
    """Time as the work grows, with the exponent of a power law through it."""
    size, images = min(machine.size["crops"]), machine.size["embedded"]
    config = machine.config(size)
    encoder = build_encoder(config.encoder, config.width)

    def tcr(views: int, dim: int) -> Work:
        z = torch.randn(views, 100, dim, device=machine.device).requires_grad_()

        def work() -> int:
            objectives.tcr(z)["loss"].backward()
            return 1

        return work

    cases: dict[str, dict[int, Work]] = {
        "training, steps": {n: _steps(machine, config, n) for n in (16, 32, 64)},
        "training, views": {v: _steps(machine, replace(config, views=v), 8) for v in (2, 4, 8)},
        "embedding, images": {n: _embed(machine, encoder, machine.train.pixels[:n], 16, size)
                              for n in (images, 2 * images, 4 * images)},
        "embedding, K": {k: _embed(machine, encoder, machine.train.pixels[:images], k, size) for k in (16, 64, 256)},
        "TCR, V (B = 100, D = 1024)": {v: tcr(v, 1024) for v in (5, 10, 20)},
        "TCR, D (B = 100, V = 20)": {d: tcr(20, d) for d in (256, 512, 1024)},
    }  # fmt: skip
    for name, works in cases.items():
        calls = {n: partial(_once, work) for n, work in works.items()}
        seconds = {n: [1 / rate for rate in rates] for n, rates in race(calls, 0.0).items()}
        exponents = [_exponent(list(works), each) for each in zip(*seconds.values(), strict=True)]
        yield {"measure": f"{name}: time ~ size^c", "unit": "c", "ratio": float(np.median(exponents)), "low": min(exponents),
               "high": max(exponents), "rounds": ROUNDS, "sizes": list(works),
               "seconds": [float(np.median(each)) for each in seconds.values()]}  # fmt: skip


def memory(machine: Machine) -> Iterator[dict]:
    """Peak memory that the work adds to a process of its own: runs of one and four times the steps, bags of 16 and 256."""
    for name, small, large in (("training, steps", 16, 64), ("embedding, K", 16, 256)):
        peaks = [_peak(machine, name, n) for n in (large, small)]
        yield {"measure": f"{name}: peak memory, {large} over {small}", "unit": "MiB", "ours": str(large),
               "theirs": str(small), "rate": peaks[0], "their rate": peaks[1], "ratio": peaks[0] / peaks[1], "rounds": 1}


def _peak(machine: Machine, name: str, n: int) -> float:
    code = "import sys; from bagssl import bench; bench._alone(*sys.argv[1:])"
    words = [sys.executable, "-c", code, machine.dataset, "quick" * machine.quick, name, str(n)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def _alone(dataset: str, quick: str, name: str, n: str) -> None:
    machine = Machine(dataset, bool(quick))
    config = machine.config(min(machine.size["crops"]))
    if name.startswith("training"):
        work = _steps(machine, config, int(n))
    else:
        pixels = machine.train.pixels[: machine.size["embedded"]]
        work = _embed(machine, build_encoder(config.encoder, config.width), pixels, int(n), config.size)
    before = _memory(machine)
    work()
    print(_memory(machine, peak=True) - before)


def _memory(machine: Machine, peak: bool = False) -> float:
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


# ---- the probes


def probing(machine: Machine) -> Iterator[dict]:
    """Seconds for a probe of 50,000 training and 10,000 test images x 512: rectified random projections of pixels."""
    generator = torch.Generator().manual_seed(0)
    project = torch.randn(machine.train.pixels[0].numel(), 512, generator=generator) / 40
    sides = [data.subset(images, min(len(images), count))
             for images, count in zip((machine.train, machine.test), machine.size["probed"], strict=True)]
    given = [tensor.to(machine.device) for side in sides
             for tensor in ((side.pixels.flatten(1).float() / 255 @ project).relu(), side.labels)]  # fmt: skip
    for name, probe in (("kNN", probes.knn), ("linear", probes.linear)):
        seconds = [1 / rate for rate in race({"": lambda probe=probe: bool(probe(*given))}, 0.0, 3)[""]]
        yield {"measure": f"{name} probe, {len(sides[0]):,} and {len(sides[1]):,} images x 512", "unit": "s",
               "ratio": float(np.median(seconds)), "low": min(seconds), "high": max(seconds), "rounds": 3}  # fmt: skip


# ---- all of it

ROWS: dict[str, Callable[[Machine], Iterator[dict]]] = {
    "augmentation": augmentation, "training": training, "native-size": native_size, "utilisation": utilisation,
    "aggregation": aggregation, "coding-rate": coding_rate, "growth": growth, "memory": memory, "probes": probing, "compiled": compiled,
}  # fmt: skip


def bench(names: Sequence[str] = (), dataset: str | None = None, quick: bool = False, output: Path | None = None,
          time_limit: float | None = None) -> Path:
    """Measure the rows `names` (none: all), show them as they come, and write results/bench/<machine>.json, and .md to read.

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
    path = Path(output) if output else results_root() / "bench" / f"{_slug(made['hardware'])}.json"
    record = {"rows": {}} if not path.exists() else runs.read_json(path)
    todo = list(names or ROWS)
    sources = package_hash(without=frozenset())
    if time_limit is not None and (output or not quick):
        todo = [name for name in todo if {sources} != {row.get("sources") for row in record["rows"].get(name, [])}]
    for i, name in enumerate(todo):
        if time.monotonic() > deadline:
            raise Stopped(f"bench: the time is up, {', '.join(todo[i:])} left; the next call with a time limit goes on from there")
        made_by, found = {**{key: made[key] for key in ("commit", "dirty", "time", "versions")}, "sources": sources}, []
        for row in ROWS[name](machine):
            found.append({**row, "dataset": machine.dataset, **made_by})
            print(line(row), flush=True)
        record["rows"][name] = found
        record |= {"hardware": made["hardware"], "precision": str(machine.dtype).removeprefix("torch.")}
        if output or not quick:
            path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_json(path, record)
            with write_atomically(path.with_suffix(".md")) as shown:
                shown.write_text(figures.markdown(table(record)), encoding="utf-8")
    return path


def line(row: Mapping[str, Any]) -> str:
    """One row for a terminal."""
    spread = f" ({row['low']:.3g} to {row['high']:.3g})" if "low" in row else ""
    rates = f": {row['rate']:.4g} over {row['their rate']:.4g} {row['unit']} ({row['theirs']})" if "rate" in row else ""
    aim = f", asked {_asked(row)}" if _asked(row) != figures.DASH else ""
    equal = (f"; kNN {row['kNN']:.1f} and {row['their kNN']:.1f}, difference {row['kNN difference']:+.2f} ± "
             f"{row['standard error']:.2f}") if "kNN" in row else ""  # fmt: skip
    return f"{row['measure']}: {row['ratio']:.3g}{spread}{aim}{rates}{equal}"


def table(record: Mapping[str, Any]) -> pd.DataFrame:
    """The record as a table to show, all of it text."""
    def shown(row: Mapping[str, Any]) -> dict[str, str]:
        sign = {"s": " s", "c": ""}.get(row["unit"], " ×")
        spread = f" ({row['low']:.3g} to {row['high']:.3g})" if "low" in row else ""
        rates = f"{_short(row['rate'])} / {_short(row['their rate'])} {row['unit']}" if "rate" in row else figures.DASH
        judged = f"{row['kNN difference']:+.1f} ± {row['standard error']:.1f}" if "kNN" in row else figures.DASH
        return {"measure": row["measure"], "value": f"{row['ratio']:.3g}{sign}{spread}",
                "asked": _asked(row), "ours / theirs": rates,
                "theirs": row.get("theirs", figures.DASH), "kNN, ours - theirs": judged}  # fmt: skip

    return pd.DataFrame([shown(row) for name in ROWS for row in record["rows"].get(name, ())])


def _asked(row: Mapping[str, Any]) -> str:
    return f"{row['aim']:g}" if row.get("aim") else f"≤ {row['most']:g}" if row.get("most") else figures.DASH


def _short(rate: float) -> str:
    return f"{rate / 1e9:.3g} G" if rate >= 1e9 else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _slug(hardware: Mapping[str, Any]) -> str:
    words = hardware["gpu"] or f"{hardware['processor']} {hardware['cores']} cores"
    return "-".join("".join(letter if letter.isalnum() else " " for letter in words.lower()).split())


def _synchronise() -> None:
    with contextlib.suppress(AssertionError):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
