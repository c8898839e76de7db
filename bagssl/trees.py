"""Pictures on disk or in the network become datasets: class-folder trees and downloads, into the caches of data.py.

All that comes in is checked before a cache is written: an image that cannot be read, a link that leads out of the
tree, a part of CIFAR under the name of the whole are an `InputError`, one line that says what to do.
"""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import unicodedata
import warnings
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from bagssl.data import CIFAR, EMBEDDED, FORMAT, SPLITS, Images, cache, check, how_to_add, is_name, one_line, refusal
from bagssl.errors import InputError
from bagssl.paths import cores, sweep, write_atomically

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
    if not force and _fingerprints(name, root):
        return f"{name} is already in {cache(name, root)}: nothing to do"
    path = cache(name, root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)  # archives of downloads that were killed
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as scratch:
            splits = {split: _download(name, split, scratch) for split in SPLITS}
    except (OSError, RuntimeError, HTTPException) as error:  # no network, no answer, no disk; a wrong MD5
        raise refusal(f"{name} could not be downloaded ({error}): without a network, add a class-folder tree of it by "
                      f"bagssl data add {name} PATH") from error
    return _store(name, splits, CIFAR[name][0], "torchvision", root, force)


def add(name: str, path: Path | str, size: int | None = None, root: Path | None = None, force: bool = False) -> str:
    """Read a class-folder tree, train/<class>/<image> and test/<class>/<image>, into the cache of `name`.

    Where there is no test, the second split may be called val, as ImageNet's is. Images may have any format that Pillow
    opens; they become 8-bit RGB: 16-bit greyscale keeps its upper 8 bits, transparency is laid over white, and the
    orientation in EXIF is applied. With `size` the centred square is resampled (bicubic, antialiased) to size×size px;
    without, all images must have one size. cifar10 and cifar100 must be complete. Returns one line that says what was
    done; the same content twice changes nothing, and other content replaces a sound cache only with `force`. Raises
    InputError, leaving the cache as it was, on what is not so.
    """
    if name in EMBEDDED:
        raise refusal(f"the name {name} belongs to embedded data: choose another")
    if not is_name(name):
        raise refusal(f"{name!r} cannot name a dataset: use small letters, digits, - and _")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size not in SIZES):
        raise refusal(f"--size is {size!r}: give a whole number of pixels from {SIZES[0]} to {SIZES[-1]}")
    if name in CIFAR and size not in (None, 32):
        raise refusal(f"{name} has images of 32×32 px: leave --size out, or add it under another name")
    tree = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        files, classes = _files(tree)
    except OSError as error:
        raise refusal(f"{tree} cannot be read ({error}): give a tree that you may read") from error
    if name in CIFAR:
        _check_cifar(name, files, classes)
    splits = _decode(files, size)
    if name in CIFAR and splits["train"][0].shape[1:] != (3, 32, 32):
        raise refusal(f"{name} has images of 32×32 px, {tree} has others: add it under another name")
    return _store(name, splits, classes, one_line(f"class folders {tree}"), root, force)


def _files(tree: Path) -> tuple[dict[str, list[list[Path]]], tuple[str, ...]]:
    """The files of each class (in order) in each split, and the classes."""
    wanted = "give one with train/<class>/ and test/<class>/ in it"
    if not tree.is_dir():
        raise refusal(f"{tree} is not a folder: {wanted}")
    second = next((name for name in ("test", "val", "valid", "validation") if (tree / name).is_dir()), "test")
    places = {"train": tree / "train", "test": tree / second}
    for place in places.values():
        if not place.is_dir():
            raise refusal(f"{tree} has no folder {place.name}: {wanted}")
    _entries(tree, tree)  # for links
    folders = {split: _entries(place, tree) for split, place in places.items()}
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
        raise refusal(f"{tree / 'train'} has fewer than two class folders, {len(train)}: a dataset needs two or more")
    files = {split: [_entries(folder, tree) for folder in folders[split]] for split in SPLITS}
    for split in SPLITS:
        for folder, inside in zip(folders[split], files[split]):
            if not inside:
                raise refusal(f"{folder} has no images")
            for file in inside:
                if not file.is_file():
                    raise refusal(f"{file} is no file: images lie directly in their class folder")
    return files, tuple(sorted(train))


def _composed(folder: Path) -> str:
    """The name of a class, one code for each letter: macOS writes é as two."""
    return unicodedata.normalize("NFC", folder.name)


def _entries(folder: Path, tree: Path) -> list[Path]:
    """What lies in a folder, by name, without dot files; a link that leads out of the tree is refused."""
    found = [entry for entry in sorted(folder.iterdir())
             if not entry.name.startswith(".") and entry.name not in _NOT_IMAGES]  # fmt: skip
    for entry in found:
        if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(tree):
            raise refusal(f"{entry} links out of the tree: put the files themselves there")
    return found


