"""Encoders that others trained: one word (words.py) names one, and it is then measured as a run of ours is.

A library's network comes with the library's weights; a file's weights are fitted strictly to the network that its word
names. What the network takes (mean and deviation, size) belongs to it: it is asked with patches in [0, 1], and gives h.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bagssl import architectures, checkpoints, hub, runs
from bagssl.architectures import PatchEncoder, embedding_dim
from bagssl.errors import InputError
from bagssl.overview import matching, the_one
from bagssl.paths import file_hash, runs_root
from bagssl.records import FOREIGN, adopt
from bagssl.runs import Run
from bagssl.words import HUB, MEANING, NATIVE, POOLS, SUFFIXES, is_file, is_library, join, located, parse

_CLASSIFIER = re.compile(r"(?:fc|heads?|classifier|linear)(?:\.\w+)?\.weight")


@dataclass(frozen=True, eq=False, repr=False)
class Foreign:
    """An encoder that others trained, ready to be measured; what was measured lies in a folder of the store."""

    name: str
    network: PatchEncoder  # on the CPU, in evaluation mode: patches [n, 3, s, s] in [0, 1] -> h [n, dim]
    size: int | None  # px, at which patches are shown to it; None: each at its own
    crop: float  # the share of an image's side that counts as the whole image ...
    crop_from: int  # ... where the side has at least so many px
    classifier: nn.Linear | None  # of h, where it came with one
    record: Mapping[str, Any]  # what it is, where it came from, and how its loading went
    title: str  # how tables call it
    untrained: bool  # whether its weights were drawn
    halved = False  # as of a run: whether its weights were rounded to travel

    def __repr__(self) -> str:
        about = self.record
        mean, deviation = ("/".join(f"{value:g}" for value in about[name]) for name in ("mean", "deviation"))
        return (f"{about['loaded']}; {about['parameters']:,} parameters, h of {about['dim']} ({about['pool']}); takes "
                f"{about['size']} px, mean {mean}, deviation {deviation}")  # fmt: skip

    @property
    def digest(self) -> str:
        """Its identity: SHA-256 over weights, architecture, the user's code, normalisation, pooling and size."""
        return self.record["digest"]

    @property
    def path(self) -> Path:
        """Its folder in the store, which is made when something was measured."""
        return runs_root() / f"encoder-{self.name}-{self.digest[:16]}"

    def crop_of(self, pixels: Tensor) -> float:
        """The share of the side of these images, [N, 3, H, W], that is their centre crop."""
        return self.crop if min(pixels.shape[2:]) >= self.crop_from else 1.0

    def check(self, side: int) -> None:
        """Raises InputError, in one line, where the network takes no patches of this side."""
        embedding_dim(self.network, side, self.name)

    def keep(self) -> None:
        """Write its record beside what was measured."""
        if not (self.path / FOREIGN).exists():
            runs.write_json(self.path / FOREIGN, dict(self.record))


def find(word: str, **options: Any) -> Run | Foreign:
    """The encoder that a word names: a finished run of the store, or one that others trained, as by `load`.

    options: those of the word, given apart. Raises InputError, in one line, for a word that names none.
    """
    source, given = parse(word, options)
    if is_library(source) or is_file(source):
        return load(word, **options)
    run = _run(source)
    if given:
        raise InputError(f"{next(iter(given))} is for encoders that others trained: a run has its own")
    return run


def find_all(words: Sequence[str]) -> list[Run | Foreign]:
    """The encoder of each word. Options that stand alone, as where a list was split at commas, go with the one before.

    Raises InputError for a word that names no encoder, or one that another names as well.
    """
    words = join(words)
    found = [find(word) for word in words]
    if len({each.path for each in found}) < len(found):
        raise InputError(f"encoders = {words}: one of them is named twice")
    return found


