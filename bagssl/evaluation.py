"""An encoder measured: bags of its embeddings, then probes; the protocol and its result stay with it.

It is a finished run, or one that others trained (foreign.py).
"""

import contextlib
import copy
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bagssl import budget, distributed, intervals, patches, runs
from bagssl.augmentation import Augmentation
from bagssl.bags import POOLS as OF_BAGS
from bagssl.bags import embed_bags
from bagssl.config import PretrainConfig
from bagssl.data import Images
from bagssl.devices import pick_device
from bagssl.errors import InputError, check_choice
from bagssl.foreign import Foreign
from bagssl.pretraining import load_encoder, load_projector
from bagssl.probes import BLOCK, Accuracy, fits, knn, linear
from bagssl.runs import Run

PROBES = {"knn": knn, "linear": linear}
FEATURES = ("h", "z")
BESIDE = "with centre crop"
POOLS = (*OF_BAGS, BESIDE)
TOP5_FROM = 100  # classes: with fewer, five answers say little
PROTOCOL = 1  # raised when the meaning of an evaluation changes
RECENT = 2**31  # bytes of bags that a process remembers: several evaluations look at the same ones
LARGE, SAMPLE = 10_000, 10  # training images from which a probe takes long, and what share of them tells how long
WORK = "evaluation; the next call goes on after what was measured"  # of several processes
_recent: dict[tuple, Tensor] = {}  # (what was embedded, and how), feature and K -> bags
Bags = dict[str, dict[int, Tensor]]  # feature -> K -> [images, dim]


def evaluate(model: Run | Foreign, train: Images, test: Images | float, ks: Sequence[int], *,
             probes: Sequence[str] = ("knn", "linear"), features: Sequence[str] = ("h",),
             scale: float | Sequence[float], pool: str = "mean", colour: bool = False, top5: bool = False,
             seed: int = 0, device: str = "auto", progress: bool = True) -> list[dict[str, Any]]:
    """Accuracy of `model` on `test` for bags of each K (0 = centre crop), each probe and feature (h or z).

    test: images, or a share of `train` to hold out, drawn at random, for a choice that must not see the test images.
    Patches are cut at `scale` (fraction of the image's area), with `colour` coloured as in the run's training, and
    shown to the encoder at its size (`view`); of several scales, each gives a bag of K, and their means are
    concatenated. pool: `mean`, `max` (see `embed_bags`), or `with centre crop`: the centre crop beside the mean, in
    one longer vector. Returns one row per feature, K and probe: accuracy, low and high in per cent, with `top5` also
    top5, top5_low and top5_high, that among the first five answers; the probe's settings, and which test images were
    right (`unpack_correct`). A protocol that was measured before on this model is read from its folder. Called by each
    process of a torchrun, all embed, as in `embed_bags`; the first alone probes, writes, and tells the others; one that
    is gone or hangs ends all with Lost.
    Raises InputError for an unknown probe, feature or pool, a scale outside (0, 1], a K that is no whole number of at
    least 0, a share that leaves one side without images, z or the colour of an encoder that has no projector or
    training of ours, or patches that it does not take.
    """
    check_protocol(ks, probes, features)
    check_choice("pool", pool, POOLS)
    if not isinstance(test, Images):
        held_out_places(len(train), test, seed)
    seen, scales = view(model, train.pixels), scale if isinstance(scale, Sequence) else [scale]
    if isinstance(model, Foreign) and "z" in features:
        raise InputError(f"{model.name} is an encoder without a projector: it has h, and no z")
    if isinstance(model, Foreign) and colour:
        raise InputError(f"{model.name} was trained by others: how patches were coloured is not known")
    for images in (train, test):
        if isinstance(images, Images):
            check_sides(model, images.pixels, scales if any(ks) else [])
    protocol = {
        "protocol": PROTOCOL, "ks": sorted(set(ks)), "probes": sorted(probes), "features": sorted(features),
        "scale": list(scale) if isinstance(scale, Sequence) else scale, "size": seen["size"], "seed": seed,
        "train": train.fingerprint, "test": test.fingerprint if isinstance(test, Images) else {"held_out": test},
        "weights": model.metrics["weights_sha256"] if isinstance(model, Run) else model.digest,
    }  # fmt: skip
    protocol |= {"pool": pool} if pool != "mean" else {}
    protocol |= {"colour": "apart"} if colour else {}  # drawn apart from the boxes; True, as once, was not
    protocol |= {"top5": True} if top5 else {}
    protocol |= {"crop": seen["crop"]} if seen["crop"] < 1 and (0 in ks or pool == BESIDE) else {}
    path = _place(model, protocol)
    if (rows := _kept(path)) is None and model.halved:  # not to be taken for what the weights themselves give
        protocol["rounded"] = "fp16"
        path = _place(model, protocol)
        rows = _kept(path)
    place = distributed.own(torch.device(pick_device(device)))
    with distributed.led(contextlib.nullcontext(rows), WORK) as rows:
        if rows is None:
            with distributed.group(place):
                bags = _embed(model, train, test, protocol, str(place), progress)
    if rows is None:
        with distributed.led(_measured(model, protocol, bags, path, str(place)), WORK) as rows:
            pass
    return rows


