"""Which datasets there are, as far as can be said without reading one: this imports no torch, which takes seconds."""

import contextlib
import difflib
import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bagssl.errors import InputError, shortage
from bagssl.paths import data_root

SPLITS = ("train", "test")
FORMAT, SHARDED = "bagssl-images-1", "bagssl-shards-1"  # of a cache or a shard, of the index of shards
INDEX = "index.json"
SHARDED_FROM = 2**31  # bytes of pixels from which a dataset is written as shards, and not held in memory

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


def _synthetic(split: str) -> tuple:
    from bagssl import synthetic

    return *synthetic.draw(split)[:2], synthetic.CLASSES


def _synthetic_jpeg(split: str) -> tuple:
    return importlib.import_module("bagssl.synthetic_files").draw(split)  # it imports, and so asks this module


# What is made, not read: name -> a function from "train" or "test" to pixels, labels and classes (see `data.Images`).
EMBEDDED = {"synthetic": _synthetic, "synthetic-jpeg": _synthetic_jpeg}
DECODED = "as it is decoded"  # instead of a SHA-256: one JPEG decoder may round otherwise than another
# ... and what that comes to, for whoever asks in a hurry: classes, size, images and SHA-256 of each split. A test sees
# to it that it is so.
MADE = {"synthetic": {"classes": 10, "size": "32×32", "splits": {
    "train": (4000, "29d01c1be63d954038c606d0baff893a398a604cbd9c00e43bce8a4368446cd7"),
    "test": (1000, "d7c06264d47a67f96398411c44ac4166926cd78b07f890ad5a53466e94870e22")}},
    "synthetic-jpeg": {"classes": 10, "size": "64×64", "splits": {"train": (1000, DECODED), "test": (400, DECODED)}},
}  # fmt: skip


def available(name: str, root: Path | None = None) -> bool:
    """Whether `name` is embedded, or has a cache or shards; `check` says whether these are sound."""
    return name in EMBEDDED or (is_name(name) and (cache(name, root).is_file() or index_of(name, root).is_file()))


def names(root: Path | None = None) -> list[str]:
    """The datasets that are known by name, then those that were added to this root."""
    known = [*EMBEDDED, *CIFAR]
    places = [*root_of(root).glob("*.safetensors"), *(index.parent for index in root_of(root).glob(f"*/{INDEX}"))]
    return known + sorted({path.stem for path in places if is_name(path.stem)} - set(known))


def status(root: Path | None = None) -> list[dict]:
    """A row for each of `names`: name, state (embedded, ready, damaged, absent), train and test (counts of images),
    classes (count), size (pixels, "32×32") and source. Only the headers of caches are read: `check` reads the rest."""
    return [{"name": name, **_about(name, root)} for name in names(root)]


def _about(name: str, root: Path | None) -> dict:
    """The row of `status`, but for the name."""
    row = {"state": "absent", "train": None, "test": None, "classes": None, "size": "", "source": how_to_add(name)}
    if name in EMBEDDED:
        made = MADE.get(name, {})
        counts = {split: count for split, (count, _) in made.get("splits", {}).items()}
        row |= {"classes": made.get("classes"), "size": made.get("size", ""), **counts}
        return row | {"state": "embedded", "source": "built in"}
    if available(name, root):
        try:
            about, shapes = _read(name, root)
        except InputError:
            return row | {"state": "damaged"}
        row |= {"state": "ready", "classes": len(about["classes"]), "source": about["source"]}
        row |= {split: shape[0] for split, shape in shapes.items()} | {"size": "{2}×{3}".format(*shapes["train"])}
    return row


def _read(name: str, root: Path | None) -> tuple[dict, dict[str, list[int]]]:
    """What the header of a dataset says, and the shape of its splits."""
    if about := sharded(name, root):
        return about, {split: [about["splits"][split]["images"], 3, *about["size"]] for split in SPLITS}
    with opened(cache(name, root), name, "np") as (file, about):
        return about, {split: file.get_slice(f"{split}_pixels").get_shape() for split in SPLITS}


def recorded(name: str, root: Path | None = None) -> dict[str, str] | None:
    """The SHA-256 of both splits as they were written down, or `DECODED`; `data.check` looks whether they are so still.

    None for what is made and nowhere written down. Raises InputError, with the command that adds the data, when it is
    absent or its header is damaged.
    """
    if name in EMBEDDED:
        return {split: digest for split, (_, digest) in MADE[name]["splits"].items()} if name in MADE else None
    if not available(name, root):
        raise absent(name, root)
    if about := sharded(name, root):
        return {split: about["splits"][split]["fingerprint"] for split in SPLITS}
    with opened(cache(name, root), name, "np") as (_, about):
        return {split: about[split] for split in SPLITS}


def sharded(name: str, root: Path | None = None, complete: bool = True) -> dict | None:
    """The index of a dataset in shards: format, name, classes, source, size (height and width), skipped (pictures that
    could not be read), splits: {split: images, fingerprint, shards: [file, bytes, sha256, labels]}, labels being
    [[label, images], ...], and sha256, its own. None where there is no index, which else counts before a cache.

    Raises InputError when it is damaged, and where it is to be `complete` when a shard is missing or was cut short;
    what is in the shards `data.check` reads.
    """
    path = index_of(name, root)
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != SHARDED:
            raise damaged(path, name, f"its format is {about['format']}, not {SHARDED}")
        if about["sha256"] != digest_of(about):
            raise damaged(path, name, "it is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(path, name, error) from error
    for shard in (shard for split in SPLITS for shard in about["splits"][split]["shards"] if complete):
        place, found = path.with_name(shard["file"]), None
        with contextlib.suppress(OSError):
            found = place.stat().st_size
        if found != shard["bytes"]:
            raise damaged(place, name, "it is missing" if found is None else f"{found:,} of {shard['bytes']:,} bytes")
    return about


def digest_of(about: dict) -> str:
    """The SHA-256, in hex, of an index, but for that itself."""
    text = json.dumps({key: value for key, value in about.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def absent(name: str, root: Path | None) -> InputError:
    close = difflib.get_close_matches(name, names(root), n=1)
    meant = f"did you mean {close[0]!r}? Or " if close and close != [name] else ""
    return refusal(f"the dataset {name!r} is not in {root_of(root)}: {meant}add it by {how_to_add(name)}")


@contextlib.contextmanager
def opened(path: Path, name: str, framework: str = "pt") -> Iterator[tuple]:
    """An open cache and what its header says; a file that is no sound cache raises InputError."""
    try:
        with safe_open(path, framework=framework) as file:
            about = json.loads((file.metadata() or {})["bagssl"])
            if about["format"] != FORMAT:
                raise damaged(path, name, f"its format is {about['format']}, not {FORMAT}")
            yield file, about
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError) or shortage(type(error).__name__, str(error)):  # no fault of the file's
            raise
        raise damaged(path, name, error) from error


def damaged(path: Path, name: str, reason: object) -> InputError:
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
    return root_of(root) / f"{name}.safetensors"


def index_of(name: str, root: Path | None) -> Path:
    """The index of a dataset that lies in shards, beside them, whether it is there or not."""
    return root_of(root) / name / INDEX


def root_of(root: Path | None) -> Path:
    return data_root() if root is None else Path(root)


def refusal(message: str) -> InputError:
    """What to raise: the message in one line."""
    return InputError(one_line(message))


def one_line(text: str) -> str:
    """For a terminal, whatever an error or a file name holds: line breaks, or bytes that are no text."""
    return " ".join(text.encode(errors="replace").decode().split())
