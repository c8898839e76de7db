"""Datasets as tensors: a name and a split give `Images`, and nothing else reads image files.

A dataset lies in one cache, data/<name>.safetensors: the uint8 pixels and the labels of both splits, with
their SHA-256 fingerprints, which are checked whenever it is read. `EMBEDDED` ones are made, and need no cache.
There is no fallback to other data: what is absent or damaged is an `InputError` that says how to add it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from bagssl import synthetic
from bagssl.errors import InputError
from bagssl.paths import cores, data_root, sweep, write_atomically

SPLITS = ("train", "test")
SIZES = range(8, 1025)  # what --size may be, in pixels
FORMAT = "bagssl-images-1"
DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
    pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
    seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper
    table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf
    woman worm"""
CIFAR = {  # name: classes in the published (alphabetical) order, images of each class in train and test
    "cifar10": (tuple(CIFAR10.split()), {"train": 5000, "test": 1000}),
    "cifar100": (tuple(CIFAR100.split()), {"train": 500, "test": 100}),
}
_NOT_IMAGES = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # what file managers leave behind; dot files as well


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

    def to(self, device: torch.device | str) -> Images:
        """The same images on a device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def take(self, index: Tensor) -> Images:
        """The images at `index` (int64 or bool [M]), with a fingerprint of their own."""
        index = index.to(self.pixels.device)
        return Images(self.pixels[index], self.labels[index], self.classes)


def _synthetic(split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    pixels, labels, _ = synthetic.draw(split)
    return pixels, labels, synthetic.CLASSES


# What is made, not read: name -> a function from "train" or "test" to pixels, labels and classes (see `Images`).
EMBEDDED = {"synthetic": _synthetic}


def fingerprint(pixels: Tensor, labels: Tensor, classes: tuple[str, ...]) -> str:
    """SHA-256, in hex, over shape, classes, pixels and labels."""
    header = {"shape": list(pixels.shape), "classes": list(classes)}
    digest = hashlib.sha256(json.dumps(header).encode())
    digest.update(pixels.cpu().contiguous().numpy())
    digest.update(labels.cpu().contiguous().numpy().astype("<i8"))
    return digest.hexdigest()


def load(name: str, split: str, root: Path | None = None) -> Images:
    """The images of `split` ("train" or "test"), checked against their fingerprint.

    Raises InputError, with the command that adds the data, when they are unknown, absent or damaged.
    """
    if split not in SPLITS:
        raise _refusal(f"unknown split {split!r}: there are train and test")
    if name in EMBEDDED:
        return Images(*EMBEDDED[name](split))
    if not available(name, root):
        close = difflib.get_close_matches(name, names(root), n=1)
        meant = f"did you mean {close[0]!r}? Or " if close and close != [name] else ""
        raise _refusal(f"the dataset {name!r} is not in {_root(root)}: {meant}add it by {_how_to_add(name)}")
    path = _cache(name, root)
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
    return name in EMBEDDED or (_is_name(name) and _cache(name, root).is_file())


def names(root: Path | None = None) -> list[str]:
    """The datasets that are known by name, then those that were added to this root."""
    known = [*EMBEDDED, *CIFAR]
    added = (path.stem for path in _root(root).glob("*.safetensors") if _is_name(path.stem))
    return known + sorted(set(added) - set(known))


def status(root: Path | None = None) -> list[dict]:
    """A row for each of `names`: name, state (embedded, ready, damaged, absent), train and test (counts of
    images), classes (count), size (pixels, "32×32") and source.

    Only the headers of caches are read: `check` reads the rest.
    """
    return [{"name": name, **_about(name, root)} for name in names(root)]


def get(name: str, root: Path | None = None, force: bool = False) -> str:
    """Download cifar10 or cifar100 by torchvision into the cache; returns one line that says what was done.

    A sound cache is left alone, unless `force`. Raises InputError, leaving the cache as it was, when the
    machine is offline, the server does not answer or what it sends is damaged.
    """
    if name in EMBEDDED:
        return f"{name} is embedded: there is nothing to get"
    if name not in CIFAR:
        raise _refusal(f"only {' and '.join(CIFAR)} can be downloaded: add {name!r} by {_how_to_add(name)}")
    if not force and _fingerprints(name, root):
        return f"{name} is already in {_cache(name, root)}: nothing to do"
    path = _cache(name, root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)  # archives of downloads that were killed
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as scratch:
            splits = {split: _download(name, split, scratch) for split in SPLITS}
    except (OSError, RuntimeError, HTTPException) as error:  # no network, no answer, no disk; a wrong MD5
        raise _refusal(
            f"{name} could not be downloaded ({error}): without a network, add a class-folder tree of it by "
            f"bagssl data add {name} PATH"
        ) from error
    return _store(name, splits, CIFAR[name][0], "torchvision", root, force)


def add(
    name: str, path: Path | str, size: int | None = None, root: Path | None = None, force: bool = False
) -> str:
    """Read a class-folder tree, train/<class>/<image> and test/<class>/<image>, into the cache of `name`.

    Images may have any format that Pillow opens; they become 8-bit RGB: 16-bit greyscale keeps its upper 8
    bits, transparency is laid over white, and the orientation in EXIF is applied. With `size` the centred
    square is resampled (bicubic, antialiased) to size×size px; without, all images must have one size.
    cifar10 and cifar100 must be complete. Returns one line that says what was done; the same content twice
    changes nothing, and other content replaces a sound cache only with `force`. Raises InputError, leaving
    the cache as it was, on anything that is not so.
    """
    if name in EMBEDDED:
        raise _refusal(f"the name {name} belongs to embedded data: choose another")
    if not _is_name(name):
        raise _refusal(f"{name!r} cannot name a dataset: use small letters, digits, - and _")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size not in SIZES):
        raise _refusal(f"--size is {size!r}: give a whole number of pixels from {SIZES[0]} to {SIZES[-1]}")
    if name in CIFAR and size not in (None, 32):
        raise _refusal(f"{name} has images of 32×32 px: leave --size out, or add it under another name")
    tree = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        files, classes = _tree(tree)
    except OSError as error:
        raise _refusal(f"{tree} cannot be read ({error}): give a tree that you may read") from error
    if name in CIFAR:
        _check_cifar(name, files, classes)
    splits = _decode(files, size)
    if name in CIFAR and splits["train"][0].shape[1:] != (3, 32, 32):
        raise _refusal(f"{name} has images of 32×32 px, {tree} has others: add it under another name")
    return _store(name, splits, classes, _one_line(f"class folders {tree}"), root, force)


def _one_line(text: str) -> str:
    """For a terminal, whatever an error or a file name holds: line breaks, or bytes that are no text."""
    return " ".join(text.encode(errors="replace").decode().split())


def _refusal(message: str) -> InputError:
    return InputError(_one_line(message))


def _root(root: Path | None) -> Path:
    return data_root() if root is None else Path(root)


def _cache(name: str, root: Path | None) -> Path:
    return _root(root) / f"{name}.safetensors"


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name) is not None


def _how_to_add(name: str) -> str:
    by_tree = f"bagssl data add {name} PATH"
    return f"bagssl data get {name}, or {by_tree}" if name in CIFAR else by_tree


def _damaged(path: Path, name: str, reason: object) -> InputError:
    return _refusal(f"{path} is damaged ({reason}): rebuild it by {_how_to_add(name)}")


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


def _about(name: str, root: Path | None) -> dict:
    """The row of `status`, but for the name."""
    row = {"state": "absent", "train": None, "test": None, "classes": None, "size": "", "source": ""}
    if name in EMBEDDED:
        images = {split: load(name, split) for split in SPLITS}
        row |= {split: len(part) for split, part in images.items()} | {"state": "embedded", "source": "built in"}
        size = "{2}×{3}".format(*images["train"].pixels.shape)
        return row | {"classes": len(images["train"].classes), "size": size}
    if not available(name, root):
        return row | {"source": _how_to_add(name)}
    try:
        with _opened(_cache(name, root), name) as (file, about):
            shapes = {split: file.get_slice(f"{split}_pixels").get_shape() for split in SPLITS}
    except InputError:
        return row | {"state": "damaged", "source": _how_to_add(name)}
    row |= {split: shape[0] for split, shape in shapes.items()}
    row |= {"state": "ready", "classes": len(about["classes"]), "size": "{2}×{3}".format(*shapes["train"])}
    return row | {"source": about["source"]}


def _fingerprints(name: str, root: Path | None) -> dict[str, str] | None:
    """The fingerprints of a sound cache; None when there is none, or a damaged one, which may be replaced."""
    try:
        return check(name, root)
    except InputError:
        return None


def _canonical(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images by label, then by the SHA-256 of their pixels: the same images get the same fingerprint, and
    give the same run, whether they came from an archive or a folder, whatever the files are called."""
    keys = [(int(label), hashlib.sha256(image).digest()) for label, image in zip(labels, pixels.numpy())]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    return pixels[order], labels[order]


