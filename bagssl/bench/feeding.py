"""The rows of large datasets: pictures decoded into shards, and images gathered from them."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from bagssl import catalogue, data, pictures, shards, trees
from bagssl.bench.race import Machine, compared

SIDE, DIFFERENT = 256, 300  # pixels; pictures
SIDES = ((333, 500), (375, 500), (500, 375), (480, 640), (800, 1200), (1200, 1600))  # of pictures, as ImageNet's are


def importing(machine: Machine) -> Iterator[dict]:
    """Pictures a second that `data add` decodes into shards, over those that Pillow decodes on one core, times cores.

    The JPEGs are real images enlarged, with some noise; all have the reduced scale that we choose. Against decoding
    alone, and against decoding and the resize, which is Pillow's as well.
    """
    count, cores = machine.size["imported"], machine.cores
    with tempfile.TemporaryDirectory() as folder:
        tree = _album(machine, Path(folder), count)
        files = sorted(tree.rglob("*.JPEG"))[:: 2 * cores]

        def ours() -> int:
            with (tempfile.TemporaryDirectory() as root, mock.patch.object(catalogue, "SHARDED_FROM", 1),
                  mock.patch.object(shards, "SHARD", shards.SHARD // 8)):  # many, of few: no core waits at the end
                trees.add("bench", tree, SIDE, Path(root))
            return count

        def pillow(resize: bool) -> int:
            for path in files:
                with Image.open(path) as image:
                    image.draft(None, (pictures.SPARE * SIDE,) * 2)
                    image.load()
                    if resize:
                        pictures.fit(image, SIDE)
            return len(files) * cores

        rates = machine.race({"data add": ours, "decoding": lambda: pillow(False),
                              "decoding and resizing": lambda: pillow(True)})
    for theirs, aim in (("decoding", None), ("decoding and resizing", 0.8)):
        pair = {"data add": rates["data add"], f"Pillow, {theirs}, one core × {cores}": rates[theirs]}
        yield compared(f"import at {SIDE} px, against {theirs}", pair, "images/s", aim)


def _album(machine: Machine, folder: Path, count: int) -> Path:
    """A tree of JPEGs of several sizes, the first of which come again under other names."""
    noise, paths = np.random.default_rng(0), []
    for i in range(count):
        path = folder / "tree" / ("val" if i % 10 == 0 else "train") / str(i // 10 % 2) / f"{i:06}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i >= DIFFERENT:
            os.link(paths[i % DIFFERENT], path)
            continue
        paths.append(path)
        small = machine.train.pixels[i % len(machine.train)]
        large = F.interpolate(small[None].float(), SIDES[i % len(SIDES)], mode="bicubic")[0].permute(1, 2, 0).numpy()
        large += noise.normal(0, 8, (*large.shape[:2], 1))
        Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder / "tree"


def gathering(machine: Machine) -> Iterator[dict]:
    """Random images a second from shards into one buffer, over `pixels[index]` of one file; both have been read before.

    A file is mapped into memory, as datasets are. By one thread, as a training has beside its steps, and by all cores,
    where the memory is the limit of both.
    """
    count, per = machine.size["gathered"], shards.SHARD // (3 * SIDE**2)
    batch, generator = min(256, count), torch.Generator().manual_seed(0)
    buffer = torch.empty(batch, 3, SIDE, SIDE, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        def mapped(name: object) -> torch.Tensor:
            return load_file(Path(folder, f"{name}.safetensors"))["pixels"]

        drawn = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        parts = {"whole": drawn, **dict(enumerate(drawn.split(per)))}
        for name, part in parts.items():
            save_file({"pixels": part.contiguous()}, Path(folder, f"{name}.safetensors"))
        whole, shards_of = mapped("whole"), data.Shards(list(map(len, drawn.split(per))), (SIDE, SIDE), mapped)

        def places() -> torch.Tensor:
            return torch.randint(count, (batch,), generator=generator)

        works = {"shards": lambda: len(shards_of.index_select(0, places(), out=buffer)),
                 "pixels[index]": lambda: len(whole[places()])}  # fmt: skip
        for threads, said, aim in ((1, "1 thread", 15), (machine.cores, f"{machine.cores} threads", None)):
            with _threads(threads):
                rates = machine.race(works)
            yield compared(f"gathering, batches of {batch} at {SIDE} px, {said}", rates, "images/s", aim)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
