"""Cutting patches from images: what is drawn (`draw`, small tensors from a seed) apart from what is done (`apply`).

Everything is batched, on the device of the pixels, from an explicit generator; nothing loops over images or waits for
the device. A patch in its own pixels is a gather; a resize is linear and separable, hence two batched products with
matrices of weights. The boxes have the distribution of torchvision's RandomResizedCrop, and its crops agree with ours
to 1e-5. A slice of the draws gives the same slice of the patches, to the bit.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor

from bagssl.augmentation import Augmentation, chance, uniform
from bagssl.colours import Colour, apply_colour, draw_colour
from bagssl.errors import InputError

TRIES = 10  # torchvision's, before it falls back on the centre
PART = {"cpu": 2**18, "cuda": 2**27}  # floats worked on at a time: a CPU's cache, a fraction of a GPU's memory


@dataclass(frozen=True)
class Draws:
    """What decides the patches of a batch, view by view: of n = views x batch patches the boxes, flips and colours."""

    views: int
    boxes: Tensor  # int64 [n, 4] (top, left, height, width)
    flip: Tensor | None  # bool [n], or None where no patch is mirrored
    colour: Colour
    side: int | None  # height and width of every box in pixels, where they are one number

    def of(self, images: slice | Tensor) -> Self:
        """The draws of some of the batch's images, in all their views."""
        def some(values: Tensor) -> Tensor:
            return values.unflatten(0, (self.views, -1))[:, images].flatten(0, 1)

        flip = None if self.flip is None else some(self.flip)
        return Draws(self.views, some(self.boxes), flip, self.colour.map(some), self.side)


def draw(views: int, batch: int, height: int, width: int, augmentation: Augmentation, generator: Generator) -> Draws:
    """Draw boxes, flips and colours for `views` patches of each of `batch` images of height x width pixels.

    On the generator's device; equally seeded generators draw the same. Raises InputError for fewer than one view, or
    fewer cells of the grid than views.
    """
    if views < 1:
        raise InputError(f"views = {views!r}: give at least 1")
    a, count = augmentation, views * batch
    side = fixed_side(a.scale, a.ratio, height, width)
    if a.grid:
        boxes = draw_cells(views, batch, height, width, side, a.grid, generator).flatten(0, 1)
    else:
        boxes = draw_boxes(count, height, width, a.scale, a.ratio, generator)
    return Draws(views, boxes, chance(count, a.flip, generator), draw_colour(count, a, generator), side)


def apply(pixels: Tensor, draws: Draws, size: int,
          colour_by: Callable[[Tensor, Colour], Tensor] = apply_colour) -> Tensor:
    """Cut and colour the drawn patches: float32 [views, B, 3, size, size] in [0, 1], contiguous.

    pixels: uint8 [B, 3, H, W], on any device; colour_by: `apply_colour`, or the same compiled.
    """
    (batch, _, height, width), device, count = pixels.shape, pixels.device, len(draws.boxes)
    boxes, flip = _move(draws.boxes, device), _move(draws.flip, device)
    colour = draws.colour.map(lambda values: _move(values, device))
    image = torch.arange(batch, device=device).repeat(draws.views)
    patches = torch.empty((count, 3, size, size), device=device)
    for part in _parts(count, 3 * (height * width if draws.side is None else size**2), device):
        mirrored = None if flip is None else flip[part]
        cut = crop(pixels, boxes[part], size, mirrored, image=image[part], side=draws.side)
        patches[part] = colour_by(cut, colour[part])
    return patches.view(draws.views, batch, 3, size, size)


def augment(pixels: Tensor, views: int, augmentation: Augmentation, generator: Generator,
            colour_by: Callable[[Tensor, Colour], Tensor] = apply_colour,
            share: tuple[int, Tensor] | None = None) -> Tensor:
    """`draw`, then `apply`: `views` random patches of each image, float32 [views, B, 3, size, size] in [0, 1].

    pixels: uint8 [B, 3, H, W], on any device; generator: of the CPU or of that device. share: where the pixels are some
    of a larger batch, its images, for all of which is drawn, and the places of these among them, int64 [B].
    Raises InputError when the pixels have another shape or type, and as `draw` does.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise InputError(f"pixels are {pixels.dtype} {list(pixels.shape)}: give uint8 [images, 3, height, width]")
    draws = draw(views, len(pixels) if share is None else share[0], *pixels.shape[2:], augmentation, generator)
    return apply(pixels, draws if share is None else draws.of(share[1]), augmentation.size, colour_by)


# ---- boxes


def native_size(scale: float, height: int, width: int) -> int:
    """Side in pixels of a square patch with the share `scale` of the image's area."""
    return max(1, min(round(math.sqrt(scale * height * width)), height, width))


