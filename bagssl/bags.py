"""A bag: the mean embedding of K patches of an image (or the largest), for all K in one pass over the patches.

Nothing is resized but what the encoder's input asks for, and nothing is coloured: evaluation sees pixels as they are.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bagssl import budget, patches
from bagssl.augmentation import Augmentation
from bagssl.colours import Colour, apply_colour, draw_colour
from bagssl.data import Pixels
from bagssl.devices import COMPILE_FROM, room
from bagssl.distributed import to_first, turns
from bagssl.errors import InputError, check_choice
from bagssl.progress import progress_bar

BATCH = {"cpu": 256, "cuda": 4096}  # crops: what stays in a processor's cache, what fills a GPU
POOLS = ("mean", "max")
COLOUR = 2**31  # beyond the seeds of boxes, and within the 32 bits that a CPU's generator looks at
LARGE = 96  # px: of larger crops fewer at a time, or a ResNet-50's maps would take many GiB


def embed_bags(encoder: nn.Module, pixels: Pixels, ks: Sequence[int], *, scale: float, size: int | None,
               crop: float = 1.0, pool: str = "mean", colour: Augmentation | None = None, seed: int = 0,
               device: torch.device | str | None = None, batch: int | None = None, progress: bool = False,
               more: int = 0) -> dict[int, Tensor]:
    """The mean embedding of the first K of max(ks) random patches of each image, for each K in `ks`.

    encoder: any module that maps [M, 3, size, size] in [0, 1] to [M, dim]; it stays as it is. With size None each crop
    is shown to it in its own pixels.
    pixels: uint8 [N, 3, H, W], wherever they lie. scale: the patches' share of the image's area. K = 0 is the centre
    crop: the whole image, or the share `crop` of its side, once. The patches follow from `seed` alone: bags are nested
    (the patches of K = 4 are the first of those of K = 16) and independent of `batch`, which counts the crops embedded
    at a time. pool: `mean`, or `max` for the largest of each coordinate. colour: by which patches are coloured as in
    training; None: they are shown as they are.
    device: where to embed, by default where the encoder lies. more: crops that must follow for these to be of use, see
    `budget.piece`. Returns {K: float32 [N, dim]} on the CPU. In a `distributed.group` the processes take the images in
    turns, `batch` crops each, the same as one process would: the first gets all bags (on CPUs with as many threads to
    the bit those of one process), the others none.

    Raises InputError for no K or one below 0, a scale outside (0, 1], an unknown pool, or no images, ValueError for a
    batch below 1, DoesNotFit as `budget.piece` does.
    """
    if not ks or any(k < 0 or k != int(k) for k in ks):
        raise InputError(f"K must be a list of whole numbers of at least 0, not {list(ks)}: 0 is the centre crop")
    ks = list(dict.fromkeys(map(int, ks)))
    if not 0 < scale <= 1:
        raise InputError(f"the patch scale must lie in (0, 1], not {scale}: it is a share of the image's area")
    check_choice("pool", pool, POOLS)
    height, width = pixels.shape[-2:]
    whole = size or max(1, round(crop * min(height, width)))
    size = size or patches.native_size(scale, height, width)
    embed, device, batch = _prepare(encoder, pixels, device, batch, max(size, whole * (0 in ks)), len(pixels) * max(ks))
    count, most, done, bags = len(pixels), max(ks), 0, {}
    with _telling(count * (most + (0 in ks)), encoder, size, device, progress, more) as update:
        def keep(k: int, images: slice, bag: Tensor, step: int) -> None:
            if (bag := to_first(bag, step)) is not None:
                if k not in bags:
                    held = room(2 * len(ks) * count * bag[0].nbytes, bag.device)  # the other half is for the network
                    bags[k] = torch.empty(count, bag.shape[1], device=bag.device if held else "cpu")
                bags[k][images] = bag[: images.stop - images.start]

        if 0 in ks:
            for own, images in turns(count, batch):
                part = pixels[own].to(device, non_blocking=True)
                keep(0, images, embed(patches.centre_crop(part, whole, crop)), batch)
            update(done := count)
        before, drawn = None, None
        if most:
            drawn = _boxes(pixels, most, scale, seed), colour and _colours(len(pixels), most, colour, seed)
        for images, start, h in _chunks(embed, pixels, *drawn, size, device, batch) if drawn else ():
            total = _pooled(h, pool, before if start else None)
            before = total[-1]
            for k in ks:
                if start < k <= start + len(h):
                    keep(k, images, total[k - start - 1] / (k if pool == "mean" else 1), _step(batch, most))
            update(done := done + len(h) * (images.stop - images.start))
    # but for the first batch's check, the only wait for the device
    return {k: bags[k].cpu() for k in ks if k in bags}


def _pooled(h: Tensor, pool: str, before: Tensor | None) -> Tensor:
    """Of embeddings [patches, images, dim] the sums, or the largest, of all up to each patch and of those before."""
    if pool == "mean":
        return h.cumsum(dim=0) + (0 if before is None else before)
    largest = h.cummax(dim=0).values
    return largest if before is None else torch.maximum(largest, before)


def patch_embeddings(encoder: nn.Module, pixels: Pixels, boxes: Tensor, size: int, *,
                     device: torch.device | str | None = None, batch: int | None = None,
                     progress: bool = False) -> Tensor:
    """The embedding of each of K boxes in each image, as float32 [K, N, dim] on the CPU.

    boxes: whole numbers [K, N, 4] (top, left, height, width), or a ValueError is raised; the rest as in `embed_bags`.
    """
    embed, device, batch = _prepare(encoder, pixels, device, batch, size)
    if boxes.ndim != 3 or boxes.shape[1:] != (len(pixels), 4) or not len(boxes):
        raise ValueError(f"boxes must be [patches, {len(pixels)}, 4] for {len(pixels)} images, not {list(boxes.shape)}")
    done, embeddings = 0, None
    with _telling(boxes.shape[0] * boxes.shape[1], encoder, size, device, progress) as update:
        for images, start, h in _chunks(embed, pixels, boxes, None, size, device, batch):
            if embeddings is None:
                embeddings = torch.empty(*boxes.shape[:2], h.shape[2])
            embeddings[start : start + len(h), images] = h
            update(done := done + h.shape[0] * h.shape[1])
    return embeddings


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in which each batch-norm that follows a convolution has become part of it.

    Exact but for rounding: conv then (x - mean) / deviation * gain + shift is one affine map. Pairs are those of
    torchvision's ResNets: neighbours in a Sequential, and neighbours called convN and bnN in any other module. Such
    names are a convention, not a proof of the order in which a foreign module calls them: compare its outputs.
    """
    module = copy.deepcopy(module).eval()
    for parent in module.modules():
        children = list(parent.named_children())
        for (name, conv), (other, norm) in itertools.pairwise(children):
            pair = isinstance(parent, nn.Sequential) or name.startswith("conv") and other == "bn" + name[4:]
            if pair and isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, other, nn.Identity())
    return module