def _store(
    name: str, splits: dict, classes: tuple[str, ...], source: str, root: Path | None, force: bool
) -> str:
    path = _cache(name, root)
    images = {split: Images(*_canonical(*splits[split]), classes) for split in SPLITS}
    new = {split: images[split].fingerprint for split in SPLITS}
    old = _fingerprints(name, root)
    if old == new:
        return _one_line(f"{name} is already in {path} with the same content: nothing to do")
    if old and not force:
        raise _refusal(f"{path} holds other images: choose another name, or replace them by --force")
    about = {"format": FORMAT, "name": name, "classes": list(classes), "source": source} | new
    tensors = {f"{split}_pixels": images[split].pixels for split in SPLITS}
    tensors |= {f"{split}_labels": images[split].labels for split in SPLITS}
    try:
        with write_atomically(path) as temporary:
            temporary.write_bytes(save(tensors, {"bagssl": json.dumps(about)}))  # `save_file` would put another file there
    except (OSError, SafetensorError) as error:
        raise _refusal(f"{path} cannot be written ({error}): free the disk, or set BAGSSL_DATA") from error
    counts = " and ".join(f"{len(images[split]):,} {split}" for split in SPLITS)
    size = "{2}×{3}".format(*images["train"].pixels.shape)
    return _one_line(f"{name}: {counts} images of {size} px in {len(classes)} classes, in {path}")


