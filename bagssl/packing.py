"""Runs that travel: packed into files small enough for any way, and unpacked whole or not at all.

A pack is a compressed tar of run folders, cut into parts. Each part begins with a line of JSON that says which pack it
belongs to, its place in it, and the SHA-256 of what follows: what is damaged or missing is known by name.
"""

import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bagssl import runs
from bagssl.errors import InputError, check_choice
from bagssl.paths import runs_root, sweep, write_atomically
from bagssl.runs import HALF, MARK, RECORD, WEIGHTS, Run

FORMAT, SUFFIX = "bagssl-runs-1", ".bagssl"
KINDS = ("none", "fp16", "fp32")
LEAST = 2**14  # bytes of a part
_HEAD = 2**10  # bytes of a part's first line, at most
_FILES = ("config.json", *RECORD, MARK)  # of a run, but for weights and evaluations
_MEMBER = re.compile(rf"[\w-]+/({'|'.join((*_FILES, WEIGHTS, HALF))}|evaluations/[0-9a-f]+\.json)")


def export(chosen: Sequence[Run], folder: Path | str, part: int = 15 * 2**20, weights: str = "fp16", *,
           new: bool = False) -> list[Path]:
    """Pack finished runs, and what was measured on them, into files of at most `part` bytes in `folder`.

    weights: 'fp32' as they are, 'fp16' rounded, half the size and marked as such, or 'none'. A run whose weights are
    not here, or here as fp16 alone, travels with what it has. new: only what no pack in `folder` holds, perhaps
    nothing. Raises InputError for no run, one that is not finished, or one that is damaged.
    """
    check_choice("weights", weights, KINDS)
    if part < LEAST:
        raise InputError(f"parts of {part:,} bytes are too small: give {LEAST // 2**10}KiB or more")
    if not chosen and not new:
        raise InputError("there is no finished run to export")
    for run in chosen:
        if not run.finished:
            raise InputError(f"{run.path} is not finished: train it to its end, or export others")
        run.check()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder / "any")
    before = _members(folder) if new else set()
    lacking = {run: [name for name in _names(run, weights) if f"{run.path.name}/{name}" not in before]
               for run in chosen}  # fmt: skip
    if not any(lacking.values()):
        return []
    with tempfile.TemporaryFile(dir=folder) as packed:
        with (gzip.GzipFile("", "wb", 6, packed, mtime=0) as stream,  # the same runs make the same files
              tarfile.open(fileobj=stream, mode="w") as tar):  # fmt: skip
            for run in sorted((run for run in chosen if lacking[run]), key=lambda each: each.path.name):
                for name in dict.fromkeys((*lacking[run], *_FILES)):  # a pack is whole: the record goes with all
                    content = _content(run, name, folder)
                    member = tarfile.TarInfo(f"{run.path.name}/{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return list(_cut(packed, folder, part - _HEAD))


def _members(folder: Path) -> set[str]:
    """The files of runs that the packs in a folder hold, as RUN/NAME."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for pack, parts in (_packs([folder]) if list(folder.glob(f"*{SUFFIX}")) else {}).items():
            _extract(pack, parts, Path(scratch))
        return {path.relative_to(scratch).as_posix() for path in Path(scratch).rglob("*") if path.is_file()}


def _names(run: Run, weights: str) -> list[str]:
    """The files of a run that travel, its record last."""
    whole = (run.path / WEIGHTS).exists()
    name = WEIGHTS if weights == "fp32" and whole else HALF if weights != "none" and (whole or run.halved) else None
    evaluations = sorted(f"evaluations/{path.name}" for path in run.path.glob("evaluations/*.json"))
    return [*filter(None, [name]), *evaluations, *_FILES]


def _content(run: Run, name: str, folder: Path) -> bytes:
    """What a file that travels holds. Raises InputError for a damaged one."""
    path = run.path / name
    if name == HALF and not run.halved:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            runs.write_half(run, half := Path(scratch, HALF))
            return half.read_bytes()
    if path.parent != run.path:
        runs.read_json(path)
    return path.read_bytes()


def _cut(packed: io.BufferedIOBase, folder: Path, size: int) -> Iterator[Path]:
    """Write the parts of `size` bytes and their first lines."""
    packed.seek(0)
    whole = hashlib.file_digest(packed, "sha256").hexdigest()
    count = math.ceil(packed.tell() / size)
    packed.seek(0)
    for i in range(1, count + 1):
        content = packed.read(size)
        head = {"format": FORMAT, "pack": whole, "part": i, "of": count, "sha256": hashlib.sha256(content).hexdigest()}
        path = folder / _name(whole, i, count)
        with write_atomically(path) as temporary:
            temporary.write_bytes(json.dumps(head).encode() + b"\n" + content)
        yield path


def _name(pack: str, part: int, count: int) -> str:
    return f"runs-{pack[:8]}-{part:0{len(str(count))}d}-of-{count}{SUFFIX}"


# ---- unpacking


def unpack(files: Iterable[Path | str], root: Path | None = None) -> list[str]:
    """Bring the runs of packs, given by all their parts or the folders that hold them, into the store at `root`.

    Of a run that is here already, what it lacks is added: weights, evaluations. Returns a line for each run. Raises
    InputError, and changes nothing, for a part that is missing or damaged, and for a run that is here with other
    weights; Stopped at one that is being trained, when those before it are in the store: the next call goes on.
    """
    root = root or runs_root()
    root.mkdir(parents=True, exist_ok=True)
    sweep(root / "any")
    with tempfile.TemporaryDirectory(dir=root, prefix=".import.", suffix=".tmp") as scratch:
        for pack, parts in _packs(files).items():
            _extract(pack, parts, Path(scratch))
        came = [Run(path) for path in sorted(Path(scratch).iterdir()) if path.is_dir()]
        for run in came:
            _check(run, Run(root / run.path.name))
        return [_merge(run, Run(root / run.path.name)) for run in came]


@dataclass(frozen=True)
class _Part:
    """A part of a pack: its file, its place among `of`, and where its content begins."""

    path: Path
    place: int
    of: int
    start: int
    digest: str


def _packs(files: Iterable[Path | str]) -> dict[str, list[_Part]]:
    """The parts of each pack, in order and complete."""
    found: dict[str, dict[int, _Part]] = {}
    paths = [path for given in map(Path, files)
             for path in (sorted(given.glob(f"*{SUFFIX}")) if given.is_dir() else [given])]  # fmt: skip
    if not paths:
        raise InputError(f"there is no file to import: give the parts (*{SUFFIX}), or the folder that holds them")
    for path in paths:
        try:
            with open(path, "rb") as stream:
                line = stream.readline(_HEAD)
            head = json.loads(line)
            pack, kind = str(head["pack"]), head["format"]
            part = _Part(path, int(head["part"]), int(head["of"]), len(line), str(head["sha256"]))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no part of exported runs, or damaged at its beginning") from error
        if kind != FORMAT:
            raise InputError(f"{path} has the format {kind}, this bagssl reads {FORMAT}")
        found.setdefault(pack, {})[part.place] = part
    for pack, parts in found.items():
        count = next(iter(parts.values())).of
        if missing := [i for i in range(1, count + 1) if i not in parts]:
            raise InputError(f"{_name(pack, missing[0], count)} is missing: give all {count} parts together")
    return {pack: [parts[i] for i in sorted(parts)] for pack, parts in found.items()}


def _extract(pack: str, parts: Sequence[_Part], folder: Path) -> None:
    """Check the parts and put the files of their runs into `folder`."""
    with tempfile.TemporaryFile(dir=folder) as packed:
        for part in parts:
            with open(part.path, "rb") as stream:
                stream.seek(part.start)
                content = stream.read()
            if hashlib.sha256(content).hexdigest() != part.digest:
                raise InputError(f"{part.path} is damaged (its SHA-256 differs): copy it again")
            packed.write(content)
        packed.seek(0)
        if hashlib.file_digest(packed, "sha256").hexdigest() != pack:
            raise InputError(f"{parts[0].path} and the parts beside it make no whole: copy them again")
        packed.seek(0)
        try:
            with tarfile.open(fileobj=packed, mode="r:gz") as tar:
                for member in tar:
                    if not member.isfile() or not _MEMBER.fullmatch(member.name):
                        raise InputError(f"{parts[0].path} holds {member.name!r}, which is no file of a run")
                    path = folder / member.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "wb") as stream:
                        shutil.copyfileobj(tar.extractfile(member), stream)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{parts[0].path} was not written by `bagssl runs export` ({error})") from error


def _check(run: Run, here: Run) -> None:
    """Raises InputError unless `run` is sound and may come into the place of `here`."""
    content = runs.read_json(run.path / "config.json")
    if not run.finished or runs.run_key(run.config, content.get("data")) != run.key:
        raise InputError(f"{run.path.name} is not what its name says: export it again")
    run.check()
    for path in (run.path / "evaluations").glob("*.json"):
        runs.read_json(path)
    if here.finished and here.metrics["weights_sha256"] != run.metrics["weights_sha256"]:
        raise InputError(f"{here.path} was trained to other weights: import into another store (BAGSSL_RUNS), or "
                         "remove the one that is not wanted")  # fmt: skip


def _merge(run: Run, here: Run) -> str:
    """Move what `here` lacks from `run` into its folder, the mark of a finished run last; a line that says what."""
    here.path.mkdir(exist_ok=True)
    with runs.locked(here, deadline=0):
        new, half = not here.finished, run.path / HALF
        if half.exists() and (here.path / WEIGHTS).exists():
            half.unlink()  # what was trained is here
        came = [path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file()]
        lacking = [name for name in came if new or not (here.path / name).exists()]
        for name in sorted(lacking, key=lambda name: name.name == MARK):
            (here.path / name).parent.mkdir(exist_ok=True)
            os.replace(run.path / name, here.path / name)
        if (here.path / WEIGHTS).exists():
            (here.path / HALF).unlink(missing_ok=True)
        if new:
            runs.drop_checkpoint(here)
    count = sum(name.parent.name == "evaluations" for name in lacking)
    words = f"{count} evaluation{'s' * (count != 1)}"
    kind = next((f", {word}" for file, word in ((WEIGHTS, "weights"), (HALF, "weights as fp16"))
                 if Path(file) in lacking), "")  # fmt: skip
    return f"{here.path.name}: {'new, ' if new else ''}{words}{kind}" if lacking else f"{here.path.name}: here already"
