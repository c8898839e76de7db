"""Pictures on disk or in the network become datasets: class-folder trees, arrays, CIFAR's published archives.

All that comes in is checked before a cache is written: an image that cannot be read, a link that leads out of the
tree, a part of CIFAR under the name of the whole are an `InputError`, one line that says what to do. A tree of more
pictures than memory should hold is written as shards, by shards.py.
"""

import contextlib
import math
import os
import socket
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bagssl import arrays, catalogue, layouts, pictures, shards
from bagssl.caches import blank, sound, store
from bagssl.catalogue import CIFAR, EMBEDDED, SPLITS, cache, how_to_add, is_name, one_line, refusal
from bagssl.errors import InputError
from bagssl.layouts import WANTED, Folder
from bagssl.paths import cores, sweep

SIZES = range(8, 1025)  # what --size may be, in pixels
DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer


def get(name: str, root: Path | None = None, force: bool = False) -> str:
    """Download cifar10 or cifar100 by torchvision into the cache; returns one line that says what was done.

    A sound cache is left alone, unless `force`. Raises InputError, leaving the cache as it was, when the
    machine is offline, the server does not answer or what it sends is damaged.
    """
    if name in EMBEDDED:
        return f"{name} is embedded: there is nothing to get"
    if name not in CIFAR:
        raise refusal(f"only {' and '.join(CIFAR)} can be downloaded: add {name!r} by {how_to_add(name)}")
    old = sound(name, root)
    if old and not force:
        return f"{name} is already in {cache(name, root)}: nothing to do"
    try:
        with _scratch(name, root) as scratch:
            splits = {split: _download(name, split, scratch) for split in SPLITS}
    except (OSError, RuntimeError, HTTPException) as error:  # no network, no answer, no disk; a wrong MD5
        raise refusal(f"{name} could not be downloaded ({error}): without a network, add its archive, or a "
                      f"class-folder tree of it, by bagssl data add {name} PATH") from error
    return store(name, splits, CIFAR[name][0], "torchvision", root, force, old)


def add(name: str, path: Path | str, size: int | None = None, root: Path | None = None, force: bool = False,
        follow_links: bool = False, classes: Path | str | None = None, skip_unreadable: bool = False) -> str:
    """Read a class-folder tree, an .npz file, or the published archive of CIFAR, into the cache of `name`.

    Of trees see layouts.py; links that lead out of one are followed only with `follow_links`, and a file of `classes`
    names those to take. Images may have any format that Pillow opens; they become 8-bit RGB: 16-bit greyscale keeps its
    upper 8 bits, transparency is laid over white, and the orientation in EXIF is applied. Those that cannot be read are
    refused, or with `skip_unreadable` left out. Of .npz files see arrays.py; the archive of cifar10 or cifar100 may be
    packed or unpacked. With `size` the centred square is resampled (bicubic, antialiased) to size×size px; without, all
    images must have one size. cifar10 and cifar100 must be complete. A tree of `catalogue.SHARDED_FROM` bytes of pixels
    and more becomes shards, and its large JPEGs are then decoded at a reduced scale (see `pictures.read`). Returns one
    line that says what was done; the same content twice changes nothing, and other content replaces a sound cache only
    with `force`. Raises InputError, leaving the cache as it was, on what is not so.
    """
    _check_question(name, size)
    path, said = Path(os.path.realpath(os.path.expanduser(path))), ""
    try:
        if not path.is_file() and not path.is_dir():
            raise refusal(f"{path} is not a folder, nor a file that can be read: {WANTED}")
        if path.is_dir() and not (name in CIFAR and not (path / "train").is_dir() and _unpacked(name, path)):
            found = layouts.find(path, follow_links, None if classes is None else Path(os.path.expanduser(classes)))
            return _add_tree(name, path, found, None if name in CIFAR else size, root, force, skip_unreadable)
        if classes is not None or skip_unreadable:
            raise refusal(f"--classes and --skip-unreadable go with class folders, and {path} is none: leave them out")
        old = sound(name, root)
        if arrays.is_npz(path):
            known = CIFAR[name][0] if name in CIFAR else None
            splits, names, said = arrays.read(path, None if name in CIFAR else size, known)
            source = f"arrays {path}"
        else:
            splits, names, source = _published(name, path, root), CIFAR[name][0], f"published archive {path}"
    except OSError as error:
        raise refusal(f"{path} cannot be read ({error}): give what you may read") from error
    return _store(name, splits, names, source, root, force, old) + said


