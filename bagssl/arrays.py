"""Datasets that come as arrays in one .npz file: ours (train_x, …), MedMNIST's (train_images, …), Keras' (x_train, …).

Pixels are whole numbers from 0 to 255, [N, H, W, 3], or grey as [N, H, W, 1] or [N, H, W]; labels are the numbers
0..C-1, [N] or [N, 1]; the names of the classes may stand in `classes` or `class_names`. Nothing pickled is opened, and
no array gets memory for what it says of its length before there is found to be as much.
"""

import contextlib
import math
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagssl.caches import blank, free_memory
from bagssl.catalogue import SPLITS, refusal
from bagssl.pictures import fit

NAMES = (("{}_x", "{}_y"), ("{}_images", "{}_labels"), ("x_{}", "y_{}"))  # of the pixels and labels of a split
SECOND = ("test", "val")  # the validation split takes the place of the test where there is none; else it is left out
_BLOCK = 2**22  # bytes that are read at a time


def is_npz(path: Path) -> bool:
    """Whether a file is to be taken for arrays: by its name, or because it is a zip."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return path.suffix.lower() == ".npz" or stream.read(2) == b"PK"


def read(path: Path, size: int | None, known: tuple[str, ...] | None) -> tuple[dict, tuple[str, ...], str]:
    """{split: (pixels uint8 [N, 3, H, W], labels int64 [N])}, the classes, and a word on the validation split.

    `size` is as in trees.add; `known` names the classes where the file does not and there are as many. Raises
    InputError on what is not as it should be.
    """
    with _opened(path) as file:
        held = {name.removesuffix(".npy") for name in file.namelist()}
        names, second = _named(path, held)
        found = {split: [_Array(file, name.format(place)) for name in names]
                 for split, place in zip(SPLITS, ("train", second), strict=True)}
        shapes = [_height_and_width(images) for images, _ in found.values()]
        if size is None and shapes[0] != shapes[1]:
            raise refusal(f"{path} has images of {shapes[0][1]}×{shapes[0][0]} px and of {shapes[1][1]}×{shapes[1][0]} "
                          "px: give --size to bring them to one")
        labels = {split: _labels(*found[split]) for split in SPLITS}
        named = next((_text(_Array(file, name)) for name in ("classes", "class_names") if name in held), None)
        classes = _classes(path, labels, named, known)
        splits = {split: (_pixels(found[split][0], size), torch.from_numpy(labels[split])) for split in SPLITS}
    left = "" if not any(name.format("val") in held for name in names) else "; its validation split is left out"
    return splits, classes, "; its validation split serves as the test" if second == "val" else left


@contextlib.contextmanager
def _readable(what: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zips, their compressions and headers fail with errors of every kind
        reason = str(error) or type(error).__name__
        raise refusal(f"{what} cannot be read ({reason}): save it anew by numpy.savez") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with contextlib.ExitStack() as stack:
        with _readable(path):
            file = stack.enter_context(zipfile.ZipFile(path))
        yield file


def _named(path: Path, held: set[str]) -> tuple[tuple[str, str], str]:
    """The names of pixels and labels that a file uses, and its second split; what is missing is named."""
    names = next((each for each in NAMES if held & {name.format("train") for name in each}), NAMES[0])
    second = next((place for place in SECOND if held & {name.format(place) for name in names}), SECOND[0])
    if missing := [name.format(place) for place in ("train", second) for name in names
                   if name.format(place) not in held]:  # fmt: skip
        some = ", ".join(sorted(held)[:8]) or "nothing"
        raise refusal(f"{path} has no array {missing[0]}; it holds {some}: name them train_x, train_y, test_x and "
                      "test_y, or as MedMNIST does")
    return names, second


class _Array:
    """An array in an .npz file: what its header says, and its rows some at a time. Damage raises InputError."""

    def __init__(self, file: zipfile.ZipFile, name: str):
        self.file, self.member, self.title = file, f"{name}.npy", f"{file.filename}: {name}"
        with _readable(self.title), file.open(self.member) as stream:
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            self.shape, self.by_column, self.dtype = read_header[np.lib.format.read_magic(stream)](stream)
            self.start = stream.tell()
        if self.dtype.hasobject:
            raise self.refusal("holds pickled objects, which are never opened: save it as plain numbers or text")
        self.row = math.prod(self.shape[1:]) * self.dtype.itemsize  # bytes
        if not self.shape or min(self.shape) < 1 or not self.row:
            raise self.refusal(f"holds nothing, its shape being {list(self.shape)}")
        if file.getinfo(self.member).file_size != self.start + self.shape[0] * self.row:
            raise self.refusal("is longer or shorter than its header says: save it anew by numpy.savez")

    def __len__(self) -> int:
        return self.shape[0]

    def refusal(self, reason: str) -> ValueError:
        return refusal(f"{self.title} {reason}")

    def blocks(self) -> Iterator[np.ndarray]:
        """Some rows at a time, in order; all at once where they are stored by column, in Fortran's order."""
        count = len(self) if self.by_column else min(len(self), max(1, _BLOCK // self.row))
        if count * self.row > free_memory():
            raise self.refusal(f"needs {count * self.row / 1e9:,.1f} GB of memory at once, and there are fewer")
        with contextlib.ExitStack() as stack:
            with _readable(self.title):
                stream = stack.enter_context(self.file.open(self.member))
                stream.read(self.start)
            for start in range(0, len(self), count):
                shape = (min(count, len(self) - start), *self.shape[1:])
                with _readable(self.title):
                    content = np.frombuffer(stream.read(shape[0] * self.row), self.dtype)
                    block = content.reshape(shape, order="F" if self.by_column else "C")
                yield block


def _height_and_width(images: _Array) -> tuple[int, int]:
    """Of the pictures in an array that can be one of pixels."""
    if len(images.shape) != 3 and (len(images.shape) != 4 or images.shape[3] not in (1, 3)):
        raise images.refusal(f"has the shape {list(images.shape)}: give [N, H, W, 3], [N, H, W, 1] or [N, H, W]")
    if images.dtype.kind not in "iu":
        raise images.refusal(f"is of {images.dtype}: give whole numbers from 0 to 255, as uint8")
    return images.shape[1], images.shape[2]


def _pixels(array: _Array, size: int | None) -> Tensor:
    """Pixels uint8 [N, 3, H, W]; grey becomes three equal channels."""
    pixels, start = blank(len(array), *((size, size) if size else array.shape[1:3])), 0
    for block in array.blocks():
        if block.dtype != np.uint8 and (block.min() < 0 or block.max() > 255):
            raise array.refusal(f"has pixels from {block.min()} to {block.max()}: give whole numbers from 0 to 255")
        block = block.astype(np.uint8, copy=False).reshape(*block.shape[:3], -1)  # [n, H, W, 1 or 3]
        places = pixels[start : start + len(block)].numpy()
        if size:
            for place, image in zip(places, block, strict=True):
                picture = fit(Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0]), size)
                place[:] = np.asarray(picture).reshape(size, size, -1).transpose(2, 0, 1)
        else:
            places[:] = block.transpose(0, 3, 1, 2)
        start += len(block)
    return pixels


