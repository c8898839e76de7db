"""How images become the cache of a dataset: in their canonical order, never twice in memory, all or nothing."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bagssl import shards
from bagssl.catalogue import FORMAT, SPLITS, cache, index_of, one_line, refusal
from bagssl.data import blocks, check, fingerprint
from bagssl.errors import InputError
from bagssl.paths import write_atomically


def blank(count: int, height: int, width: int) -> Tensor:
    """Room for images, uint8 [N, 3, H, W], to be filled. Raises InputError when the memory has not as much."""
    needed, free = 3 * count * height * width, free_memory()
    try:
        if needed <= free:
            return torch.empty(count, 3, height, width, dtype=torch.uint8)
    except RuntimeError:  # a limit that was set for this process
        free = 0
    raise refusal(f"{count:,} images of {width}×{height} px need {needed / 1e9:,.1f} GB of memory, and there are "
                  f"{free / 1e9:,.1f}: give a smaller --size, or fewer images")


def free_memory() -> int:
    """Bytes that can be had without driving others out; where the system does not say, all that it has."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sound(name: str, root: Path | None) -> dict[str, str] | None:
    """The fingerprints of a sound cache; None when there is none, or a damaged one, which may be replaced."""
    try:
        return check(name, root)
    except InputError:
        return None


def store(name: str, splits: Mapping[str, tuple[Tensor, Tensor]], classes: tuple[str, ...], source: str,
          root: Path | None, force: bool, old: dict[str, str] | None, skipped: int = 0) -> str:  # fmt: skip
    """Write the cache of {split: (pixels, labels)}, of which the `old` fingerprints are known; a line on what was done.

    The images are left where they lie, and written in their canonical order. skipped: how many could not be read.
    Raises InputError, leaving the cache as it was, when it holds others and `force` is not given, or when it cannot be
    written.
    """
    path, orders = cache(name, root), {split: canonical(*splits[split]) for split in SPLITS}
    new = {split: fingerprint(*splits[split], classes, orders[split]) for split in SPLITS}
    if old == new:
        return one_line(f"{name} is already in {path} with the same content: nothing to do")
    if old and not force:
        where = index_of(name, root).parent if index_of(name, root).is_file() else path
        raise refusal(f"{where} holds other images: choose another name, or replace them by --force")
    about = {"format": FORMAT, "name": name, "classes": list(classes), "source": source} | new
    about |= {"skipped": skipped} if skipped else {}
    try:
        with write_atomically(path) as temporary:
            _write(temporary, splits, orders, {"bagssl": json.dumps(about)})
        shards.drop(name, root)
    except OSError as error:
        raise refusal(f"{path} cannot be written ({error}): free the disk, or set BAGSSL_DATA") from error
    counts = " and ".join(f"{len(splits[split][1]):,} {split}" for split in SPLITS)
    size = "{2}×{3}".format(*splits["train"][0].shape)
    return one_line(f"{name}: {counts} images of {size} px in {len(classes)} classes, in {path}")


def canonical(pixels: Tensor, labels: Tensor) -> Tensor:
    """The order of images by label, then by the SHA-256 of their pixels: the same images get the same fingerprint, and
    give the same run, whether they came from an archive or a folder, whatever the files are called."""
    keys = [(label, hashlib.sha256(image).digest()) for label, image in zip(labels.tolist(), pixels.numpy())]
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))


def _write(path: Path, splits: Mapping[str, tuple[Tensor, Tensor]], orders: Mapping[str, Tensor],
           metadata: dict[str, str]) -> None:  # fmt: skip
    """A file of safetensors, to the byte as the library's own `save` gives it, which would hold it all in memory."""
    names = sorted(SPLITS)
    tensors = {f"{split}_{kind}": splits[split][i] for kind, i in (("labels", 1), ("pixels", 0)) for split in names}
    layout, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():  # the widest numbers come first, then the names count
        start, end = end, end + tensor.nbytes
        kind = {torch.int64: "I64", torch.uint8: "U8"}[tensor.dtype]
        layout[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(layout, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.writelines(splits[split][1][orders[split]].numpy() for split in names)
        for split in names:
            stream.writelines(block.numpy() for block in blocks(splits[split][0], orders[split]))
