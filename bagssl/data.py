"""Datasets as tensors: a name and a split give `Images`; trees.py makes datasets of pictures.

A dataset lies in one cache, data/<name>.safetensors: the uint8 pixels and the labels of both splits, with
their SHA-256 fingerprints, which are checked whenever it is read. `EMBEDDED` ones are made, and need no cache.
There is no fallback to other data: what is absent or damaged is an `InputError` that says how to add it.
"""

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bagssl import synthetic
from bagssl.errors import InputError, check_choice
from bagssl.paths import data_root

SPLITS = ("train", "test")
FORMAT = "bagssl-images-1"
_BLOCK = 2**22  # bytes of pixels that are copied at a time

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"

CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm"""

CIFAR = {  # name: classes in the published (alphabetical) order, images of each class in train and test
    "cifar10": (tuple(CIFAR10.split()), {"train": 5000, "test": 1000}),
    "cifar100": (tuple(CIFAR100.split()), {"train": 500, "test": 100}),
}


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


# What is made, not read: name -> a function from "train" or "test" to pixels, labels and classes (see `Images`).
EMBEDDED = {"synthetic": lambda split: (*synthetic.draw(split)[:2], synthetic.CLASSES)}


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
        close = difflib.get_close_matches(name, names(root), n=1)
        meant = f"did you mean {close[0]!r}? Or " if close and close != [name] else ""
        raise refusal(f"the dataset {name!r} is not in {_root(root)}: {meant}add it by {how_to_add(name)}")
    path = cache(name, root)
    with _opened(path, name) as (file, about):
        pixels, labels = file.get_tensor(f"{split}_pixels"), file.get_tensor(f"{split}_labels")
        found = fingerprint(pixels, labels, tuple(about["classes"]))
        if found != about[split]:
            raise _damaged(path, name, f"its {split} split has SHA-256 {found[:12]}, not {about[split][:12]}")
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


def available(name: str, root: Path | None = None) -> bool:
    """Whether `name` is embedded or has a cache; `check` says whether that is sound."""
    return name in EMBEDDED or (is_name(name) and cache(name, root).is_file())


def names(root: Path | None = None) -> list[str]:
    """The datasets that are known by name, then those that were added to this root."""
    known = [*EMBEDDED, *CIFAR]
    added = (path.stem for path in _root(root).glob("*.safetensors") if is_name(path.stem))
    return known + sorted(set(added) - set(known))


def status(root: Path | None = None) -> list[dict]:
    """A row for each of `names`: name, state (embedded, ready, damaged, absent), train and test (counts of images),
    classes (count), size (pixels, "32×32") and source. Only the headers of caches are read: `check` reads the rest."""
    return [{"name": name, **_about(name, root)} for name in names(root)]


def _about(name: str, root: Path | None) -> dict:
    """The row of `status`, but for the name."""
    row = {"state": "absent", "train": None, "test": None, "classes": None, "size": "", "source": how_to_add(name)}
    if name in EMBEDDED:
        images = {split: load(name, split) for split in SPLITS}
        shapes = {split: each.pixels.shape for split, each in images.items()}
        row |= {"state": "embedded", "classes": len(images["train"].classes), "source": "built in"}
    elif available(name, root):
        try:
            with _opened(cache(name, root), name) as (file, about):
                shapes = {split: file.get_slice(f"{split}_pixels").get_shape() for split in SPLITS}
        except InputError:
            return row | {"state": "damaged"}
        row |= {"state": "ready", "classes": len(about["classes"]), "source": about["source"]}
    else:
        return row
    return row | {split: shape[0] for split, shape in shapes.items()} | {"size": "{2}×{3}".format(*shapes["train"])}


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple]:
    """An open cache and what its header says; a file that is no sound cache raises InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["bagssl"])
            if about["format"] != FORMAT:
                raise _damaged(path, name, f"its format is {about['format']}, not {FORMAT}")
            yield file, about
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(path, name, error) from error


def _damaged(path: Path, name: str, reason: object) -> InputError:
    return refusal(f"{path} is damaged ({reason}): rebuild it by {how_to_add(name)}")


def how_to_add(name: str) -> str:
    """The command that adds a dataset, or the two."""
    by_tree = f"bagssl data add {name} PATH"
    return f"bagssl data get {name}, or {by_tree}" if name in CIFAR else by_tree


def is_name(name: str) -> bool:
    """Whether a dataset that is added may have this name: it is that of a file as well, and never a path."""
    return re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name) is not None


def cache(name: str, root: Path | None) -> Path:
    """The file of a dataset that was added, below `root` or else $BAGSSL_DATA, whether it is there or not."""
    return _root(root) / f"{name}.safetensors"


def _root(root: Path | None) -> Path:
    return data_root() if root is None else Path(root)


def refusal(message: str) -> InputError:
    """What to raise: the message in one line."""
    return InputError(one_line(message))


def one_line(text: str) -> str:
    """For a terminal, whatever an error or a file name holds: line breaks, or bytes that are no text."""
    return " ".join(text.encode(errors="replace").decode().split())
