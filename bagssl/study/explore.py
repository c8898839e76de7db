"""A bag as it grows: some test images, their first K patches for every K, and what the nearest neighbours say of them.

What a notebook shows of it is one piece of HTML with its data inside: it needs no kernel, no network, no other file.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from bagssl import patches, probes
from bagssl.bags import embed_bags
from bagssl.data import Images
from bagssl.errors import InputError
from bagssl.study import figures, names, tables

TILE = 64  # pixels of an embedded image at most
COLUMNS = 16  # images in a row of the embedded sheet


@dataclass(frozen=True, eq=False)
class GrowingBags:
    """Some test images as bags of more and more patches; a notebook shows it with a slider for K."""

    ks: list[int]
    images: Images  # those looked at
    boxes: Tensor  # int64 [patches, images, 4], top, left, height and width; a bag of K holds the first K
    votes: Tensor  # float32 [ks, images, classes], each class's share of the neighbours' votes
    neighbours: Tensor  # int64 [ks, images, neighbours], the nearest training images first
    bank: Images  # the training images
    accuracy: list[float]  # over all test images, in per cent, for each K

    def __repr__(self) -> str:
        ends = (f"{self.accuracy[at]:.1f} % at K = {self.ks[at]}" for at in (0, -1))
        return f"{len(self.images)} images as bags of patches; kNN over all test images: {', '.join(ends)}"

    def _repr_html_(self) -> str:
        used, places = self.neighbours.unique(return_inverse=True)
        pixels = torch.cat([self.images.pixels, self.bank.pixels[used]])
        sheet, tile = _sheet(pixels)
        content = {
            "ks": self.ks, "classes": [names.line(each) for each in self.images.classes],
            "short": [names.short(each, 10) for each in self.images.classes],
            "accuracy": [round(value, 1) for value in self.accuracy],
            "side": list(pixels.shape[2:]), "tile": tile, "columns": COLUMNS, "rows": -(-len(pixels) // COLUMNS),
            "labels": self.images.labels.tolist(), "boxes": self.boxes.transpose(0, 1).tolist(),
            "votes": (1000 * self.votes).round().int().transpose(0, 1).tolist(),
            "neighbours": (places + len(self.images)).transpose(0, 1).tolist(),
            "kinds": [*self.images.labels.tolist(), *self.bank.labels[used].tolist()], "sheet": sheet,
        }  # fmt: skip
        return tables.render("explore.html.j2", content=content)


def growing_bags(encoder: nn.Module, train: Images, test: Images, chosen: Sequence[int], ks: Sequence[int], *,
                 scale: float, size: int, neighbours: int = 6, seed: int = 0,
                 device: torch.device | str | None = None) -> GrowingBags:
    """The test images at the places `chosen` as bags of each K in `ks`, among bags of as many training patches.

    Patches, seeds and the kNN probe are those of `evaluate`, so the accuracy over all test images is the one it
    measures. scale, size and device as in `embed_bags`. Raises InputError for a K below 1, no image, a place that
    `test` does not have, or more neighbours than training images.
    """
    ks, places = sorted(set(ks)), torch.tensor(list(chosen), dtype=torch.int64)
    if not ks or ks[0] < 1:
        raise InputError(f"K must be whole numbers of at least 1, not {ks}: the centre crop is no bag")
    if not len(places) or places.min() < 0 or places.max() >= len(test):
        raise InputError(f"the images to look at must be places among {len(test)} test images, not {list(chosen)}")
    if not 1 <= neighbours <= len(train):
        raise InputError(f"neighbours must lie between 1 and the {len(train)} training images, not {neighbours}")
    settings = {"scale": scale, "size": size, "device": device}
    banks = embed_bags(encoder, train.pixels, ks, seed=seed, **settings)
    queries = embed_bags(encoder, test.pixels, ks, seed=seed + 1, **settings)
    generator = torch.Generator().manual_seed(seed + 1)  # the patches that `queries` are the means of
    boxes = patches.evaluation_boxes(ks[-1], len(test), *test.pixels.shape[2:], scale, generator)[:, places]
    accuracy, votes, nearest = [], [], []
    for k in ks:
        accuracy.append(probes.knn(banks[k], train.labels, queries[k], test.labels).value)
        similarity = F.normalize(queries[k][places], dim=1) @ F.normalize(banks[k], dim=1).T
        votes.append(F.normalize(probes.vote(similarity, train.labels, len(train.classes)), p=1, dim=1))
        nearest.append(similarity.topk(neighbours, dim=1).indices)
    return GrowingBags(ks, test.take(places), boxes, torch.stack(votes), torch.stack(nearest), train, accuracy)


def growth_figure(bags: GrowingBags, image: int = 0, ks: Sequence[int] | None = None) -> Figure:
    """One image as bags of each K, a row each: its patches, the votes for the classes, the nearest neighbours.

    Beside each K stands the accuracy over all test images, blue marks the image's own class. Raises ValueError for a
    K that `bags` does not hold.
    """
    ks, classes = list(ks or bags.ks), [names.short(each) for each in bags.images.classes]
    label, most = bags.images.labels[image].item(), 100 * bags.votes[:, image].max().item()
    near = bags.neighbours.shape[2]
    figure = plt.figure(figsize=(7, 1.25 * len(ks)))
    grid = figure.add_gridspec(len(ks), 2 + near, width_ratios=[1.35, 1.6] + [0.8] * near)

    for row, k in enumerate(ks):
        at = bags.ks.index(k)
        axis = figures.picture(figure.add_subplot(grid[row, 0]), bags.images.pixels[image])
        axis.set_ylabel(f"K = {k}\n{bags.accuracy[at]:.1f} % right\nof all", rotation=0, ha="right", va="center")
        for top, left, high, wide in bags.boxes[:k, image].tolist():
            for width, edge in ((2, "black"), (0.9, "white")):
                axis.add_patch(Rectangle((left - 0.5, top - 0.5), wide, high, fill=False, color=edge, linewidth=width))
        axis = figure.add_subplot(grid[row, 1], ylim=(0, 1.1 * most))
        tints = ["#0072B2" if place == label else "#BBBBBB" for place in range(len(classes))]
        axis.bar(range(len(classes)), 100 * bags.votes[at, image].numpy(), color=tints)
        axis.set_xticks(range(len(classes)), classes, fontsize=6.5, rotation=90 if max(map(len, classes)) > 2 else 0)
        axis.set_ylabel("votes (%)")
        axis.grid(False, axis="x")
        for column, place in enumerate(bags.neighbours[at, image].tolist()):
            axis = figures.picture(figure.add_subplot(grid[row, 2 + column]), bags.bank.pixels[place])
            own = bool(bags.bank.labels[place] == label)
            axis.spines[:].set(visible=own, color="#0072B2", linewidth=2.5)
            axis.set_xlabel(classes[bags.bank.labels[place]], fontsize=7, fontweight="bold" if own else "normal")
    return figure


def _sheet(pixels: Tensor) -> tuple[str, list[int]]:
    """Images uint8 [N, 3, H, W] in rows of `COLUMNS` as one data URI, and height and width of each in it."""
    shrink = max(1, max(pixels.shape[2:]) / TILE)
    high, wide = (max(1, round(side / shrink)) for side in pixels.shape[2:])
    sheet = Image.new("RGB", (wide * COLUMNS, high * -(-len(pixels) // COLUMNS)))
    for place, each in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):
        sheet.paste(Image.fromarray(each).resize((wide, high), Image.Resampling.LANCZOS),
                    (wide * (place % COLUMNS), high * (place // COLUMNS)))  # fmt: skip
    stream = io.BytesIO()
    sheet.save(stream, "WEBP", quality=90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}", [high, wide]
