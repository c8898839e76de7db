"""The rows of training: augmentation, whole runs beside a peer's, the share of the machine, what is compiled."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import conv3x3

from bagssl import bags, data, devices, patches, pretraining, probes
from bagssl.augmentation import Augmentation
from bagssl.bench.race import ROUNDS, Machine, Work, compared, race, synchronise
from bagssl.bench.works import embed_patches, flops, product, run_steps, short_run, train_steps, whole_run
from bagssl.config import PretrainConfig
from bagssl.encoders import build_encoder


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


def training(machine: Machine) -> Iterator[dict]:
    """Whole runs of as many crops, ours against lightly's pipeline, from the images to the last step; then kNN.

    lightly's has the number of workers that is fastest here.
    """
    aims = {16: 2.0, 32: 1.3} if machine.device.type == "cpu" else {32: 2.5}
    for size, crops in machine.size["crops"].items():
        pictures = _Pictures(machine.train, _lightly(machine.config(size)))

        def theirs(seed: int, steps: int, workers: int, size=size, pictures=pictures) -> nn.Module:
            return _lightly_run(machine, machine.config(size, seed=seed), pictures, steps, workers)

        few = max(2, crops // (20 * machine.size["batch"]))
        workers = _fastest(machine, lambda n, few=few, theirs=theirs: bool(theirs(0, few, n)))
        ways = {"bagssl": _ours(machine, size), f"lightly, {workers} workers": (partial(theirs, workers=workers), size)}
        yield _judged(machine, f"training, {machine.size['encoder']} at {size} px", ways, crops, 0, aims.get(size))


def _lightly_run(machine: Machine, config: PretrainConfig, pictures: _Pictures, steps: int, workers: int) -> nn.Module:
    """SimCLR as lightly's examples have it, on our encoder and schedule: the trained encoder.

    Tuned as ours is where that takes no code of its own: channels last, a fused optimiser, pinned memory.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    encoder = build_encoder(config.encoder, config.width, config.seed, conv=conv3x3)  # none of our short cuts
    encoder = encoder.to(machine.device, memory_format=torch.channels_last)
    torch.manual_seed(config.seed)
    head = SimCLRProjectionHead(encoder.dim, config.projector_hidden, config.projector_dim).to(machine.device)
    criterion = NTXentLoss(temperature=0.5)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True)
    loader, step = _loader(machine, pictures, config.batch_size, workers), 0
    while step < steps:
        for views in loader:
            for group in optimiser.param_groups:
                group["lr"] = pretraining.learning_rate_at(step, steps, config)
            with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
                to = {"device": machine.device, "non_blocking": True, "memory_format": torch.channels_last}
                z = [head(encoder(view.to(**to))) for view in views]
            loss = criterion(*(each.float() for each in z))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step == steps:
                break
    return encoder


def native_size(machine: Machine) -> Iterator[dict]:
    """Patches trained and embedded at their own size, against the same patches enlarged to twice their side."""
    native, crops = patches.native_size(0.25, *machine.train.pixels.shape[2:]), min(machine.size["crops"].values())
    ways = {f"{size} px": _ours(machine, size, training="patch-based") for size in (native, 2 * native)}
    yield _judged(machine, f"training on patches of {native} px, not enlarged", ways, crops, 16, None)


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
            synchronise()
            begun = time.perf_counter()
            encoder = train(seed, steps)
            synchronise()
            if seed:
                rates[name].append(steps * per_step / (time.perf_counter() - begun))
                accuracies[name].append(_accuracy(machine, encoder, size, k))
    mine, others = accuracies.values()
    difference = np.subtract(mine, others)
    return compared(measure, rates, "crops/s", aim, **{
        "kNN": float(np.mean(mine)), "their kNN": float(np.mean(others)), "kNN difference": float(difference.mean()),
        "standard error": float(difference.std(ddof=1) / len(difference) ** 0.5)})  # fmt: skip