def fixed_side(scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int) -> int | None:
    """The side in pixels that all boxes of these ranges share, None when they differ."""
    return native_size(scale[0], height, width) if scale[0] == scale[1] and ratio == (1, 1) else None


def draw_boxes(count: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float],
               generator: Generator) -> Tensor:
    """Draw boxes with the distribution of torchvision's RandomResizedCrop.

    The area is uniform, the ratio log-uniform, the sides rounded, the offsets uniform over all that fit; the first
    of ten tries that fits is taken, else the largest centred box of an allowed ratio.
    Returns int64 [count, 4] (top, left, height, width) on the generator's device.
    """
    side = fixed_side(scale, ratio, height, width)
    if side is not None:
        h = w = torch.full((count,), side, device=generator.device)
        fits = torch.full_like(h, round(math.sqrt(scale[0] * height * width)) == side, dtype=torch.bool)
    else:
        area = uniform((count, TRIES), *scale, generator) * (height * width)
        aspect = uniform((count, TRIES), math.log(ratio[0]), math.log(ratio[1]), generator).exp()
        h, w = (area / aspect).sqrt().round().long(), (area * aspect).sqrt().round().long()
        valid = (h > 0) & (h <= height) & (w > 0) & (w <= width)
        first, fits = valid.int().argmax(1, keepdim=True), valid.any(1)
        h = torch.where(fits, h.gather(1, first)[:, 0], round(min(height, width / ratio[0])))
        w = torch.where(fits, w.gather(1, first)[:, 0], round(min(width, height * ratio[1])))
    room = (height - h, width - w)
    top, left = (torch.where(fits, _below(free + 1, generator), free // 2) for free in room)
    return torch.stack([top, left, h, w], 1)


def grid_boxes(height: int, width: int, side: int, grid: int, device: torch.device | None = None) -> Tensor:
    """Every square box of `side` pixels whose offsets are multiples of `grid`, row by row: int64 [cells, 4]."""
    top, left = (torch.arange(0, length - side + 1, grid, device=device) for length in (height, width))
    corners = torch.cartesian_prod(top, left)
    return torch.cat([corners, torch.full_like(corners, side)], 1)


def draw_cells(views: int, batch: int, height: int, width: int, side: int, grid: int, generator: Generator) -> Tensor:
    """Draw `views` different cells of the grid (see `grid_boxes`) in each of `batch` images.

    Any two views of an image are equally likely to be any two different cells, in either order.
    Returns int64 [views, batch, 4] on the generator's device. Raises InputError for more views than cells.
    """
    cells = grid_boxes(height, width, side, grid, generator.device)
    if views > len(cells):
        raise InputError(f"{views} views do not fit on {len(cells)} different cells: lower views or grid")
    order = uniform((batch, len(cells)), 0, 1, generator).argsort(1)
    return cells[order[:, :views].mT]


def evaluation_boxes(count: int, n: int, height: int, width: int, scale: float, generator: Generator) -> Tensor:
    """Draw `count` square boxes of one fixed scale in each of n images.

    Returns int64 [count, n, 4] (top, left, height, width). Patch k does not depend on `count`: the first K of many
    are the same as K drawn, and a further call with the same generator goes on where this one ended.
    """
    boxes = torch.full((count, n, 4), native_size(scale, height, width), device=generator.device)
    for patch in boxes:  # one draw per patch keeps the stream nested on every device
        patch[:, 0] = _below(height + 1 - patch[:, 2], generator)
        patch[:, 1] = _below(width + 1 - patch[:, 3], generator)
    return boxes


# ---- cutting


def crop(pixels: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None, *, image: Tensor | None = None,
         side: int | None = None) -> Tensor:
    """Cut boxes out of images, resize them to `size` (bilinear, antialiased) and mirror them where `flip` says so.

    pixels: uint8, or float in [0, 1], [N, 3, H, W]; boxes: int64 [M, 4] (top, left, height, width), inside the image;
    flip: bool [M]; image: int64 [M], the image that each box lies in (by default box m lies in image m);
    side: height and width of every box, where they are known to be one number. Without it, boxes in the CPU's memory
    are looked at, and others are not, as that would mean to wait for the device.
    Returns float32 [M, 3, size, size] in [0, 1]. Boxes of `size` x `size` are copied without interpolation.
    """
    if side is None and boxes.device.type == "cpu" and len(boxes) and bool((boxes[:, 2:] == boxes[0, 2]).all()):
        side = int(boxes[0, 2])
    boxes, flip, device = _move(boxes, pixels.device), _move(flip, pixels.device), pixels.device
    image = torch.arange(len(boxes), device=device) if image is None else _move(image, device)
    top, left, h, w = boxes.unbind(1)
    if side is None:
        height, width = pixels.shape[-2:]
        rows, columns = _weights(top, h, size, height), _weights(left, w, size, width, flip)
        return _resize(_unit(pixels[image]), rows[:, None], columns[:, None])
    patches = _unit(pixels.unfold(2, side, 1).unfold(3, side, 1)[image, :, top, left])
    if flip is not None:
        patches.lerp_(patches.flip(-1), flip.float()[:, None, None, None])
    return _resize_whole(patches, size)


def centre_crop(pixels: Tensor, size: int, share: float = 1.0) -> Tensor:
    """The whole image, or its centred square when it is not square, resized with antialiasing.

    pixels: uint8 [N, 3, H, W]; share: of the square's side, around its centre. Returns float32 [N, 3, size, size] in
    [0, 1].
    """
    count, _, height, width = pixels.shape
    side = max(1, round(share * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    whole = torch.empty((count, 3, size, size), device=pixels.device)
    for part in _parts(count, 3 * side * side, pixels.device):
        whole[part] = _resize_whole(_unit(pixels[part, :, top : top + side, left : left + side]), size)
    return whole


def _resize_whole(patches: Tensor, size: int) -> Tensor:
    side = patches.shape[-1]
    if side == size:
        return patches
    start = torch.zeros(1, dtype=torch.int64, device=patches.device)
    weights = _weights(start, start + side, size, side)[0]
    return _resize(patches, weights, weights)


def _resize(patches: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """patches [M, 3, H, W], rows [..., size, H], columns [..., size, W] -> [M, 3, size, size]."""
    with _full_precision(patches.device.type):
        resized = torch.matmul(rows, torch.matmul(patches, columns.mT))
    return resized.clamp_(0, 1)  # the weights sum to 1 only up to rounding


def _weights(start: Tensor, length: Tensor, size: int, full: int, flip: Tensor | None = None) -> Tensor:
    """The resize of [start, start + length) to `size` samples, as matrices [M, size, full].

    Half-pixel centres; a triangle as wide as one pixel of the coarser grid; cut off at the ends of the box, not of
    the image, and normalised.
    """
    step = (length.float() / size)[:, None, None]
    sample = torch.arange(size, device=start.device).expand(len(start), size)
    if flip is not None:
        sample = torch.where(flip[:, None], size - 1 - sample, sample)
    centre = step * (sample[:, :, None] + 0.5)
    source = torch.arange(full, device=start.device) - start[:, None, None]
    inside = (source >= 0) & (source < length[:, None, None])
    weights = (1 - ((source - centre + 0.5) / step.clamp(min=1)).abs()).clamp_(min=0).mul_(inside)
    return weights / weights.sum(-1, keepdim=True)


# ---- small things


def _unit(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values.float().div_(255)


def _below(bounds: Tensor, generator: Generator) -> Tensor:
    return (uniform(bounds.shape, 0, 1, generator) * bounds).long()


def _move(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    # towards the CPU a copy that does not wait could be read before it has arrived
    return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")


def _parts(count: int, floats: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` patches, `floats` numbers each, that are worked on one after the other."""
    step = max(1, PART.get(device.type, PART["cuda"]) // floats)
    return (slice(start, start + step) for start in range(0, count, step))


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Products in float32: with TF32 or bfloat16, whoever asked for them, they would be off by up to 1e-2."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
