"""Pictures on disk or in the network become datasets: class-folder trees, arrays, CIFAR's published archives.

All that comes in is checked before a cache is written: an image that cannot be read, a link that leads out of the
tree, a part of CIFAR under the name of the whole are an `InputError`, one line that says what to do.
"""

import contextlib
import os
import socket
import tarfile
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bagssl import arrays, pictures
from bagssl.caches import blank, sound, store
from bagssl.catalogue import CIFAR, EMBEDDED, SPLITS, cache, how_to_add, is_name, one_line, refusal
from bagssl.errors import InputError
from bagssl.paths import cores, sweep

SIZES = range(8, 1025)  # what --size may be, in pixels
DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer
_NOT_IMAGES = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # what file managers leave behind; dot files as well


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
        follow_links: bool = False) -> str:  # fmt: skip
    """Read a class-folder tree, an .npz file, or the published archive of CIFAR, into the cache of `name`.

    A tree is train/<class>/<image> and test/<class>/<image>; where there is no test, the second split may be called
    val, as ImageNet's is. Links that lead out of it are followed only with `follow_links`. Images may have any format
    that Pillow opens; they become 8-bit RGB: 16-bit greyscale keeps its upper 8 bits, transparency is laid over white,
    and the orientation in EXIF is applied. Of .npz files see arrays.py; the archive of cifar10 or cifar100 may be
    packed or unpacked. With `size` the centred square is resampled (bicubic, antialiased) to size×size px; without, all
    images must have one size. cifar10 and cifar100 must be complete. Returns one line that says what was done; the same
    content twice changes nothing, and other content replaces a sound cache only with `force`. Raises InputError,
    leaving the cache as it was, on what is not so.
    """
    if name in EMBEDDED:
        raise refusal(f"the name {name} belongs to embedded data: choose another")
    if not is_name(name):
        raise refusal(f"{name!r} cannot name a dataset: use small letters, digits, - and _")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size not in SIZES):
        raise refusal(f"--size is {size!r}: give a whole number of pixels from {SIZES[0]} to {SIZES[-1]}")
    if name in CIFAR and size not in (None, 32):
        raise refusal(f"{name} has images of 32×32 px: leave --size out, or add it under another name")
    path, said = Path(os.path.realpath(os.path.expanduser(path))), ""
    try:
        if not path.is_file() and not path.is_dir():
            raise refusal(f"{path} is not a folder, nor a file that can be read: {_WANTED}")
        old = sound(name, root)
        if arrays.is_npz(path):
            known = CIFAR[name][0] if name in CIFAR else None
            splits, classes, said = arrays.read(path, None if name in CIFAR else size, known)
            source = f"arrays {path}"
        elif path.is_file() or name in CIFAR and not (path / "train").is_dir() and _unpacked(name, path):
            splits, classes, source = _published(name, path, root), CIFAR[name][0], f"published archive {path}"
        else:
            splits, classes = _tree(name, path, None if name in CIFAR else size, follow_links)
            source = f"class folders {path}"
    except OSError as error:
        raise refusal(f"{path} cannot be read ({error}): give what you may read") from error
    _check_cifar(name, classes, {split: splits[split][1].bincount(minlength=len(classes)).tolist() for split in SPLITS})
    if name in CIFAR and splits["train"][0].shape[1:] != (3, 32, 32):
        raise refusal(f"{name} has images of 32×32 px, {path} has others: add it under another name")
    return store(name, splits, classes, one_line(source), root, force, old) + said


# Class folders

_WANTED = "give a folder with train/<class>/ and test/<class>/ in it, or an .npz file"


def _tree(name: str, tree: Path, size: int | None, follow_links: bool) -> tuple[dict, tuple[str, ...]]:
    """{split: (pixels uint8 [N, 3, H, W], labels int64 [N])} and the classes of a class-folder tree."""
    files, classes = _files(tree, follow_links)
    counts = {split: [len(inside) for inside in files[split]] for split in SPLITS}
    _check_cifar(name, classes, counts)  # before an hour's reading
    pixels = _decode([path for split in SPLITS for inside in files[split] for path in inside], size)
    labels = [torch.from_numpy(np.repeat(np.arange(len(classes)), counts[split])) for split in SPLITS]
    return dict(zip(SPLITS, zip(pixels.split([len(each) for each in labels]), labels, strict=True))), classes


