"""Datasets as tensors: a name and a split give `Images`; trees.py makes datasets of pictures.

A dataset lies in one cache, data/<name>.safetensors: the uint8 pixels and the labels of both splits, with
their SHA-256 fingerprints, which are checked whenever it is read. `EMBEDDED` ones are made, and need no cache.
There is no fallback to other data: what is absent or damaged is an `InputError` that says how to add it. What can be
said of datasets without reading one stands in catalogue.py.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from bagssl.catalogue import EMBEDDED, SPLITS, absent, available, cache, damaged, opened
from bagssl.errors import InputError, check_choice

_BLOCK = 2**22  # bytes of pixels that are copied at a time


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a dataset: pixels uint8 [N, 3, H, W], labels int64 [N] into `classes`, their fingerprint.

    The fingerprint is the SHA-256, in hex, over shape, classes, pixels and labels, computed when not given.
    """

    pixels: Tensor
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
        """The images at `index` (int64 or bool [M]), with a fingerprint of their own."""
        index = index.to(self.pixels.device)
        return Images(self.pixels[index], self.labels[index], self.classes)


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
        yield (part if order is None else pixels.index_select(0, part)).cpu().contiguous()


def load(name: str, split: str, root: Path | None = None) -> Images:
    """The images of `split` ("train" or "test"), checked against their fingerprint.

    Raises InputError, with the command that adds the data, when they are unknown, absent or damaged.
    """
    check_choice("split", split, SPLITS)
    if name in EMBEDDED:
        return Images(*EMBEDDED[name](split))
    if not available(name, root):
        raise absent(name, root)
    path = cache(name, root)
    with opened(path, name) as (file, about):
        pixels, labels = file.get_tensor(f"{split}_pixels"), file.get_tensor(f"{split}_labels")
        found = fingerprint(pixels, labels, tuple(about["classes"]))
        if found != about[split]:
            raise damaged(path, name, f"its {split} split has SHA-256 {found[:12]}, not {about[split][:12]}")
        return Images(pixels, labels, tuple(about["classes"]), found)


def subset(images: Images, count: int, seed: int = 0) -> Images:
    """`count` images drawn at random, in their old order. Raises InputError when there are not as many."""
    if not 1 <= count <= len(images):
        raise InputError(f"cannot take {count} of {len(images)} images: choose a number from 1 to {len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.take(order[:count].sort().values)


def check(name: str, root: Path | None = None) -> dict[str, str]:
    """Recompute the SHA-256 of both splits: {"train": hex, "test": hex}. Raises InputError as `load` does."""
    return {split: load(name, split, root).fingerprint for split in SPLITS}