def _download(name: str, split: str, folder: str) -> tuple[Tensor, Tensor]:
    from torchvision import datasets  # slow to import, and needed by nothing else here

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision itself would wait for ever
    try:
        images = kind(folder, train=split == "train", download=True)
    finally:
        socket.setdefaulttimeout(waited)
    if tuple(images.classes) != CIFAR[name][0]:
        raise RuntimeError("the archive has other classes")
    return torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets)


def _entries(folder: Path, tree: Path) -> list[Path]:
    """What lies in a folder, by name, without dot files; a link that leads out of the tree is refused."""
    found = [
        entry
        for entry in sorted(folder.iterdir())
        if not entry.name.startswith(".") and entry.name not in _NOT_IMAGES
    ]
    for entry in found:
        if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(tree):
            raise _refusal(f"{entry} links out of the tree: put the files themselves there")
    return found


def _tree(tree: Path) -> tuple[dict[str, list[list[Path]]], tuple[str, ...]]:
    """The files of each class (in order) in each split, and the classes."""
    wanted = "give one with train/<class>/ and test/<class>/ in it"
    if not tree.is_dir():
        raise _refusal(f"{tree} is not a folder: {wanted}")
    for split in SPLITS:
        if not (tree / split).is_dir():
            raise _refusal(f"{tree} has no folder {split}: {wanted}")
    _entries(tree, tree)  # for links
    folders = {split: _entries(tree / split, tree) for split in SPLITS}
    for split, entries in folders.items():
        for entry in entries:
            if not entry.is_dir():
                raise _refusal(f"{entry} lies outside the class folders: move it into one, or away")
    train, test = ({entry.name for entry in folders[split]} for split in SPLITS)
    for alone, there, lacking in ((train - test, "train", "test"), (test - train, "test", "train")):
        if alone:
            raise _refusal(f"the class {min(alone)!r} is in {tree / there} but not in {tree / lacking}")
    if len(train) < 2:
        raise _refusal(f"{tree / 'train'} has fewer than two class folders, {len(train)}: a dataset needs two or more")
    files = {split: [_entries(folder, tree) for folder in folders[split]] for split in SPLITS}
    for split in SPLITS:
        for folder, inside in zip(folders[split], files[split]):
            if not inside:
                raise _refusal(f"{folder} has no images")
            for file in inside:
                if not file.is_file():
                    raise _refusal(f"{file} is no file: images lie directly in their class folder")
    return files, tuple(entry.name for entry in folders["train"])