def default_batch(kind: str, size: int) -> int:
    """Crops of `size` px embedded at a time: beyond LARGE as many as have the pixels of `BATCH` crops of that size."""
    return max(1, int(BATCH.get(kind, BATCH["cuda"]) * min(1.0, (LARGE / size) ** 2)))


def _prepare(encoder: nn.Module, pixels: Pixels, device: torch.device | str | None, batch: int | None, size: int,
             total: int = 0) -> tuple[Callable[[Tensor], Tensor], torch.device, int]:
    """The function crops [M, 3, s, s] -> float32 [M, dim], the device it works on, and crops per batch.

    size: of the largest crops; total: how many are to be embedded.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise InputError(
            f"images must be uint8 [images, 3, height, width], one at least, not {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    if device is None:
        device = next((parameter.device for parameter in encoder.parameters()), "cpu")
    device = torch.device(device)
    batch = default_batch(device.type, size) if batch is None else batch
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # but for the last batch, one shape
    plain = copy.deepcopy(encoder).eval().to(device, memory_format=torch.channels_last)
    compiled = device.type == "cuda" and total >= COMPILE_FROM
    network = None

    @torch.inference_mode()
    def embed(crops: Tensor) -> Tensor:
        nonlocal network
        count, crops = len(crops), crops.contiguous(memory_format=torch.channels_last)
        if network is None:  # an encoder of a foreign make may not call its layers in the order of their names
            folded, expected = fold_batch_norm(plain), plain(crops[:4])
            equal = (folded(crops[:4]) - expected).norm() <= 1e-2 * expected.norm()
            network = folded if equal else plain
            network = torch.compile(network, dynamic=False) if compiled else network
        if compiled and count < batch:  # one shape, compiled once
            crops = F.pad(crops, (0, 0, 0, 0, 0, 0, 0, batch - count))
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext():
            return network(crops)[:count].float()

    return embed, device, batch


@contextlib.contextmanager
def _telling(crops: int, encoder: nn.Module, size: int, device: torch.device, progress: bool,
             more: int = 0) -> Iterator[Callable[[int], None]]:  # fmt: skip
    """Around the embedding of so many crops: yields what is to be told how many are done."""
    cost = "embedding", sum(parameter.numel() for parameter in encoder.parameters()), size, device.type
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with (budget.piece(f"an embedding of {crops + more:,} crops", cost, crops, wait, more=more) as told,
          progress_bar(crops, 0, "embed", progress) as bar):  # fmt: skip
        def update(done: int) -> None:
            bar(done, "")
            told(done)

        yield update


def _boxes(pixels: Pixels, count: int, scale: float, seed: int) -> Tensor:
    """Boxes [count, N, 4] of all images, drawn patch by patch: as small numbers, a quarter of the memory."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.empty(count, len(pixels), 4, dtype=torch.int16)
    for patch in boxes:
        patch.copy_(patches.evaluation_boxes(1, len(pixels), *pixels.shape[2:], scale, generator)[0])
    return boxes


