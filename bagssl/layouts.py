"""Where the pictures of a tree lie: which files belong to which class of which split, in any of three layouts.

Class folders are train/<class>/<image> and test/<class>/<image>; where there is no test, the second split may be called
val, as ImageNet's is. Tiny-ImageNet keeps the images of train/<class> in a folder images, and those of val in one
folder, val/images, with their classes in val/val_annotations.txt; its test has none, and is left alone. What lies
otherwise, or leads out of the tree, is an `InputError`, one line that says what to do.
"""

import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bagssl.catalogue import SPLITS, refusal

WANTED = "give a folder with train/<class>/ and test/<class>/ in it, or an .npz file"
ANNOTATIONS, IMAGES = "val_annotations.txt", "images"  # of Tiny-ImageNet
_NOT_IMAGES = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # what file managers leave behind; dot files as well


class Folder(NamedTuple):
    """The pictures of a class in a split: names in one folder, in their order. As text, for there may be millions."""

    path: Path
    names: list[str]


def find(tree: Path, follow_links: bool = False,
         listed: Path | None = None) -> tuple[dict[str, list[Folder]], tuple[str, ...]]:
    """{split: the pictures of each class, in the order of the classes} and the classes, in the order of their names.

    listed: a file that names the classes to take, one a line; the others are left out. Raises InputError for a tree of
    another layout, a class that only one of the splits has, or a link out of the tree without `follow_links`.
    """
    places = _places(tree)
    for place in places.values():
        _check_link(place, tree, follow_links)
    look = partial(_entries, tree=tree, follow_links=follow_links)
    tiny = _is_annotated(places["test"])
    train, test = _folders(places["train"], look), (_annotated if tiny else _folders)(places["test"], look)
    if listed is not None:
        chosen = _chosen(listed, train, places["train"])
        train, test = ({name: found[name] for name in found if name in chosen} for found in (train, test))
    for alone, there, lacking in ((train.keys() - test, "train", "test"), (test.keys() - train, "test", "train")):
        if alone:
            raise refusal(f"the class {min(alone)!r} is in {places[there]} but not in {places[lacking]}")
    if len(train) < 2:
        raise refusal(f"{places['train']} has fewer than two class folders, {len(train)}: a dataset needs two or more")
    return {split: [each if isinstance(each, Folder) else _pictures(each, look) for _, each in sorted(found.items())]
            for split, found in zip(SPLITS, (train, test), strict=True)}, tuple(sorted(train))


def _places(tree: Path) -> dict[str, Path]:
    """The folders of the two splits: train and test, or val in its place, in small letters or capitals."""
    found = {entry.name.lower(): entry for entry in sorted(tree.iterdir()) if entry.is_dir() or entry.is_symlink()}
    second = next((name for name in ("test", "val", "valid", "validation") if name in found), "test")
    if "val" in found and _is_annotated(found["val"]):  # the classes of Tiny-ImageNet's test were not published
        second = "val"
    for name in ("train", second):
        if name not in found:
            raise refusal(f"{tree} has no folder {name}: {WANTED}")
    return {"train": found["train"], "test": found[second]}


def _folders(place: Path, look: Callable[[Path], list[Path]]) -> dict[str, Path]:
    """The folder of each class in a split."""
    entries = look(place)
    for entry in entries:
        if not entry.is_dir():
            raise refusal(f"{entry} lies outside the class folders: move it into one, or away")
    found = {_composed(entry.name): entry for entry in entries}
    if twice := [entry for entry in entries if found[_composed(entry.name)] != entry]:
        raise refusal(f"{place} has the class {_composed(twice[0].name)!r} twice, in two spellings: merge them")
    return found


def _pictures(folder: Path, look: Callable[[Path], list[Path]]) -> Folder:
    """What lies in a class folder, or in its folder of images where there are but texts beside."""
    inside = look(folder)
    if folder / IMAGES in inside and all(each.suffix == ".txt" for each in inside if each != folder / IMAGES):
        folder = folder / IMAGES
        inside = look(folder)
    if not inside:
        raise refusal(f"{folder} has no images")
    for file in inside:
        if not file.is_file():
            what = "is no file" if file.is_dir() else "is no file but a device or a pipe"
            raise refusal(f"{file} {what}: images lie directly in their class folder")
    return Folder(folder, [file.name for file in inside])


def _is_annotated(place: Path) -> bool:
    """Whether a split is as Tiny-ImageNet's val: in one folder, with a list of classes."""
    return (place / ANNOTATIONS).is_file() and (place / IMAGES).is_dir()


def _annotated(place: Path, look: Callable[[Path], list[Path]]) -> dict[str, Folder]:
    """The pictures of each class of such a split. Each line of its list begins with a file and a class, by tabs."""
    folder, found = place / IMAGES, {}
    there = {file.name for file in look(folder)}
    for line in _lines(place / ANNOTATIONS):
        name, label, *_ = *line.split("\t"), ""
        if name not in there or not label:
            raise refusal(f"{place / ANNOTATIONS} names {name!r}, which is not in {folder}, is named twice or has no "
                          "class: give both as they were published")
        there.remove(name)
        found.setdefault(_composed(label), Folder(folder, [])).names.append(name)
    if there:
        raise refusal(f"{folder / min(there)} has no class in {place / ANNOTATIONS}: give both as they were published")
    return {label: Folder(folder, sorted(names)) for label, (_, names) in found.items()}


def _chosen(listed: Path, known: Mapping[str, Path], place: Path) -> set[str]:
    """The classes that a file names."""
    names = [_composed(line) for line in _lines(listed)]
    if unknown := sorted(set(names) - known.keys()):
        more = f", nor {len(unknown) - 1} more of them" if unknown[1:] else ""
        raise refusal(f"{listed} names the class {unknown[0]!r}, and {place} has no such folder{more}: name one a line")
    return set(names)


def _lines(path: Path) -> Sequence[str]:
    """The lines of a text that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise refusal(f"{path} cannot be read ({error}): give a text in UTF-8, a name on each line") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _composed(name: str) -> str:
    """The name of a class, one code for each letter: macOS writes é as two."""
    return unicodedata.normalize("NFC", name)


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
