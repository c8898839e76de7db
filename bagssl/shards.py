"""A tree of pictures too many for memory becomes shards: files of some of its pictures each, written by all cores.

A shard is decoded and written by one process, whole or not at all, and its name follows from the files that it is made
of: their names, lengths and times. So the call after one that was killed goes on with the shards that are not there
yet, and memory holds a shard for each core and the names of files, however many pictures there are. At the end the
index is written (see `catalogue.sharded`): until then the dataset is what it was before. Nothing here imports torch,
which each of the processes would load.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from safetensors.numpy import save

from bagssl import catalogue, pictures
from bagssl.catalogue import FORMAT, SPLITS, cache, damaged, index_of, one_line, opened, refusal, sharded
from bagssl.errors import InputError
from bagssl.layouts import Folder
from bagssl.locks import guarding, lock_at
from bagssl.paths import cores, write_atomically, write_text
from bagssl.progress import notice, progress_bar

SHARD = 2**26  # bytes of pixels in a shard, at most


@dataclass(frozen=True)
class Shard:
    """What is to become one file: pictures of a split, class by class."""

    path: Path
    split: str
    held: tuple[tuple[int, Folder], ...]  # label, and pictures of it
    size: int | None  # as in `trees.add`
    sides: tuple[int, int]  # height and width that `size` gives, or that all pictures must have

    def __len__(self) -> int:
        return sum(len(folder.names) for _, folder in self.held)


def add(name: str, found: tuple[Mapping[str, Sequence[Folder]], tuple[str, ...]], source: str, size: int | None,
        sides: tuple[int, int], root: Path | None, force: bool, skip: bool) -> str:  # fmt: skip
    """Write the pictures that `layouts.find` has found as shards; returns one line that says what was done.

    size and sides: as in `Shard`. skip: pictures that cannot be read are left out, and counted in the index. Raises
    InputError when there are such and `skip` is not given, when there is other data of that name and `force` is not
    given, and when the disk refuses; what was decoded until then is kept for the next call.
    """
    (files, classes), folder = found, index_of(name, root).parent
    shards = _plan(folder, files, size, sides)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, name):
            if _is_there(name, root, shards, force):
                return one_line(f"{name} is already in {folder} with the same content: nothing to do")
            _write_all(shards, name)
            return _finish(name, root, shards, classes, one_line(source), skip)
    except OSError as error:
        raise refusal(f"{folder} cannot be written ({error}): free the disk, or set BAGSSL_DATA") from error


@contextlib.contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """No two processes add one dataset: each would clear away what the other has written."""
    lock, busy = lock_at(folder / ".adding"), f"another process is adding {name}"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            with notice(f"{busy}{lock.holder}: looking whether it lives") if lock.doubt else contextlib.nullcontext():
                lock.acquire(timeout=lock.doubt)
        except Timeout:
            raise refusal(f"{busy}{lock.holder}: wait for it, or choose another name") from None
    with guarding(folder, lock):
        yield


def _plan(folder: Path, files: Mapping[str, Sequence[Folder]], size: int | None,
          sides: tuple[int, int]) -> list[Shard]:  # fmt: skip
    """All shards, by class and name of the pictures: each has its place before one is read."""
    shards, done, most = [], 0, max(1, SHARD // (3 * sides[0] * sides[1]))
    total = sum(len(each.names) for split in SPLITS for each in files[split])
    with progress_bar(total, 0, "looking at files", unit="images") as bar:
        for split in SPLITS:
            for held in _portions(files[split], most):
                path = folder / f"{split}-{_digest(split, held, size, sides)}.safetensors"
                shards.append(Shard(path, split, tuple(held), size, sides))
                bar(done := done + len(shards[-1]), "")
    return shards


def _portions(folders: Sequence[Folder], most: int) -> Iterator[list[tuple[int, Folder]]]:
    """The pictures of a split with their labels, `most` at a time."""
    held, room = [], most
    for label, (path, names) in enumerate(folders):
        start = 0
        while start < len(names):
            held.append((label, Folder(path, names[start : start + room])))
            taken = len(held[-1][1].names)
            start, room = start + taken, room - taken
            if not room:
                yield held
                held, room = [], most
    if held:
        yield held


def _digest(split: str, held: Sequence[tuple[int, Folder]], size: int | None, sides: tuple[int, int]) -> str:
    """Of what a shard is made, without a look into the pictures."""
    digest = hashlib.sha256(json.dumps([FORMAT, split, size, sides]).encode())
    for label, (path, names) in held:
        for each in names:
            known = os.stat(path / each)
            digest.update(json.dumps([label, path.name, each, known.st_size, known.st_mtime_ns]).encode())
    return digest.hexdigest()[:16]


def _is_there(name: str, root: Path | None, shards: Sequence[Shard], force: bool) -> bool:
    """Whether the dataset is there already, and sound. What is damaged of it is removed, to be written again."""
    about = None
    with contextlib.suppress(InputError):  # a damaged index is written again
        about = sharded(name, root, complete=False)
    if about and {shard.path.name for shard in shards} == {each["file"] for each in _entries(about)}:
        wrong = faults(name, root, about)
        for file in wrong:
            index_of(name, root).with_name(file).unlink(missing_ok=True)
        return not wrong
    if (about or _record(cache(name, root), name)) and not force:
        where = index_of(name, root).parent if about else cache(name, root)
        raise refusal(f"{where} holds other images, or files that were touched since: choose another name, or replace "
                      "them by --force")
    return False


def _record(path: Path, name: str) -> dict[str, Any] | None:
    """The header of a cache or a shard; None when it is not there, or not whole."""
    with contextlib.suppress(InputError), opened(path, name, "np") as (_, about):
        return about
    return None


def faults(name: str, root: Path | None, about: Mapping[str, Any]) -> dict[str, InputError]:
    """Read all shards of an index: the files that are not as they were written, each with what to raise."""
    folder, entries, wrong = index_of(name, root).parent, list(_entries(about)), {}

    def fault(entry: Mapping[str, Any]) -> InputError | None:
        path = folder / entry["file"]
        try:
            with opened(path, name, "np") as (file, _):
                found = hashlib.sha256(file.get_tensor("pixels")).hexdigest()
        except InputError as error:
            return error
        if found != entry["sha256"]:
            return damaged(path, name, f"it has SHA-256 {found[:12]}, not {entry['sha256'][:12]}")

    with (progress_bar(len(entries), 0, f"checking {name}", unit="shards") as bar,
          ThreadPool(min(8, cores())) as pool):  # hashing needs no interpreter
        for done, (entry, error) in enumerate(zip(entries, pool.imap(fault, entries)), 1):
            bar(done, "")
            wrong |= {entry["file"]: error} if error else {}
    return wrong


def _entries(about: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (entry for split in SPLITS for entry in about["splits"][split]["shards"])


# Decoding, each shard in one of several processes


def _write_all(shards: Sequence[Shard], name: str) -> None:
    """Write the shards that are not there. Stopped, it leaves those whole that are begun."""
    todo = [shard for shard in shards if not _record(shard.path, name)]
    total, left = sum(map(len, shards)), sum(map(len, todo))
    context = multiprocessing.get_context("spawn")  # threads of this process do not survive a fork
    with (progress_bar(total, total - left, "reading images", unit="images") as bar,
          ProcessPoolExecutor(max(1, min(cores(), len(todo))), context, _begin) as pool):  # fmt: skip
        try:
            with _unheard(signal.SIGINT):  # Ctrl-C is for this process: those that are started here never hear it
                futures = [pool.submit(_write, shard) for shard in todo]
            for future in as_completed(futures):
                left -= future.result()
                bar(total - left, "")
        except BrokenProcessPool as error:
            raise MemoryError("a process that decodes images was killed; the next call goes on from there") from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _unheard(number: int) -> Iterator[None]:
    """A signal waits until the end, and for ever in processes that are started in between."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows: a Ctrl-C goes to all
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """In each process: it ends with the one that has started it, however that ends."""
    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write(shard: Shard) -> int:
    """Decode a shard and write it; how many pictures that were. Raises InputError for one of another size."""
    pixels, count, wrong = np.empty((len(shard), 3, *shard.sides), np.uint8), 0, []
    with pictures.strict():
        for label, path in ((label, folder.path / each) for label, folder in shard.held for each in folder.names):
            image = pictures.read(path, shard.size, reduced=True)
            if isinstance(image, InputError):
                wrong.append([label, "/".join(path.parts[-3:]), str(image)])
                continue
            if image.shape[1:] != shard.sides:
                sizes = ["{1}×{0}".format(*sides) for sides in (shard.sides, image.shape[1:])]
                raise refusal(f"images of two sizes, {sizes[0]} px and {path} with {sizes[1]} px: give --size to "
                              "bring them to one")
            pixels[count], count = image, count + 1
    pixels = pixels[:count]
    about = {"format": FORMAT, "sha256": hashlib.sha256(pixels).hexdigest(), "unreadable": wrong}
    with write_atomically(shard.path) as temporary:  # `save_file`, killed, leaves a file that nobody clears away
        temporary.write_bytes(save({"pixels": pixels}, {"bagssl": json.dumps(about)}))
    return len(shard)


