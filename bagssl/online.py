"""An encoder measured while it trains: kNN accuracy and effective rank, on images of its own training data.

    results/runs/…-3f2a/online.csv      step, epoch, crops, knn in per cent, effective_rank

No weight, no key and no test image is in it: a curve that says early whether a training is worth its time. What it
measures are centre crops of `IMAGES` training images, by an encoder of its own into which the weights are copied.
"""

import contextlib
import csv
import io
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl.bags import default_batch, fold_batch_norm
from bagssl.data import gather
from bagssl.encoders import build_encoder
from bagssl.errors import InputError, check_choice
from bagssl.patches import centre_crop
from bagssl.paths import ONLINE, write_text
from bagssl.probes import vote
from bagssl.runs import Run

PROBES = ("knn",)
IMAGES = 4096  # that are embedded at a time, at most; a quarter of them are asked about
# Crops that are trained on for each image that is embedded, at least: a trained crop goes through the network and back,
# at three times the FLOPs of an embedded one, so that a measure takes 1 / (3 * 24) of them, 1.4 %.
COST = 24
TIMES = 20  # measures of a training, at most
MEASURES = ("knn", "effective_rank")
_COLUMNS = ("step", "epoch", "crops", *MEASURES)


def interval(word: str) -> int:
    """Crops from one measure to the next that a word asks for, `knn:EVERY`; 0 for `knn`, which leaves it to `plan`.

    Raises InputError for an unknown probe, or an EVERY that is no whole number above 0.
    """
    probe, colon, every = word.partition(":")
    check_choice("online probe", probe, PROBES)
    if colon and not (every.isascii() and every.isdecimal() and int(every)):
        raise InputError(f"online {word!r}: write knn, or knn:EVERY with a whole number of crops above 0")
    return int(every or 0)


def plan(crops: int, images: int, every: int = 0) -> tuple[int, int]:
    """How many images are embedded at a time, and the crops between two measures, of a training on so many crops.

    Where `every` is 0 the measures take 1 / (3 * COST) of the training's FLOPs at most, the last one at its end.
    """
    if every:
        return min(IMAGES, images), every
    count = max(2, min(IMAGES, images, crops // COST))
    return count, max(1, math.ceil(crops / max(1, min(TIMES, crops // (COST * count)))))


class Online:
    """What is measured of a training on its way, `rows`, and written beside its record.

    record: of recording.py. The images are drawn at random from those that are trained on, always the same. A quarter
    of them are asked about, by the others as their neighbours: they are seen in training, as all are, without their
    labels; they are only not among the neighbours. Of the rows that are there those up to the checkpoint stay.
    """

    def __init__(self, record: Any, every: int):
        learner, images = record.learner, record.images
        config, self.record, self.learner = learner.config, record, learner
        count, self.every = plan(record.steps * config.crops_per_step, len(images), every)
        places = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        self.asked, self.batch = max(1, count // 4), default_batch(learner.device.type, config.size)
        self.labels, self.classes = images.labels.cpu()[places].to(learner.device), len(images.classes)
        self.crops = torch.cat([_centre(images.pixels, some, config.size, learner.device)
                                for some in places.split(self.batch)])  # fmt: skip
        network = build_encoder(config.encoder, config.width, config.seed, config.stem).eval()
        self.network = network.to(learner.device, memory_format=torch.channels_last)
        self.rows = [row for row in read(record.run) if row["step"] <= record.step]

    def __call__(self) -> dict[str, float]:
        """The new row, if at this row of the history there is to be one, else nothing."""
        row, before = self.record.history[-1], self.rows[-1]["crops"] if self.rows else 0
        if row["step"] < self.record.steps and row["crops"] // self.every <= before // self.every:
            return {}
        h = self._embed()
        place = {name: row[name] for name in _COLUMNS[:3]}
        accuracy = knn(h, self.labels, self.asked, self.classes)
        self.rows.append(place | {"knn": accuracy, "effective_rank": effective_rank(h)})
        _write(self.record.run, self.rows)
        return self.rows[-1]

    @torch.no_grad()
    def _embed(self) -> Tensor:
        """h [images, dim]; of the learner nothing is touched."""
        self.network.load_state_dict(self.learner.model.encoder.state_dict())
        network, kind, dtype = fold_batch_norm(self.network), self.learner.device.type, self.learner.dtype
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return torch.cat([network(_input(some)).float() for some in self.crops.split(self.batch)])


def _centre(pixels: Any, places: Tensor, size: int, device: torch.device) -> Tensor:
    """The centre crops of the images at `places`, uint8 [M, 3, size, size]: they are held, and a quarter as large."""
    held = gather(pixels, places.to(pixels.device)).to(device)
    return (centre_crop(held, size) * 255).round().to(torch.uint8)


def _input(crops: Tensor) -> Tensor:
    return crops.float().div_(255).contiguous(memory_format=torch.channels_last)


def knn(h: Tensor, labels: Tensor, asked: int, classes: int) -> float:
    """Per cent right of the first `asked` of h [images, dim], by a vote of the nearest of the others (`probes.vote`).

    labels: int64 [images] below `classes`.
    """
    queries, bank = F.normalize(h, dim=1).tensor_split([asked])
    votes = vote(queries @ bank.T, labels[asked:], classes)
    return 100 * (votes.argmax(dim=1) == labels[:asked]).double().mean().item()


def effective_rank(h: Tensor) -> float:
    """RankMe (Garrido et al. 2023, equation 3): exp of the entropy of h's singular values over their sum.

    h: [images, dim], not centred; 1 when all embeddings are parallel, dim at most.
    """
    h = h.double()
    values = torch.linalg.eigvalsh(h.T @ h).clamp(min=0).sqrt()
    shares = values / values.sum() + 1e-7
    return (-(shares * shares.log()).sum()).exp().item()


def read(run: Run) -> list[dict[str, float]]:
    """The rows of online.csv; none where there is no such file, or it is damaged: nothing depends on it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        rows = list(csv.DictReader(io.StringIO((run.path / ONLINE).read_text(encoding="utf-8"))))
        kinds = dict.fromkeys(_COLUMNS, float) | {"step": int, "crops": int}
        return [{name: kind(row[name]) for name, kind in kinds.items()} for row in rows]
    return []


def _write(run: Run, rows: list[dict[str, float]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, _COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_text(run.path / ONLINE, table.getvalue())