def view(model: Run | Foreign, pixels: Tensor) -> dict[str, Any]:
    """How images [N, 3, H, W] are shown to an encoder: `size` and `crop`, as `embed_bags` takes them."""
    if isinstance(model, Run):
        return {"size": model.config["size"], "crop": 1.0}
    return {"size": model.size, "crop": model.crop_of(pixels)}


def load_network(model: Run | Foreign, device: str | torch.device = "cpu") -> nn.Module:
    """The encoder in evaluation mode: patches [batch, 3, s, s] in [0, 1] -> h [batch, dim]."""
    return load_encoder(model, device) if isinstance(model, Run) else copy.deepcopy(model.network).to(device)


def check_sides(model: Run | Foreign, pixels: Tensor, scales: Sequence[float]) -> None:
    """Raises InputError for an encoder that is shown crops in their own pixels, and does not take those of such images.

    pixels: [N, 3, H, W], of which the crops are the centre crop, and the patches of each scale.
    """
    if isinstance(model, Foreign) and model.size is None:
        sides = {patches.native_size(scale, *pixels.shape[2:]) for scale in scales}
        for side in sorted({*sides, round(model.crop_of(pixels) * min(pixels.shape[2:]))}):
            model.check(side)


def _place(model: Run | Foreign, protocol: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    return model.path / "evaluations" / f"{key}.json"


def _kept(path: Path) -> list[dict[str, Any]] | None:
    try:
        return runs.read_json(path)["rows"]
    except (InputError, KeyError):  # not measured yet, or damaged: measure (again)
        return None


def over_scales(model: Run | Foreign, train: Images, test: Images, ks: Sequence[int], scales: Sequence[float],
                **protocol: Any) -> list[dict[str, Any]]:  # fmt: skip
    """The centre crop, if 0 is among `ks`, against bags of each other K at each scale.

    protocol: as of `evaluate`. Returns its rows with the `scale` of the patches, None for the centre crop, and what a
    bag adds to the same probe on the centre crop: `gain` in points, `gain_low` and `gain_high`, paired by test image.
    """
    bags, rows = [k for k in ks if k], []
    if 0 in ks:  # apart: it has no scale, and is measured once
        rows += [{**row, "scale": None} for row in evaluate(model, train, test, [0], scale=1.0, **protocol)]
    for scale in scales if bags else []:
        rows += [{**row, "scale": scale} for row in evaluate(model, train, test, bags, scale=scale, **protocol)]
    centre: dict[tuple[str, str], np.ndarray] = {}
    for row in rows:
        right, asked = unpack_correct(row["correct"], len(test)).astype(int), (row["probe"], row["feature"])
        if row["scale"] is None:
            centre[asked] = right
        elif asked in centre:
            gain = intervals.paired(right - centre[asked])
            row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
    return rows


def check_protocol(ks: Sequence[int], probes: Sequence[str], features: Sequence[str], *, bag: bool = False) -> None:
    """Raises InputError, in one line, for a protocol that `evaluate` cannot follow.

    bag: bags are compared by it, so that it needs a K above 0, and h.
    """
    for name, words, known in (("probe", probes, PROBES), ("feature", features, FEATURES)):
        if not words:
            raise InputError(f"no {name} is asked for: choose among {', '.join(known)}")
        if unknown := [word for word in words if word not in known]:
            raise InputError(f"unknown {name} {unknown[0]!r}: choose among {', '.join(known)}")
    if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in ks):
        raise InputError(f"ks = {list(ks)!r} must be whole numbers of at least 0: 0 is the centre crop")
    if bag and not any(ks):
        raise InputError(f"ks = {list(ks)!r} needs a K above 0: 0 is the centre crop, and no bag")
    if bag and "h" not in features:
        raise InputError(f"features = {list(features)!r} needs h: bags are compared by it")