def _accuracy(machine: Machine, encoder: nn.Module, size: int, k: int) -> float:
    """kNN accuracy in per cent of bags of k (0: the centre crops) of some of the test images."""
    train, test = (data.subset(images, min(len(images), count))
                   for images, count in zip((machine.train, machine.test), machine.size["judged"], strict=True))
    h = [bags.embed_bags(encoder, images.pixels, [k], scale=0.25, size=size, device=machine.device)[k]
         for images in (train, test)]  # fmt: skip
    return probes.knn(h[0], train.labels, h[1], test.labels).value


def _ours(machine: Machine, size: int, **settings: Any) -> tuple[Callable[[int, int], nn.Module], int]:
    return lambda seed, steps: run_steps(machine, machine.config(size, seed=seed, **settings), steps)[1], size


def online(machine: Machine) -> Iterator[dict]:
    """Whole runs whose encoder is measured on its way, as often as by default, against the same without."""
    for size, crops in machine.size["crops"].items():
        works = {name: whole_run(machine, machine.config(size), crops, every)
                 for name, every in (("measured", 0), ("not measured", None))}  # fmt: skip
        yield compared(f"training at {size} px, measured on its way", machine.race(works), "crops/s", 0.97)


def utilisation(machine: Machine) -> Iterator[dict]:
    """The share of the machine's own rate of matrix products that training and embedding reach; fresh crops' cost."""
    for size in machine.size["crops"]:
        yield from _shares(machine, machine.config(size))
        yield _fresh(machine, machine.config(size))


def _shares(machine: Machine, config: PretrainConfig) -> Iterator[dict]:
    kind, encoder = str(machine.dtype).removeprefix("torch."), build_encoder(config.encoder, config.width)
    pixels = machine.train.pixels[: machine.size["embedded"]]
    per_step, per_crop = (flops(config, backward) for backward in (True, False))
    step = train_steps(machine, config, short_run(machine, config), machine.long)
    embed = embed_patches(machine, encoder, pixels, 16, config.size)

    def operations() -> tuple[int, float]:
        crops, seconds = step()
        return int(crops * per_step), seconds

    works = {"training": operations, "embedding": lambda: int(embed() * per_crop)}
    rates = machine.race({f"{kind} product": product(machine), **works})
    (kind, by), *ours = rates.items()
    aims = (0.30, None) if machine.device.type == "cuda" else (None, None)  # the long pass of `aggregation` has one
    for (name, mine), aim in zip(ours, aims, strict=True):
        measure = f"{name}, {config.encoder} at {config.size} px: share of the {kind} rate"
        yield compared(measure, {name: mine, kind: by}, "FLOP/s", aim)


def _fresh(machine: Machine, config: PretrainConfig) -> dict:
    kept: dict[int, Tensor] = {}

    def cached(batch: Tensor, *how: Any) -> Tensor:
        if len(batch) not in kept:
            kept[len(batch)] = patches.augment(batch, *how)
        return kept[len(batch)]

    fresh = train_steps(machine, config, short_run(machine, config), machine.long)

    def stale() -> int:
        with mock.patch.object(pretraining, "augment", cached):
            return fresh()

    rates = machine.race({"fresh crops": fresh, "the same crops again": stale})
    aim = 0.95 if machine.device.type == "cuda" else None
    return compared(f"training at {config.size} px, fresh crops for each step", rates, "crops/s", aim)


def compiled(machine: Machine) -> Iterator[dict]:
    """Training with what `torch.compile` makes of a step, against the same as it stands; compiling does not count."""
    size = min(machine.size["crops"])
    config = machine.config(size)
    works = {name: train_steps(machine, config, short_run(machine, config), name) for name in devices.COMPILED}
    for name in devices.COMPILED[1:]:
        if "graphs" in name and machine.device.type != "cuda":
            continue
        rates = machine.race({f"compiled: {name}": works[name], "as it stands": works["none"]})
        yield compared(f"training at {size} px, compiled: {name}", rates, "crops/s")