def _check_question(name: str, size: int | None) -> None:
    if name in EMBEDDED:
        raise refusal(f"the name {name} belongs to embedded data: choose another")
    if not is_name(name):
        raise refusal(f"{name!r} cannot name a dataset: use small letters, digits, - and _")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size not in SIZES):
        raise refusal(f"--size is {size!r}: give a whole number of pixels from {SIZES[0]} to {SIZES[-1]}")
    if name in CIFAR and size not in (None, 32):
        raise refusal(f"{name} has images of 32×32 px: leave --size out, or add it under another name")


def _store(name: str, splits: Mapping[str, tuple[Tensor, Tensor]], classes: tuple[str, ...], source: str,
           root: Path | None, force: bool, old: dict[str, str] | None, skipped: int = 0) -> str:  # fmt: skip
    """As `caches.store`, when CIFAR is found to be what its name says."""
    _check_cifar(name, classes, {split: splits[split][1].bincount(minlength=len(classes)).tolist() for split in SPLITS})
    if name in CIFAR and splits["train"][0].shape[1:] != (3, 32, 32):
        raise refusal(f"{name} has images of 32×32 px, {source} has others: add it under another name")
    return store(name, splits, classes, one_line(source), root, force, old, skipped)


# Class folders


def _add_tree(name: str, tree: Path, found: tuple[Mapping[str, Sequence[Folder]], tuple[str, ...]], size: int | None,
              root: Path | None, force: bool, skip: bool) -> str:  # fmt: skip
    """Add what `layouts.find` has found in a tree, as one file or as shards; see `add`."""
    (files, classes), source = found, f"class folders {tree}"
    counts = {split: [len(folder.names) for folder in files[split]] for split in SPLITS}
    _check_cifar(name, classes, counts)  # before an hour's reading
    first, sides = _first((folder.path / each for split in SPLITS for folder in files[split] for each in folder.names),
                          size)  # fmt: skip
    if name not in CIFAR and 3 * math.prod(sides) * sum(map(sum, counts.values())) >= catalogue.SHARDED_FROM:
        return shards.add(name, found, source, size, sides, root, force, skip)
    old = sound(name, root)
    paths = [folder.path / each for split in SPLITS for folder in files[split] for each in folder.names]
    pixels, wrong = _decode(paths, size, first, sides)
    said = pictures.skip_unreadable([(str(paths[i].relative_to(tree)), str(fault)) for i, fault in wrong.items()],
                                    pictures.listing(name, root), skip)  # fmt: skip
    splits = _splits(pixels, wrong, counts, classes)
    return _store(name, splits, classes, source, root, force, old, len(wrong)) + said


def _first(paths: Iterable[Path], size: int | None) -> tuple[Path | None, tuple[int, int]]:
    """Height and width that `size` gives the pictures; or else the first which can be read, and those that it has."""
    if size is not None:
        return None, (size, size)
    with pictures.strict():
        images = ((path, pictures.read(path, None)) for path in paths)
        return next(((path, image.shape[1:]) for path, image in images if not isinstance(image, InputError)),
                    (None, (1, 1)))  # fmt: skip


def _check_cifar(name: str, classes: tuple[str, ...], found: Mapping[str, Sequence[int]]) -> None:
    """A part of CIFAR under the name of the whole would be a lie that no later number shows; found: images by class."""
    if name not in CIFAR:
        return
    expected, counts = CIFAR[name]
    if odd := min(set(classes) ^ set(expected), default=""):
        where = "is missing" if odd in expected else "does not belong"
        raise refusal(f"{name} has {len(expected)} classes; here {odd!r} {where}: add it under another name")
    if classes != expected:
        raise refusal(f"the classes of {name} have an order, {', '.join(expected[:3])}, …; here they have another: "
                      "number them so, or add it under another name")
    for split, count in counts.items():
        for label, here in zip(classes, found[split], strict=True):
            if here != count:
                raise refusal(f"{name} has {count:,} {split} images of each class, here are {here:,} "
                              f"of {label!r}: add it under another name")


