"""The rows of embedding and probing, and how time and memory grow."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import conv3x3

from bagssl import data, objectives, patches, probes
from bagssl.bench.race import ROUNDS, Machine, Work, compared, exponent, memory_of, race, timed
from bagssl.bench.works import embed_patches, flops, product, train_steps
from bagssl.encoders import Conv3x3, build_encoder


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
                crops = [F.resized_crop(picture, *corner, side, side, [size, size], antialias=True)
                         for corner in corners]
                with torch.autocast("cuda", torch.bfloat16, enabled=machine.device.type == "cuda"):
                    stock(torch.stack(crops).float() / 255).float().mean(0).cpu()
        return ks[-1] * len(pixels)

    rates = machine.race({"bagssl": embed_patches(machine, encoder, pixels, ks[-1], size), "a pass for each K": plain})
    yield compared(f"bags up to K = {ks[-1]} at {size} px", rates, "crops/s", 1.3)
    yield from _whole(machine, encoder, ks[-1], size)


def _whole(machine: Machine, encoder: nn.Module, k: int, size: int) -> Iterator[dict]:
    """A dataset's bags from start to end, compilation counted: seconds, and the share of the machine's own rate."""
    most = machine.size["whole"]
    pixels = torch.cat([images.pixels[:most] for images in (machine.train, machine.test)])[:most]
    by = machine.race({"": product(machine)})[""]
    count, seconds = timed(embed_patches(machine, encoder, pixels, k, size))
    rate = count * flops(machine.config(size), backward=False) / seconds
    cuda, kind = machine.device.type == "cuda", str(machine.dtype).removeprefix("torch.")
    measure = f"{len(pixels):,} images, {k} patches of each at {size} px"
    yield {"measure": measure, "unit": "s", "ratio": seconds, "rounds": 1, "most": 90 if cuda else None}
    yield compared(f"{measure}: share of the {kind} rate", {"embedding": [rate] * len(by), f"{kind} product": by},
                   "FLOP/s", 0.40 if cuda else None)  # fmt: skip


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
    ways = {"the smaller side, all views": smaller, "D x D, view by view": rate}
    rates = machine.race({name: partial(work, way) for name, way in ways.items()})
    yield compared(f"TCR, B = {batch}, D = {dim}, V = {views}", rates, "losses/s", 20)


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
        "training, steps": {n: train_steps(machine, config, n) for n in (16, 32, 64)},
        "training, views": {v: train_steps(machine, replace(config, views=v), 8) for v in (2, 4, 8)},
        "embedding, images": {n: embed_patches(machine, encoder, machine.train.pixels[:n], 16, size)
                              for n in (images, 2 * images, 4 * images)},
        "embedding, K": {k: embed_patches(machine, encoder, machine.train.pixels[:images], k, size)
                         for k in (16, 64, 256)},
        "TCR, V (B = 100, D = 1024)": {v: tcr(v, 1024) for v in (5, 10, 20)},
        "TCR, D (B = 100, V = 20)": {d: tcr(20, d) for d in (256, 512, 1024)},
    }  # fmt: skip
    for name, works in cases.items():
        seconds = {n: [1 / rate for rate in rates]
                   for n, rates in race({n: partial(_once, work) for n, work in works.items()}, 0.0).items()}
        exponents = [exponent(list(works), each) for each in zip(*seconds.values(), strict=True)]
        yield {"measure": f"{name}: time ~ size^c", "unit": "c", "ratio": float(np.median(exponents)),
               "low": min(exponents), "high": max(exponents), "rounds": ROUNDS, "sizes": list(works),
               "seconds": [float(np.median(each)) for each in seconds.values()]}  # fmt: skip


def _once(work: Work) -> int | tuple[int, float]:
    done = work()
    return (1, done[1]) if isinstance(done, tuple) else 1


def memory(machine: Machine) -> Iterator[dict]:
    """Peak memory that the work adds to a process of its own: one and four times the steps, bags of 16 and 256."""
    for name, small, large in (("training, steps", 16, 64), ("embedding, K", 16, 256)):
        peaks = [_peak(machine, name, n) for n in (large, small)]
        yield {"measure": f"{name}: peak memory, {large} over {small}", "unit": "MiB", "ours": str(large), "rounds": 1,
               "theirs": str(small), "rate": peaks[0], "their rate": peaks[1], "ratio": peaks[0] / peaks[1]}


def _peak(machine: Machine, name: str, n: int) -> float:
    code = "import sys; from bagssl.bench import embedding; embedding._alone(*sys.argv[1:])"
    words = [sys.executable, "-c", code, machine.dataset, "quick" * machine.quick, name, str(n)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def _alone(dataset: str, quick: str, name: str, n: str) -> None:
    machine = Machine(dataset, bool(quick))
    config = machine.config(min(machine.size["crops"]))
    if name.startswith("training"):
        work = train_steps(machine, config, int(n))
    else:
        pixels = machine.train.pixels[: machine.size["embedded"]]
        work = embed_patches(machine, build_encoder(config.encoder, config.width), pixels, int(n), config.size)
    before = memory_of(machine)
    work()
    print(memory_of(machine, peak=True) - before)


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