def _check_cifar(name: str, files: dict[str, list[list[Path]]], classes: tuple[str, ...]) -> None:
    """A part of CIFAR under the name of the whole would be a lie that no later number shows."""
    expected, counts = CIFAR[name]
    if classes != expected:
        odd = min(set(classes) ^ set(expected))
        where = "is missing" if odd in expected else "does not belong"
        raise refusal(f"{name} has {len(expected)} classes; here {odd!r} {where}: add it under another name")
    for split, count in counts.items():
        for label, found in zip(classes, files[split]):
            if len(found) != count:
                raise refusal(f"{name} has {count:,} {split} images of each class, this tree {len(found):,} "
                              f"of {label!r}: add it under another name")


def _decode(files: dict[str, list[list[Path]]], size: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Read every file: {split: (pixels uint8 [N, 3, H, W], labels int64 [N])}."""
    paths = [path for split in SPLITS for inside in files[split] for path in inside]
    pixels: np.ndarray | None = None
    with (warnings.catch_warnings(), tqdm(total=len(paths), desc="reading images", unit="image", disable=None) as bar,
          ThreadPool(min(8, cores())) as pool):  # Pillow decodes outside the interpreter's lock
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
                raise refusal(f"images of two sizes, {paths[0]} with {first} px and {paths[i]} with {other} px: "
                              "give --size to bring them to one")
            pixels[i] = image
    if wrong:
        named = [str(path.relative_to(path.parents[2])) for path, _ in wrong[1:6]]
        others = ", ".join([*named, *["..."] * (len(wrong) > 6)])
        more = f", nor can {len(wrong) - 1} more ({others})" if others else ""
        raise refusal(f"{wrong[0][1]}{more}: replace or remove {'them' if more else 'it'}")
    labels = [torch.tensor([label for label, inside in enumerate(files[split]) for _ in inside]) for split in SPLITS]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).split([len(each) for each in labels])
    return {split: (images[i].contiguous(), labels[i]) for i, split in enumerate(SPLITS)}


def _read(path: Path, size: int | None) -> np.ndarray | InputError:
    """One image as uint8 [H, W, 3], or why it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            image = _rgb(_upright(image), image.format)
    except Exception as error:  # noqa: BLE001 - decoders meet bad bytes with errors of every kind
        return refusal(f"{path} cannot be read as an image ({error or type(error).__name__})")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image)


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF says it is to be seen; what else stands there, and whether it is sound, is no matter."""
    with contextlib.suppress(Exception):
        image.getexif()  # read, and then kept from being written again
        for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
            image.info.pop(name, None)
        image = ImageOps.exif_transpose(image)
    return image


def _rgb(image: Image.Image, kind: str | None) -> Image.Image:
    """An image of any mode in 8-bit RGB; kind: of its file."""
    if image.mode.startswith("I;16") or image.mode == "I" and kind in ("PNG", "PPM"):  # of their 32 bits 16 are used
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; 8 and 16 are read")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _download(name: str, split: str, folder: str) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [N, 3, 32, 32] and labels int64 [N] of the published archive; torchvision checks its MD5."""
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


def _store(name: str, splits: dict, classes: tuple[str, ...], source: str, root: Path | None, force: bool) -> str:
    """Write the cache of {split: (pixels, labels)}; one line that says what was done."""
    path = cache(name, root)
    images = {split: Images(*_canonical(*splits[split]), classes) for split in SPLITS}
    new = {split: images[split].fingerprint for split in SPLITS}
    old = _fingerprints(name, root)
    if old == new:
        return one_line(f"{name} is already in {path} with the same content: nothing to do")
    if old and not force:
        raise refusal(f"{path} holds other images: choose another name, or replace them by --force")
    about = {"format": FORMAT, "name": name, "classes": list(classes), "source": source} | new
    tensors = {f"{split}_{kind}": getattr(images[split], kind) for kind in ("pixels", "labels") for split in SPLITS}
    try:
        with write_atomically(path) as temporary:
            content = save(tensors, {"bagssl": json.dumps(about)})  # `save_file` would put another file there
            temporary.write_bytes(content)
    except (OSError, SafetensorError) as error:
        raise refusal(f"{path} cannot be written ({error}): free the disk, or set BAGSSL_DATA") from error
    counts = " and ".join(f"{len(images[split]):,} {split}" for split in SPLITS)
    size = "{2}×{3}".format(*images["train"].pixels.shape)
    return one_line(f"{name}: {counts} images of {size} px in {len(classes)} classes, in {path}")