def held_out_places(images: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The places of a share of so many images, drawn at random, and of the rest. InputError unless both have one."""
    if not 1 <= round(share * images) < images:
        raise InputError(f"held_out = {share:g} of {images} images cannot be held out: both sides need one at least")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    held, rest = (part.sort().values for part in order.tensor_split([round(share * images)]))
    return held, rest


@contextlib.contextmanager
def _measured(model: Run | Foreign, protocol: dict[str, Any], bags: tuple, path: Path, device: str
              ) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    rows = _probe_all(protocol, *bags, device)
    if isinstance(model, Foreign):
        model.keep()
    runs.write_json(path, {"protocol": protocol, "rows": rows, "provenance": runs.provenance()})
    yield _kept(path)  # as the next call will find them


def _embed(model: Run | Foreign, train: Images, test: Images | float, protocol: dict[str, Any], device: str,
           progress: bool) -> tuple[Bags, Tensor, Bags, Tensor]:
    """The bags and labels of the training images, and of the test images; of several processes the first's."""
    networks = {"h": load_network(model, device)}
    if "z" in protocol["features"]:
        networks["z"] = load_projector(model, device)

    colour = PretrainConfig.from_dict(model.config).augmentation() if protocol.get("colour") else None

    def embed(images: Images, seed: int, then: int = 0) -> Bags:
        return _bags(networks, images, protocol, seed, device, progress, then, colour)

    bags, labels = embed(train, protocol["seed"], len(test) if isinstance(test, Images) else 0), train.labels
    if isinstance(test, Images):  # other patches for the test images than for the training images
        bags_test, labels_test = embed(test, protocol["seed"] + 1), test.labels
    else:
        held, rest = held_out_places(len(train), test, protocol["seed"])
        bags, bags_test = ({feature: {k: bag[part] for k, bag in each.items()} for feature, each in bags.items()}
                           for part in (rest, held))  # fmt: skip
        labels, labels_test = labels[rest], labels[held]
    return bags, labels, bags_test, labels_test


def _probe_all(protocol: dict[str, Any], bags: Bags, labels: Tensor, bags_test: Bags, labels_test: Tensor,
               device: str) -> list[dict[str, Any]]:
    rows = []
    for feature, k, probe in itertools.product(protocol["features"], protocol["ks"], protocol["probes"]):
        result = _probe(probe, bags[feature][k], labels, bags_test[feature][k], labels_test, device=device)
        correct = np.packbits(result.correct.numpy()).tobytes().hex()  # see `unpack_correct`
        top5 = dict(zip(("top5", "top5_low", "top5_high"), result.top5)) if protocol.get("top5") else {}
        rows.append({"k": k, "probe": probe, "feature": feature, "accuracy": result.value, "low": result.low,
                     "high": result.high, **top5, "settings": result.settings, "correct": correct})
    return rows


def _probe(name: str, *features: Tensor, device: str) -> Accuracy:
    """The probe of training features, labels, test features, labels; raises DoesNotFit as `budget.piece` does.

    Where they do not fit the device they stay in memory: kNN works there, the linear probe brings blocks to the device.
    """
    images, dim = features[0].shape
    if fits(name, *features[:2], torch.device(device)):
        features, options = [tensor.to(device) for tensor in features], {}
    else:
        options = {"device": device, "block": BLOCK} if name == "linear" else {}

    def trial() -> float:
        begun = time.monotonic()
        PROBES[name](*(tensor[::SAMPLE] for tensor in features), **options)
        return SAMPLE * (time.monotonic() - begun) / images

    with budget.piece(f"the {name} probe on {images:,} images", (name, dim, device), images,
                      trial=trial if images >= LARGE else None):  # fmt: skip
        return PROBES[name](*features, **options)


class _Features(nn.Module):
    """h, and z = g(h) where a projector is given, of one pass: crops [n, 3, s, s] -> [n, dim + projector_dim]."""

    def __init__(self, encoder: nn.Module, projector: nn.Module | None):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, crops: Tensor) -> Tensor:
        h = self.encoder(crops)
        return h if self.projector is None else torch.cat([h, self.projector(h)], dim=1)


