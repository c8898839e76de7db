"""Datasets as tensors: a name and a split give `Images`; trees.py makes datasets of pictures.

A dataset lies in one cache, data/<name>.safetensors: the uint8 pixels and the labels of both splits, with
their SHA-256 fingerprints, which are checked whenever it is read. One that is too large for memory lies in shards,
data/<name>/, of which is read what is asked for (`Shards`); their fingerprint follows from a SHA-256 for each, which
`check` alone computes again. `EMBEDDED` ones are made, and need no cache. There is no fallback to other data: what is
absent or damaged is an `InputError` that says how to add it. What can be said of datasets without reading one stands in
catalogue.py.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bagssl import catalogue, shards
from bagssl.catalogue import EMBEDDED, SPLITS, absent, available, cache, damaged, index_of, is_name, opened, sharded
from bagssl.errors import InputError, check_choice
from bagssl.paths import cores

_BLOCK = 2**22  # bytes of pixels that are copied at a time
_LARGE = 2**15  # bytes of an image from which several threads copy faster than one


class Shards:
    """Images in several files that are mapped into memory, to be used as a tensor of pixels, uint8 [N, 3, H, W].

    What a slice or a tensor of places asks for is read then, and is a tensor.
    """

    dtype, device, ndim = torch.uint8, torch.device("cpu"), 4

    def __init__(self, counts: Sequence[int], sides: Sequence[int], read: Callable[[int], Tensor],
                 order: Tensor | None = None):  # fmt: skip
        """counts: images in each shard; sides: their height and width; read: gives the pixels of the shard of a number.

        order: int64 [M], the images that are meant, instead of all.
        """
        self.counts, self.read, self.order, self._mapped = np.array(counts), read, order, {}
        self.ends, self.threads = self.counts.cumsum(), min(4, cores())
        self._pool = ThreadPoolExecutor(self.threads, "gather")
        self.shape = torch.Size([int(self.ends[-1]) if order is None else len(order), 3, *sides])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return self.shape.numel()

    def numel(self) -> int:
        return self.shape.numel()

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """As of a tensor: [3, H, W] of a number, [n, 3, H, W] of a slice or mask, [..., 3, H, W] of places [...]."""
        if isinstance(index, int):
            return self.index_select(0, torch.tensor([range(len(self))[index]]))[0]
        if isinstance(index, slice):
            return self._span(range(len(self))[index])
        places = torch.as_tensor(index, device="cpu")
        if places.dtype == torch.bool:
            places = torch.arange(len(self))[places]
        places = torch.where(places < 0, places + len(self), places)
        return self.index_select(0, places.flatten()).view(*places.shape, *self.shape[1:])

    def _span(self, places: range) -> Tensor:
        """Images one after another; where they lie so in one shard they are not copied."""
        if places and places.step == 1 and self.order is None:
            first, last = np.searchsorted(self.ends, [places[0], places[-1]], side="right").tolist()
            if first == last:
                start = places[0] - int(self.ends[first] - self.counts[first])
                return torch.from_numpy(self._shard(first)[start : start + len(places)])
        return self.index_select(0, torch.tensor(places, dtype=torch.int64))

    def index_select(self, dim: int, index: Tensor, out: Tensor | None = None) -> Tensor:
        """The images at `index`, int64 [M] on the CPU, into `out`, uint8 [M, 3, H, W], if it is given; dim is 0."""
        _check_places(index, len(self))
        places = (index if self.order is None else self.order[index]).numpy()
        out = torch.empty(len(places), *self.shape[1:], dtype=self.dtype) if out is None else out
        which = self.ends.searchsorted(places, side="right")
        inside, rows = places - (self.ends - self.counts)[which], out.numpy()

        def copy(some: slice) -> None:
            for row, shard, place in zip(rows[some], which[some].tolist(), inside[some].tolist(), strict=True):
                np.copyto(row, self._shard(shard)[place])

        if rows[:1].nbytes < _LARGE:
            copy(slice(None))
        else:
            list(self._pool.map(copy, [slice(at, None, self.threads) for at in range(self.threads)]))
        return out

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            self._mapped[number] = self.read(number).numpy()
        return self._mapped[number]

    def split(self, count: int) -> Iterator[Tensor]:
        """The images, so many at a time."""
        return (self[start : start + count] for start in range(0, len(self), count))

    def take(self, index: Tensor) -> Self:
        """The images at `index` (int64 or bool [M]), where they are."""
        order = torch.arange(len(self)) if self.order is None else self.order
        return Shards(self.counts, self.shape[2:], self.read, order[index])

    def to(self, device: torch.device | str) -> Tensor:
        """All of them, as a tensor on a device."""
        whole, done = torch.empty(self.shape, dtype=self.dtype, device=device), 0
        for part in self.split(max(1, _BLOCK // max(1, self.shape[1:].numel()))):
            whole[done : done + len(part)], done = part, done + len(part)
        return whole


Pixels = Tensor | Shards


def gather(pixels: Pixels, places: Tensor, out: Tensor | None = None) -> Tensor:
    """The images at `places`, int64 [M] from 0 on, into `out`, uint8 [M, 3, H, W], if it is given.

    On a CPU numpy copies: torch calls all its threads together anew for each large image, which on a busy machine takes
    hundreds of times as long as the copy.
    """
    if isinstance(pixels, Shards):
        return pixels.index_select(0, places, out)
    if pixels.device.type != "cpu":
        return torch.index_select(pixels, 0, places, out=out)
    _check_places(places, len(pixels))
    out = torch.empty(len(places), *pixels.shape[1:], dtype=pixels.dtype) if out is None else out
    np.take(pixels.numpy(), places.numpy(), axis=0, out=out.numpy(), mode="clip")  # "raise" would copy twice
    return out


def _check_places(places: Tensor, count: int) -> None:
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < count:
        raise IndexError(f"places from {int(places.min())} to {int(places.max())} among {count} images")


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a dataset: pixels uint8 [N, 3, H, W], labels int64 [N] into `classes`, their fingerprint.

    The fingerprint is the SHA-256, in hex, over shape, classes, pixels and labels, computed when not given; for shards
    see shards.py.
    """

    pixels: Pixels
    labels: Tensor
    classes: tuple[str, ...]
    fingerprint: str = ""

    def __post_init__(self):
        pixels, labels = self.pixels, self.labels
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels are uint8 [N, 3, H, W], not {pixels.dtype} {list(pixels.shape)}")
        if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
            raise ValueError(f"labels are int64 [N], not {labels.dtype} {list(labels.shape)}")
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(pixels, labels, self.classes))

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> Self:
        """The same images on a device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def take(self, index: Tensor) -> Self:
        """The images at `index` (int64 or bool [M]), with a fingerprint of their own.

        Of a dataset in shards they are in memory, unless they are too many for one file.
        """
        index = index.to(self.labels.device)
        labels = self.labels[index]
        if isinstance(self.pixels, Tensor) or len(labels) * self.pixels.shape[1:].numel() < catalogue.SHARDED_FROM:
            return Images(self.pixels[index], labels, self.classes)
        chosen = torch.arange(len(self))[index].numpy().astype("<i8")
        own = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()
        return Images(self.pixels.take(index), labels, self.classes, own)


def fingerprint(pixels: Tensor, labels: Tensor, classes: tuple[str, ...], order: Tensor | None = None) -> str:
    """SHA-256, in hex, over shape, classes, pixels and labels; with `order` (int64 [N]) of the images in that one."""
    digest = hashlib.sha256(json.dumps({"shape": list(pixels.shape), "classes": list(classes)}).encode())
    for block in blocks(pixels, order):
        digest.update(block.numpy())
    digest.update((labels if order is None else labels[order]).cpu().contiguous().numpy().astype("<i8"))
    return digest.hexdigest()


def blocks(pixels: Tensor, order: Tensor | None = None) -> Iterator[Tensor]:
    """The images, in `order` if one is given, contiguous on the CPU, so few at a time that no memory is needed."""
    count = max(1, _BLOCK // max(1, pixels.shape[1:].numel()))
    for part in pixels.split(count) if order is None else order.split(count):
        yield (part if order is None else gather(pixels, part)).cpu().contiguous()


def load(name: str, split: str, root: Path | None = None) -> Images:
    """The images of `split` ("train" or "test"), checked against their fingerprint.

    Raises InputError, with the command that adds the data, when they are unknown, absent or damaged.
    """
    check_choice("split", split, SPLITS)
    if name in EMBEDDED:
        return Images(*EMBEDDED[name](split))
    if not available(name, root):
        raise absent(name, root)
    if about := sharded(name, root):
        return _in_shards(name, split, index_of(name, root), about)
    path = cache(name, root)
    with opened(path, name) as (file, about):
        pixels, labels = file.get_tensor(f"{split}_pixels"), file.get_tensor(f"{split}_labels")
        found = fingerprint(pixels, labels, tuple(about["classes"]))
        if found != about[split]:
            raise damaged(path, name, f"its {split} split has SHA-256 {found[:12]}, not {about[split][:12]}")
        return Images(pixels, labels, tuple(about["classes"]), found)


def _in_shards(name: str, split: str, index: Path, about: dict[str, Any]) -> Images:
    """The images of a split, of whose index this is the content; a shard is opened, and checked, at its first use."""
    part, sides = about["splits"][split], about["size"]

    def read(number: int) -> Tensor:
        entry = part["shards"][number]
        with opened(path := index.with_name(entry["file"]), name) as (file, header):
            if header["sha256"] != entry["sha256"]:
                raise damaged(path, name, "it is another shard than was written there")
            return file.get_tensor("pixels")

    runs = torch.tensor([run for entry in part["shards"] for run in entry["labels"]])
    counts = [sum(count for _, count in entry["labels"]) for entry in part["shards"]]
    return Images(Shards(counts, sides, read), runs[:, 0].repeat_interleave(runs[:, 1]), tuple(about["classes"]),
                  part["fingerprint"])


def subset(images: Images, count: int, seed: int = 0) -> Images:
    """`count` images drawn at random, in their old order. Raises InputError when there are not as many."""
    if not 1 <= count <= len(images):
        raise InputError(f"cannot take {count} of {len(images)} images: choose a number from 1 to {len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.take(order[:count].sort().values)


def check(name: str, root: Path | None = None) -> dict[str, str]:
    """Recompute the SHA-256 of both splits: {"train": hex, "test": hex}. Raises InputError as `load` does."""
    about = sharded(name, root) if is_name(name) else None
    if about and (wrong := [*shards.faults(name, root, about).values()]):
        raise InputError(f"{wrong[0]}" + (f"; so are {len(wrong) - 1} more of its shards" if wrong[1:] else ""))
    return {split: load(name, split, root).fingerprint for split in SPLITS}