# The index


def _finish(name: str, root: Path | None, shards: Sequence[Shard], classes: tuple[str, ...], source: str,
            skip: bool) -> str:  # fmt: skip
    """Write the index of shards that are all there, and clear away what it does not name; a line on what was done."""
    path, wrong, splits = index_of(name, root), [], {split: {"images": 0, "shards": []} for split in SPLITS}
    for shard in shards:
        record = _record(shard.path, name)
        wrong += [(file, reason) for _, file, reason in record["unreadable"]]
        lost = Counter(label for label, *_ in record["unreadable"])
        labels = [[label, len(folder.names) - lost[label]] for label, folder in shard.held]
        splits[shard.split]["images"] += sum(count for _, count in labels)
        splits[shard.split]["shards"].append({"file": shard.path.name, "bytes": shard.path.stat().st_size,
                                              "sha256": record["sha256"], "labels": labels})  # fmt: skip
    skipped = pictures.skip_unreadable(wrong, pictures.listing(name, root), skip)
    size = list(shards[0].sides)
    for split, part in splits.items():
        counts = sum((Counter(dict(entry["labels"])) for entry in part["shards"]), Counter())
        pictures.check_left(classes, split, [counts[label] for label in range(len(classes))])
        part["fingerprint"] = _fingerprint(size, classes, part["shards"])
    about = {"format": catalogue.SHARDED, "name": name, "classes": list(classes), "source": source, "size": size,
             "skipped": len(wrong), "splits": splits}  # fmt: skip
    write_text(path, json.dumps(about | {"sha256": catalogue.digest_of(about)}))
    cache(name, root).unlink(missing_ok=True)
    for left in set(path.parent.glob("*.safetensors")) - {shard.path for shard in shards}:
        left.unlink()
    counts = " and ".join(f"{part['images']:,} {split}" for split, part in splits.items())
    return one_line(f"{name}: {counts} images of {size[1]}×{size[0]} px in {len(classes)} classes, in {len(shards):,} "
                    f"shards in {path.parent}{skipped}")  # fmt: skip


def _fingerprint(size: Sequence[int], classes: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> str:
    """Of a split: SHA-256, in hex, over height and width, classes, and the SHA-256 and labels of each shard."""
    content = [list(size), list(classes), [[entry["sha256"], entry["labels"]] for entry in entries]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def drop(name: str, root: Path | None) -> None:
    """Remove a dataset that lies in shards, its index first: what is left without one is none."""
    path = index_of(name, root)
    path.unlink(missing_ok=True)
    for left in (*path.parent.glob("*.safetensors"), *path.parent.glob(".adding*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there was none, or something else lies there
        path.parent.rmdir()
