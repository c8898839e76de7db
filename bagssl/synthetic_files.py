"""The embedded world as a user would have it: pictures of mixed sizes in JPEG files, imported.

`synthetic-jpeg` is a small stand-in for ImageNet: quilts of synthetic.py, two to four times as large, in the middle of
pictures that are wider or higher, in a tree of ImageNet's layout. It is read by the path of every class-folder tree:
found, decoded, its centred squares resampled to one size. Pixels may differ from one JPEG decoder to another.
"""

import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from bagssl.data import Images, load
from bagssl.synthetic import CLASSES, generate
from bagssl.trees import add

SIZE = 64  # px, of the imported pictures
SPLITS = {"train": (1000, 3, "train"), "test": (400, 4, "val")}  # images, seed, folder
QUALITY = 92


def write(tree: Path, count: int, seed: int, folder: str) -> None:
    """Write `count` quilts as JPEGs: tree/folder/CLASS/NUMBER.jpeg, shorter sides of 64 to 128 px, longer to half more.
    """
    pixels, labels, _ = generate(count, seed)
    draws = np.random.Generator(np.random.PCG64(seed)).random((count, 3))
    for number, (quilt, label, (times, wider, turned)) in enumerate(zip(pixels, labels, draws, strict=True)):
        place = tree / folder / CLASSES[label] / f"{number:05}.jpeg"
        place.parent.mkdir(parents=True, exist_ok=True)
        side = round(SIZE * (1 + times))
        picture = np.asarray(Image.fromarray(quilt.permute(1, 2, 0).numpy()).resize((side, side)))
        margin = round(side * wider / 4)
        sides = [(margin, margin), (0, 0), (0, 0)]
        picture = np.pad(picture, sides if turned < 0.5 else [sides[1], sides[0], sides[2]], "reflect")
        Image.fromarray(picture).save(place, quality=QUALITY, subsampling=0)


def draw(split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The pixels [N, 3, 64, 64], labels and classes of "train" (1,000 images) or "test" (400), as they are imported."""
    images = _imported()[split]
    return images.pixels, images.labels, images.classes


@lru_cache
def _imported() -> dict[str, Images]:
    with tempfile.TemporaryDirectory() as folder:
        tree, root = Path(folder, "tree"), Path(folder, "data")
        for each in SPLITS.values():
            write(tree, *each)
        add("imported", tree, size=SIZE, root=root)
        return {split: load("imported", split, root) for split in SPLITS}
