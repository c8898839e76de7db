"""The word that names an encoder, and its options as values: this imports no torch, which takes seconds.

    torchvision:resnet50@IMAGENET1K_V2      torchvision's weights by their name; without one, its default
    timm:vit_small_patch16_224.dino         timm's, which is installed apart
    FILE.pth,arch=torchvision:resnet18      a file and the network that it belongs to: torchvision:, timm:, bagssl:
    FILE.pth,arch=nets:vicreg,normalise=imagenet,size=32        or MODULE:FUNCTION, one's own code
    3f2a, cifar10-tcr-..., runs/cifar10-tcr-...                 a run by its key or name, or how they begin; its folder
    hub:OWNER/NAME                                              a run that was published on the Hugging Face hub

Options follow after commas, and say what the library does not know or what is to be otherwise:

    normalise   what the network takes: imagenet, cifar10, cifar100, half, none (pixels in [0, 1] as they are), or three
                means and three deviations, 0.5/0.5/0.5/0.2/0.2/0.2
    size        the side in pixels at which patches are shown to it; native: each at its own
    pool        features: as the network does itself; mean of the tokens of places, or cls, the class token
    crop        the share of an image's side that counts as the whole image. By default what its makers cut from images
                that are at least as large as its size, and all of smaller ones
    width       of bagssl: networks

A relative path, and MODULE, are those of the folder where the command is given; what is not there, of the checkout.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bagssl.errors import InputError, check_choice
from bagssl.paths import command_folder, file_hash, home

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".tar", ".ckpt", ".bin")
POOLS = ("features", "mean", "cls")
LIBRARIES = ("torchvision", "timm")
NORMALISATIONS = {  # three means, three deviations
    "none": (0.0, 0.0, 0.0, 1.0, 1.0, 1.0), "half": (0.5,) * 6,
    "imagenet": (0.485, 0.456, 0.406, 0.229, 0.224, 0.225), "cifar10": (0.4914, 0.4822, 0.4465, 0.247, 0.2435, 0.2616),
    "cifar100": (0.5071, 0.4865, 0.4409, 0.2673, 0.2564, 0.2762),
}  # fmt: skip
NATIVE = "native"
HUB = "hub:"


def is_library(source: str) -> bool:
    """Whether it names a network of a library, with the library's own weights."""
    return source.partition(":")[0] in LIBRARIES


def is_file(source: str) -> bool:
    """Whether it names a file of weights."""
    return not is_library(source) and source.lower().endswith(SUFFIXES)


def located(source: str) -> Path:
    """The file or folder of that name, from the folder on where the command is given, or else from the checkout on."""
    places = [folder / Path(source).expanduser() for folder in (command_folder(), home())]
    return next((place for place in places if place.exists()), places[0])


def absent(words: Sequence[str]) -> Path | None:
    """The first file of weights among those that the words name which is not there."""
    files = [located(source) for source, _ in (parse(word, {}) for word in join(words)) if is_file(source)]
    return next((file for file in files if not file.is_file()), None)


def parse(word: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What stands before the options, and these as values. Raises InputError for one that is unknown, or senseless."""
    source, *texts = re.split(r",\s*(?=\w+=)", str(word).strip())
    pairs = [text.partition("=")[::2] for text in texts]
    pairs += [(name, str(value)) for name, value in options.items() if value is not None]
    given: dict[str, Any] = {}
    for name, text in pairs:
        check_choice(f"option of {source}", name, OPTIONS)
        if name in given:
            raise InputError(f"{name} is given twice for {source}")
        try:
            given[name] = OPTIONS[name](text.strip())
        except ValueError:
            raise InputError(f"{name} = {text!r} makes no sense for {source}: it is {MEANING[name]}") from None
    return source, given


def _pool(text: str) -> str:
    return POOLS[POOLS.index(text)]


def _pixels(text: str) -> int | str:
    return NATIVE if text == NATIVE else _positive(text)


def _positive(text: str) -> int:
    if not 0 < (number := int(text)) < 2**16:
        raise ValueError
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise ValueError
    return number


def _normalisation(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the three colours."""
    values = NORMALISATIONS.get(text) or tuple(map(float, text.split("/")))
    if len(values) != 6 or not all(abs(value) < 1e3 for value in values) or min(values[3:]) <= 0:
        raise ValueError
    return values[:3], values[3:]


def join(words: Sequence[str]) -> list[str]:
    """Words again, of a list that was split at commas: options that stand alone go with the word before them."""
    joined: list[str] = []
    for word in words:
        if joined and word.partition("=")[0].strip() in OPTIONS:
            joined[-1] += f",{word.strip()}"
        else:
            joined.append(word)
    return joined


def fingerprint(word: str) -> str:
    """SHA-256 of the files that a word names: weights, and the code of MODULE:FUNCTION; empty where it names none.

    Raises InputError for a word that makes no sense, or a file of weights that is not there.
    """
    source, given = parse(word, {})
    if not is_file(source):
        return ""
    if not located(source).is_file():
        raise InputError(f"{located(source)} is not there: give a file of weights")
    code = located(given.get("arch", "").partition(":")[0].replace(".", "/") + ".py")
    return " ".join(file_hash(path) for path in (located(source), code) if path.is_file())


OPTIONS: dict[str, Callable[[str], Any]] = {
    "arch": str, "width": _positive, "normalise": _normalisation, "pool": _pool, "size": _pixels, "crop": _share,
}  # fmt: skip
MEANING = {
    "width": "a whole number",
    "normalise": f"one of {', '.join(NORMALISATIONS)}, or six numbers, 0.5/0.5/0.5/0.2/0.2/0.2",
    "pool": f"one of {', '.join(POOLS)}", "size": f"a number of pixels, or {NATIVE}", "crop": "a share in (0, 1]",
}  # fmt: skip