def _colours(images: int, count: int, augmentation: Augmentation, seed: int) -> Colour:
    """Changes of colour, [count, images, ...], drawn patch by patch, so that bags are nested.

    From other numbers than the boxes: of one seed, a patch's colour would follow from its place.
    """
    generator = torch.Generator().manual_seed(seed + COLOUR)
    each = [draw_colour(images, augmentation, generator) for _ in range(count)]
    return Colour(**{name: None if value is None else torch.stack([getattr(one, name) for one in each])
                     for name, value in vars(each[0]).items()})  # fmt: skip


def _chunks(embed: Callable[[Tensor], Tensor], pixels: Pixels, boxes: Tensor, colours: Colour | None, size: int,
            device: torch.device, batch: int) -> Iterator[tuple[slice, int, Tensor]]:
    """Which images, the first patch, and the embeddings [patches, images, dim] of a chunk of at most `batch` crops.

    All patches of some images, then of the next, so that each image is read once; where one image has more patches
    than a batch, its patches come in order. Of several processes each embeds its own of the images, see `turns`.
    """
    step = _step(batch, len(boxes))
    for own, together in turns(len(pixels), step):
        images = pixels[own].to(device, non_blocking=True)
        for start in range(0, len(boxes), batch // step):
            some = slice(start, start + batch // step)
            chunk = boxes[some, own].long()
            image = torch.arange(len(images)).repeat(len(chunk))
            cut = patches.crop(images, chunk.flatten(0, 1), size, image=image)
            if colours is not None:
                drawn = colours.map(lambda values, some=some, own=own: values[some, own].flatten(0, 1))
                cut = apply_colour(cut, drawn.map(lambda values: values.to(device)))
            h = embed(cut)
            yield together, start, h.view(*chunk.shape[:2], -1)


def _step(batch: int, patches: int) -> int:
    """Images that are embedded at once."""
    return batch // max(1, min(patches, batch))
