"""The embedded world: quilts of 32×32 px whose patch co-occurrence is known exactly.

A quilt is a grid of 4×4 cells of 8 px. Each cell shows one of 36 part types, six motifs in six colour
pairs, drawn independently given the class of the quilt. Each of the ten classes prefers two of the first five
motifs, and the parts on a permutation matrix of motif and colour of its own. Every class shows each colour pair
equally often: colour is a nuisance, and one part tells little of the class. p(part1, part2) of two cells of one
quilt has rank 10, and is what an objective that models patch co-occurrence has to find.

Everything is integer arithmetic on the raw output of PCG64 (which NumPy keeps stable across releases and
machines, unlike the methods of its Generator), so pixels and fingerprints are the same everywhere.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

SIDE, GRID, CELL = 32, 4, 8  # pixels of an image, cells along a side, pixels of a cell
TILE = 12  # a part is larger than a cell: the cell is a window at one of 5×5 positions in it
CLASSES = tuple("ABCDEFGHIJ")
SPLITS = {"train": (4000, 1), "test": (1000, 2)}  # images, seed
WORLD_SEED = 44
OF_MOTIF, OF_PART = 12, 4  # tickets, beside one for every part, for a preferred motif and for a preferred part

MOTIFS = ("bars", "posts", "diagonals", "checks", "dots", "rings")
COLOURS = {  # motif, ground
    "coral": ((222, 84, 60), (246, 230, 200)),
    "teal": ((20, 122, 116), (178, 226, 208)),
    "indigo": ((58, 60, 148), (196, 196, 236)),
    "gold": ((240, 196, 74), (116, 72, 36)),
    "rose": ((244, 190, 208), (172, 40, 104)),
    "sky": ((120, 190, 236), (38, 50, 74)),
}


@dataclass(frozen=True, eq=False)
class World:
    """What is known of the synthetic world: P = 36 part types, and C = 10 classes, equally frequent."""

    parts: Tensor  # uint8 [P, 3, 12, 12]
    names: tuple[str, ...]  # the colour and motif of each part
    class_part: Tensor  # float64 [C, P], p(part | class)
    joint: Tensor  # float64 [P, P], p(part1, part2) of two different cells of one image


def _below(raw: np.ndarray, n: int) -> np.ndarray:
    """Integers in [0, n) from the upper 32 bits of raw 64-bit draws."""
    return ((raw >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def _motifs() -> np.ndarray:
    """The coverage of each motif, 0 to 16, int64 [6, 12, 12]: counted on 4×4 points in each pixel.

    All but the rings repeat every 6 px, so that they are still told apart in an image that is shrunk to half its side.
    """
    y, x = np.mgrid[: 4 * TILE, : 4 * TILE]
    radius2 = (2 * y - 4 * TILE + 1) ** 2 + (2 * x - 4 * TILE + 1) ** 2  # of a point, in eighths of a pixel
    masks = [
        y // 12 % 2 == 0,
        x // 12 % 2 == 0,
        (x + y) // 12 % 2 == 0,
        (x // 12 + y // 12) % 2 == 0,
        (2 * (x % 24) - 23) ** 2 + (2 * (y % 24) - 23) ** 2 < 16**2,
        (radius2 < 10**2) | ((radius2 > 21**2) & (radius2 < 34**2)),
    ]
    return np.stack(masks).astype(np.int64).reshape(len(masks), TILE, 4, TILE, 4).sum((2, 4))


@lru_cache(maxsize=1)
def _parts() -> np.ndarray:
    """The part types, uint8 [36, 12, 12, 3]: motif by motif, each in every colour pair."""
    cover = _motifs()[:, None, :, :, None]
    motif, ground = np.array(list(COLOURS.values()), np.int64).transpose(1, 0, 2)[:, None, :, None, None, :]
    return ((cover * motif + (16 - cover) * ground) // 16).reshape(-1, TILE, TILE, 3).astype(np.uint8)


@lru_cache(maxsize=1)
def _tickets() -> np.ndarray:
    """How many tickets each part has in the urn of each class, int64 [10, 36]; every row has the same sum.

    A class prefers a pair of motifs, in all colours, and the parts on a permutation matrix (motif × colour), which
    has one part in each row and column: that is why each colour is equally frequent in every class.
    """
    n = len(MOTIFS)
    permutations = np.random.PCG64(WORLD_SEED).random_raw(len(CLASSES) * n).reshape(-1, n).argsort(-1, kind="stable")
    tickets = np.ones((len(CLASSES), n, n), np.int64)
    for table, pair, permutation in zip(tickets, combinations(range(n - 1), 2), permutations, strict=True):
        table[list(pair)] += OF_MOTIF
        table[np.arange(n), permutation] += OF_PART
    return tickets.reshape(len(CLASSES), n * n)


def world() -> World:
    """The parts, their distribution in each class, and their exact co-occurrence."""
    tickets = torch.from_numpy(_tickets())
    total = int(tickets[0].sum())
    names = tuple(f"{colour} {motif}" for motif in MOTIFS for colour in COLOURS)
    return World(parts=torch.from_numpy(_parts()).permute(0, 3, 1, 2).contiguous(), names=names,
                 class_part=tickets.double() / total, joint=(tickets.T @ tickets).double() / (len(tickets) * total**2))


def generate(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `count` quilts.

    Returns pixels uint8 [count, 3, 32, 32]; labels int64 [count], the classes in turn; and the part type of each cell,
    int64 [count, 4, 4]. Position jitter: each cell is a window of 8 px somewhere in its part of 12 px. Nuisances: one
    exposure and one tint for the image, triangular noise of about 6 grey levels for the pixel.
    """
    stream = np.random.PCG64(seed)
    labels = np.arange(count) % len(CLASSES)

    urns = np.stack([np.repeat(np.arange(len(row)), row) for row in _tickets()])  # the part of each ticket
    cells = (count, GRID, GRID)
    ticket = _below(stream.random_raw(count * GRID**2).reshape(cells), urns.shape[1])
    part = urns[labels[:, None, None], ticket]

    shifts = TILE - CELL + 1
    window = _below(stream.random_raw(count * GRID**2).reshape(cells), shifts**2)
    windows = np.lib.stride_tricks.sliding_window_view(_parts(), (CELL, CELL), (1, 2))  # [P, 5, 5, 3, 8, 8]
    quilts = windows[part, window // shifts, window % shifts]  # [N, 4, 4, 3, 8, 8]
    quilts = quilts.transpose(0, 3, 1, 4, 2, 5).reshape(count, 3, SIDE, SIDE)

    light = _below(stream.random_raw(count * 4).reshape(count, 4), 49)
    gain = (212 + light[:, :1]) * (232 + light[:, 1:])  # exposure × tint, of 65,536: 0.75 to 1.11
    lit = quilts * gain[:, :, None, None].astype(np.int32) >> 16

    bits = stream.random_raw(-(-quilts.size // 8)).astype("<u8").view(np.uint8)[: quilts.size]
    noise = (bits & 15).astype(np.int32) + (bits >> 4) - 15
    pixels = np.clip(lit + noise.reshape(quilts.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels), torch.from_numpy(part)


def draw(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels, labels and parts (see `generate`) of "train" (4,000 images) or "test" (1,000)."""
    return generate(*SPLITS[split])