def _bags(networks: dict[str, nn.Module], images: Images, protocol: dict[str, Any], seed: int, device: str,
          progress: bool, then: int = 0, colour: Augmentation | None = None) -> Bags:  # fmt: skip
    """Feature -> K -> bags [images, dim], those of several scales concatenated. then: images that must follow.

    No patch is embedded twice for h and z, nor what this process has embedded before. Of several the first has bags.
    """
    ks, features, scales = protocol["ks"], protocol["features"], protocol["scale"]
    scales, dim = scales if isinstance(scales, list) else [scales], networks["h"].dim
    pool, beside = "max" if protocol.get("pool") == "max" else "mean", protocol.get("pool") == BESIDE

    def place(scale: float, feature: str, k: int) -> tuple:  # the whole image has no scale
        kind = (scale, pool, colour) if k else protocol.get("crop", 1)
        where = images.fingerprint, protocol["size"], seed, device, kind
        return (protocol["weights"], protocol.get("rounded"), *where, feature, k)

    def lacking(scale: float) -> list[int]:
        return [k for k in wanted if any(place(scale, feature, k) not in _recent for feature in features)]

    wanted = [*ks, *[0] * (beside and 0 not in ks)]
    for scale in scales:
        if missing := distributed.from_first(partial(lacking, scale)):
            network = _Features(networks["h"], networks.get("z"))
            embedded = embed_bags(network, images.pixels, missing, scale=scale, size=protocol["size"],
                                  crop=protocol.get("crop", 1.0), pool=pool, colour=colour, seed=seed,
                                  device=device, progress=progress, more=then * max(ks))  # fmt: skip
            for (k, bag), feature in itertools.product(embedded.items(), networks):
                _recent[place(scale, feature, k)] = (bag[:, :dim] if feature == "h" else bag[:, dim:]).contiguous()
    def side_by_side(feature: str, k: int) -> Tensor:
        whole = [_recent[place(scales[0], feature, 0)]] if beside and k else []
        each = scales if k else scales[:1]  # the whole image has none
        return torch.cat([*whole, *(_recent[place(scale, feature, k)] for scale in each)], dim=1)

    bags = {feature: {k: side_by_side(feature, k) for k in ks if not distributed.rank()} for feature in features}
    while sum(bag.nbytes for bag in _recent.values()) > RECENT:
        _recent.pop(next(iter(_recent)))
    return bags


def unpack_correct(packed: str, count: int) -> np.ndarray:
    """Which of `count` test images were classified rightly, bool [count], from a row of `evaluate`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8), count=count).astype(bool)