def load(word: str, *, untrained: int | None = None, **options: Any) -> Foreign:
    """The encoder of a library or a file that a word names; options: those of the word, given apart.

    untrained: the same network, asked in the same way, with weights drawn from this seed. Raises InputError, in one
    line, for a word that makes no sense, a network that there is not, or weights that are not its own.
    """
    source, given = parse(word, options)
    library, file = is_library(source), located(source)
    if library and "arch" in given:
        raise InputError(f"{source}: arch is for files, and this names its own")
    if not library and "arch" not in given:
        raise InputError(f"{source}: arch is needed, the network that its weights belong to: torchvision:NAME, "
                         "timm:NAME, bagssl:NAME, or MODULE:FUNCTION for code of your own")  # fmt: skip
    tensors = None if library else checkpoints.read(file)  # before the user's code runs
    arch, size = given.get("arch", source), given.get("size")
    design = architectures.build(arch, width=given.get("width"), size=None if size == NATIVE else size,
                                 seed=untrained or 0, trained=library and untrained is None)  # fmt: skip
    mean, deviation = given.get("normalise", (design.mean, design.deviation))
    size = size or design.size
    for name, value in (("normalise", mean), ("size", size)):
        if value is None:
            raise InputError(f"{source}: {name} is needed, as it was in training: {MEANING[name]}")
    network, classifier, said = design.network, design.classifier, f"{arch}: the library's own weights"
    if untrained is not None:
        classifier, said = None, f"{arch}: weights drawn from seed {untrained}"
    elif tensors is not None:
        fitted = checkpoints.fit(tensors, network, file.name, arch)
        network.load_state_dict(fitted.tensors)
        classifier, said = _classifier(fitted.left), fitted.said
    about = {"arch": arch, "source": design.source, "mean": list(mean), "deviation": list(deviation),
             "pool": given.get("pool", POOLS[0]), "size": size}  # fmt: skip
    name = title = _label(source if library else file.name.removesuffix(file.suffix))
    if untrained is not None:
        name, title = f"{name}-untrained-seed{untrained}", f"{title}, untrained"
    encoder = PatchEncoder(network.cpu(), mean, deviation, about["pool"]).eval().requires_grad_(False)
    encoder.dim = embedding_dim(encoder, (design.size or 64) if size == NATIVE else size, name)
    record = {**about, "name": name, "dim": encoder.dim, "digest": _digest(network, about), "loaded": said,
              "file": None if library else {"name": file.name, "sha256": file_hash(file)},
              "parameters": sum(parameter.numel() for parameter in network.parameters())}  # fmt: skip
    crop, crop_from = (given["crop"], 0) if "crop" in given else (design.crop, design.size or 0)
    found = Foreign(name, encoder, None if size == NATIVE else size, crop, crop_from, classifier, record, title,
                    untrained is not None)  # fmt: skip
    if not found.path.exists():
        adopt(found.path)
    return found


def _label(source: str) -> str:
    return re.sub(r"\W+", "-", source).strip("-")[:60]


def _run(source: str) -> Run:
    """The finished run of a folder or of the hub, or the one whose name or key begins so."""
    if source.startswith(HUB):
        return hub.pull(source.removeprefix(HUB))
    folder = located(source)
    if not (folder / "config.json").exists() and not matching(source):
        raise InputError(f"{source!r} is no encoder: give torchvision:NAME, timm:NAME, a file ({', '.join(SUFFIXES)}) "
                         "with arch=, hub:OWNER/NAME, or a run by its key, name or folder (bagssl runs list)"
                         )  # fmt: skip
    return the_one(str(folder) if (folder / "config.json").exists() else source)


def _classifier(left: Mapping[str, Tensor]) -> nn.Linear | None:
    """The one linear layer that a file holds beside the encoder, if that is a classifier of h."""
    names = [name for name in left if _CLASSIFIER.fullmatch(name)]
    if len(names) != 1 or left[names[0]].ndim != 2:
        return None
    weight, bias = left[names[0]], left.get(names[0].removesuffix("weight") + "bias")
    layer = nn.Linear(weight.shape[1], len(weight), bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def _digest(network: nn.Module, about: Mapping[str, Any]) -> str:
    """SHA-256 over what decides h: all but how many batches a batch-norm has seen."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