def _files(tree: Path, follow_links: bool) -> tuple[dict[str, list[list[Path]]], tuple[str, ...]]:
    """The files of each class (in order) in each split, and the classes."""
    places = _places(tree)
    for place in places.values():
        _check_link(place, tree, follow_links)
    folders = {split: _entries(place, tree, follow_links) for split, place in places.items()}
    for entry in [*folders["train"], *folders["test"]]:
        if not entry.is_dir():
            raise refusal(f"{entry} lies outside the class folders: move it into one, or away")
    train, test = ({_composed(entry): entry for entry in folders[split]} for split in SPLITS)
    for split, classes in (("train", train), ("test", test)):
        if twice := [entry for entry in folders[split] if classes[_composed(entry)] != entry]:
            raise refusal(f"{places[split]} has the class {_composed(twice[0])!r} twice, in two spellings: merge them")
    for alone, there, lacking in ((train.keys() - test, "train", "test"), (test.keys() - train, "test", "train")):
        if alone:
            raise refusal(f"the class {min(alone)!r} is in {places[there]} but not in {places[lacking]}")
    folders = {"train": [train[name] for name in sorted(train)], "test": [test[name] for name in sorted(test)]}
    if len(train) < 2:
        raise refusal(f"{places['train']} has fewer than two class folders, {len(train)}: a dataset needs two or more")
    files = {split: [_entries(folder, tree, follow_links) for folder in folders[split]] for split in SPLITS}
    for split in SPLITS:
        for folder, inside in zip(folders[split], files[split]):
            if not inside:
                raise refusal(f"{folder} has no images")
            for file in inside:
                if not file.is_file():
                    what = "is no file" if file.is_dir() else "is no file but a device or a pipe"
                    raise refusal(f"{file} {what}: images lie directly in their class folder")
    return files, tuple(sorted(train))


def _places(tree: Path) -> dict[str, Path]:
    """The folders of the two splits: train and test, or val in its place, in small letters or capitals."""
    found = {entry.name.lower(): entry for entry in sorted(tree.iterdir()) if entry.is_dir() or entry.is_symlink()}
    second = next((name for name in ("test", "val", "valid", "validation") if name in found), "test")
    for name in ("train", second):
        if name not in found:
            raise refusal(f"{tree} has no folder {name}: {_WANTED}")
    return {"train": found["train"], "test": found[second]}


def _composed(folder: Path) -> str:
    """The name of a class, one code for each letter: macOS writes é as two."""
    return unicodedata.normalize("NFC", folder.name)


def _entries(folder: Path, tree: Path, follow_links: bool) -> list[Path]:
    """What lies in a folder, by name, without dot files."""
    found = [entry for entry in sorted(folder.iterdir())
             if not entry.name.startswith(".") and entry.name not in _NOT_IMAGES]  # fmt: skip
    for entry in found:
        _check_link(entry, tree, follow_links)
    return found


def _check_link(entry: Path, tree: Path, follow_links: bool) -> None:
    """A link leads to something, and only where that is asked for out of the tree."""
    if entry.is_symlink():
        try:
            target = Path(os.path.realpath(entry, strict=True))
        except OSError as error:
            raise refusal(f"{entry} is a link that leads nowhere ({error.strerror}): mend or remove it") from error
        if not follow_links and not target.is_relative_to(tree):
            raise refusal(f"{entry} links out of the tree: put the files themselves there, or give --follow-links")


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


def _decode(paths: Sequence[Path], size: int | None) -> Tensor:
    """The pixels of every file, uint8 [N, 3, H, W]."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # of odd EXIF data
        images = ((path, pictures.read(path, size)) for path in paths)
        first, image = next(((path, image) for path, image in images if not isinstance(image, InputError)), ("", None))
        pixels = blank(len(paths), *(image.shape[1:] if image is not None else (1, 1)))
        wrong = _fill(pixels.numpy(), paths, size, first)
    if wrong:
        named = [str(path.relative_to(path.parents[2])) for path, _ in wrong[1:6]]
        others = ", ".join([*named, *["..."] * (len(wrong) > 6)])
        more = f", nor can {len(wrong) - 1} more ({others})" if others else ""
        raise refusal(f"{wrong[0][1]}{more}: replace or remove {'them' if more else 'it'}")
    return pixels


def _fill(pixels: np.ndarray, paths: Sequence[Path], size: int | None, first: Path) -> list[tuple[Path, InputError]]:
    """Decode every file into its place; those that cannot be read. first: one that gave the pixels their shape."""
    def put(i: int) -> InputError | tuple[int, ...] | None:
        image = pictures.read(paths[i], size)
        if isinstance(image, InputError):
            return image
        if image.shape != pixels.shape[1:]:
            return image.shape
        pixels[i] = image

    wrong: list[tuple[Path, InputError]] = []
    with (tqdm(total=len(paths), desc="reading images", unit="image", disable=None) as bar,
          ThreadPool(min(8, cores())) as pool):  # Pillow decodes outside the interpreter's lock
        for path, fault in zip(paths, pool.imap(put, range(len(paths)), chunksize=16)):
            bar.update()
            if isinstance(fault, InputError):
                wrong.append((path, fault))
            elif fault:
                ours, other = ("{2}×{1}".format(*shape) for shape in (pixels.shape[1:], fault))
                raise refusal(f"images of two sizes, {first} with {ours} px and {path} with {other} px: "
                              "give --size to bring them to one")
    return wrong


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
        raise refusal(f"{path} is not a folder, nor an .npz file: {_WANTED}")
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