def _labels(images: _Array, labels: _Array) -> np.ndarray:
    """Labels int64 [N], whole numbers from 0 on."""
    if labels.shape[1:] not in ((), (1,)):
        raise labels.refusal(f"has the shape {list(labels.shape)}: give one label for each image; several at once, or "
                             "a column for each class, are not read")
    if len(labels) != len(images):
        raise labels.refusal(f"has {len(labels):,} labels, for {len(images):,} images: give one for each")
    if labels.dtype.kind not in "biuf":
        raise labels.refusal(f"is of {labels.dtype}: give the numbers 0 to C-1")
    found = np.concatenate([*labels.blocks()]).reshape(-1)
    exact = found.astype(np.float64)
    right = (exact == np.floor(exact)) & (exact >= 0) & (exact < 2**31)  # and so no NaN
    if not right.all():
        raise labels.refusal(f"holds {found[~right][0].item()}: give the numbers 0 to C-1")
    return exact.astype(np.int64)


def _text(names: _Array) -> tuple[str, ...]:
    """The names of the classes, all different; a letter is one code, as in trees.py."""
    if len(names.shape) != 1 or names.dtype.kind not in "USiu":
        raise names.refusal(f"is of {names.dtype}, {list(names.shape)}: give the name of each class")
    with _readable(names.title):
        found = np.concatenate([*names.blocks()]).tolist()
        text = [unicodedata.normalize("NFC", each.decode() if isinstance(each, bytes) else str(each)) for each in found]
    if len(set(text)) < len(text) or not all(text):
        raise names.refusal("has a name that is empty, or there twice: give each class its own")
    return tuple(text)


def _classes(path: Path, labels: Mapping[str, np.ndarray], named: tuple[str, ...] | None,
             known: tuple[str, ...] | None) -> tuple[str, ...]:  # fmt: skip
    """The names of the classes, or their numbers; each has images in both splits, as in a class-folder tree."""
    most = max(int(each.max()) for each in labels.values())
    count = len(named) if named else most + 1
    if most >= count:
        raise refusal(f"{path} has the label {most}, and names {count} classes: name them all, from 0 on")
    for split in SPLITS:
        present = np.unique(labels[split])
        if len(present) < count:
            missing = next((i for i, label in enumerate(present) if i != label), len(present))
            raise refusal(f"{path}: no image of the {split} split has the label {missing}: number the classes from 0 "
                          f"to C-1 (here {count - 1}), each with images in both splits")
    if count < 2:
        raise refusal(f"{path} has one class: a dataset needs two or more")
    return named or (known if known and len(known) == count else tuple(map(str, range(count))))