def _check_cifar(name: str, files: dict[str, list[list[Path]]], classes: tuple[str, ...]) -> None:
    """A part of CIFAR under the name of the whole would be a lie that no later number shows."""
    expected, counts = CIFAR[name]
    if classes != expected:
        odd = min(set(classes) ^ set(expected))
        where = "is missing" if odd in expected else "does not belong"
        raise _refusal(f"{name} has {len(expected)} classes; here {odd!r} {where}: add it under another name")
    for split, count in counts.items():
        for label, found in zip(classes, files[split]):
            if len(found) != count:
                counts = f"{name} has {count:,} {split} images of each class, this tree {len(found):,} of"
                raise _refusal(f"{counts} {label!r}: add it under another name")


def _decode(files: dict[str, list[list[Path]]], size: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Read every file: {split: (pixels uint8 [N, 3, H, W], labels int64 [N])}."""
    paths = [path for split in SPLITS for inside in files[split] for path in inside]
    pixels: np.ndarray | None = None
    with (
        warnings.catch_warnings(),
        ThreadPool(min(8, cores())) as pool,  # Pillow decodes outside the interpreter's lock
        tqdm(total=len(paths), desc="reading images", unit="image", disable=None) as bar,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # of odd EXIF data
        wrong: list[tuple[Path, InputError]] = []
        for i, image in enumerate(pool.imap(lambda path: _read(path, size), paths, chunksize=16)):
            bar.update()
            if isinstance(image, InputError):
                wrong.append((paths[i], image))
                continue
            if pixels is None:
                pixels = np.empty((len(paths), *image.shape), np.uint8)
            if image.shape != pixels.shape[1:]:
                first, other = ("{1}×{0}".format(*shape) for shape in (pixels.shape[1:], image.shape))
                raise _refusal(
                    f"images of two sizes, {paths[0]} with {first} px and {paths[i]} with {other} px: "
                    "give --size to bring them to one"
                )
            pixels[i] = image
    if wrong:
        others = ", ".join(str(path.relative_to(path.parents[2])) for path, _ in wrong[1:6]) + ", ..." * (len(wrong) > 6)
        more = f", nor can {len(wrong) - 1} more ({others})" if others else ""
        raise _refusal(f"{wrong[0][1]}{more}: replace or remove {'them' if more else 'it'}")
    result, start = {}, 0
    for split in SPLITS:
        labels = torch.tensor([label for label, inside in enumerate(files[split]) for _ in inside])
        part = torch.from_numpy(pixels[start : start + len(labels)])
        result[split] = (part.permute(0, 3, 1, 2).contiguous(), labels)
        start += len(labels)
    return result


def _read(path: Path, size: int | None) -> np.ndarray | InputError:
    """One image as uint8 [H, W, 3], or why it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            image = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # noqa: BLE001 - decoders meet bad bytes with errors of every kind
        return _refusal(f"{path} cannot be read as an image ({error or type(error).__name__})")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image)


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in 8-bit RGB."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; 8 and 16 are read")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