def _decode(paths: Sequence[Path], size: int | None, first: Path | None,
            sides: tuple[int, int]) -> tuple[Tensor, dict[int, InputError]]:  # fmt: skip
    """The pixels of every file, uint8 [N, 3, H, W], and why those at some places cannot be read. Of `_first`: the rest.

    Raises InputError when the pictures are of two sizes.
    """
    pixels = blank(len(paths), *sides)
    places, wrong = pixels.numpy(), {}

    def put(i: int) -> InputError | tuple[int, ...] | None:
        image = pictures.read(paths[i], size)
        if isinstance(image, InputError):
            return image
        if image.shape != places.shape[1:]:
            return image.shape
        places[i] = image

    with (pictures.strict(), tqdm(total=len(paths), desc="reading images", unit="image", disable=None) as bar,
          ThreadPool(min(8, cores())) as pool):  # Pillow decodes outside the interpreter's lock
        for i, fault in enumerate(pool.imap(put, range(len(paths)), chunksize=16)):
            bar.update()
            if isinstance(fault, InputError):
                wrong[i] = fault
            elif fault:
                ours, other = ("{1}×{0}".format(*each) for each in (sides, fault[1:]))
                raise refusal(f"images of two sizes, {first} with {ours} px and {paths[i]} with {other} px: "
                              "give --size to bring them to one")
    return pixels, wrong


def _splits(pixels: Tensor, wrong: Mapping[int, InputError], counts: Mapping[str, Sequence[int]],
            classes: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Pixels and labels of each split, without those that could not be read: the others move up, in their memory."""
    kept = np.ones(len(pixels), bool)
    kept[list(wrong)] = False
    for place, i in enumerate(kept.nonzero()[0].tolist() if wrong else ()):
        pixels[place] = pixels[i]
    splits, start, filled = {}, 0, 0
    for split in SPLITS:
        labels = np.repeat(np.arange(len(classes)), counts[split])
        labels, start = torch.from_numpy(labels[kept[start : start + len(labels)]]), start + len(labels)
        pictures.check_left(classes, split, labels.bincount(minlength=len(classes)).tolist())
        splits[split], filled = (pixels[filled : filled + len(labels)], labels), filled + len(labels)
    return splits


# What was published of CIFAR


@contextlib.contextmanager
def _scratch(name: str, root: Path | None) -> Iterator[str]:
    """A folder beside the cache, for archives; what killed processes have left of such is swept."""
    path = cache(name, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as scratch:
        yield scratch


def _kind(name: str) -> type:
    from torchvision import datasets  # slow to import, and needed by nothing else here

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _download(name: str, split: str, folder: str) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [N, 3, 32, 32] and labels int64 [N] of the published archive; torchvision checks its MD5."""
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision itself would wait for ever
    try:
        return _opened(name, _kind(name)(folder, train=split == "train", download=True))
    finally:
        socket.setdefaulttimeout(waited)


def _opened(name: str, images) -> tuple[Tensor, Tensor]:
    """Pixels and labels of what torchvision has opened; RuntimeError where the classes are others."""
    if tuple(images.classes) != CIFAR[name][0]:
        raise RuntimeError("the archive has other classes")
    return torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets)


def _unpacked(name: str, folder: Path) -> Path | None:
    """The folder of the published files, this one or one in it; None when there is none."""
    kind = _kind(name)
    candidates = (folder, folder / kind.base_folder)
    return next((each for each in candidates if (each / kind.train_list[0][0]).is_file()), None)


def _published(name: str, path: Path, root: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """The splits of a published archive, packed or unpacked. Nothing in it is opened before its MD5 is found right."""
    if name not in CIFAR:
        raise refusal(f"{path} is not a folder, nor an .npz file: {WANTED}")
    from torchvision.datasets.utils import check_integrity  # slow, as in `_kind`

    kind = _kind(name)
    if path.is_file() and not check_integrity(path, kind.tgz_md5):
        raise refusal(f"{path} is not the published {kind.filename}, which has the MD5 {kind.tgz_md5}: give that one, "
                      "or a class-folder tree or an .npz file of it")
    try:
        if not path.is_file():
            return _unpickled(name, _unpacked(name, path))
        with _scratch(name, root) as scratch:
            with tarfile.open(path) as archive:
                archive.extractall(scratch, filter="data")
            return _unpickled(name, Path(scratch, kind.base_folder))
    except (OSError, RuntimeError, tarfile.TarError) as error:  # no disk; the MD5 of a file in the folder
        raise refusal(f"{path} cannot be read as what was published of {name} ({one_line(str(error))}): "
                      f"give {kind.filename} itself") from error


def _unpickled(name: str, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The splits of published files; torchvision checks the MD5 of each before it opens the first."""
    kind = type(name, (_kind(name),), {"base_folder": folder.name})
    return {split: _opened(name, kind(folder.parent, train=split == "train")) for split in SPLITS}
