"""Cutting patches from images and colouring them: batched, on the device of the pixels, from an explicit generator.

What is drawn (boxes, flips, a `Colour`) is apart from what is done with it (`crop`, `apply_colour`), so that the
same parameters can be handed to torchvision: the results agree to 1e-5, and the parameters have the distributions
of its RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur and RandomSolarize, applied in this order.

Neither half loops over images or waits for the device. A patch in its own pixels is a gather; a resize is linear and
separable, hence two batched products with matrices of weights. Choices by 0 and 1 are made with lerp, which is exact
there and several times faster on the CPU than where.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from bagssl.errors import InputError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering, in `Colour.factors` and `Colour.order`
LUMA = (0.2989, 0.587, 0.114)  # torchvision's grey
SIGMA = (0.1, 2.0)  # the range of the blur's standard deviation in pixels (SimCLR, appendix A)
SOLARISE_FROM = 128 / 255
TRIES = 10  # torchvision's, before it falls back on the centre
PART = {"cpu": 2**18, "cuda": 2**27}  # floats worked on at a time: a CPU's cache, a fraction of a GPU's memory


@dataclass(frozen=True)
class Augmentation:
    """How training patches are cut and coloured.

    scale: range of the box's share of the image's area; equal ends are one fixed scale.
    ratio: range of the box's width / height; (1, 1) for patches, (3/4, 4/3) for multi-scale crops.
    size: side of the patch that the encoder sees, in pixels.
    brightness, contrast, saturation: factors are drawn from [max(0, 1 - x), 1 + x]; hue: turns from [-x, x].
    flip, jitter, grey, blur, solarise: probabilities.
    grid: 0, or the pixels of which the offsets of patches of one fixed scale are multiples; the views of an image
    are then different cells, drawn without replacement.

    Raises InputError for a value without sense.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    size: int
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    solarise: float = 0.0
    grid: int = 0

    def __post_init__(self):
        for name in ("scale", "ratio"):
            ends = getattr(self, name)
            if not (isinstance(ends, (tuple, list)) and len(ends) == 2 and all(map(_is_number, ends))):
                raise InputError(f"{name} = {ends!r}: give two numbers, the lower and the upper end")
            if not 0 < ends[0] <= ends[1]:
                raise InputError(f"{name} = {ends!r}: give positive ends, the lower one first")
            object.__setattr__(self, name, tuple(map(float, ends)))
        if self.scale[1] > 1:
            raise InputError(f"scale = {self.scale!r}: a share of the image's area is at most 1")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise InputError(f"size = {self.size!r}: give a whole number of pixels, at least 1")
        if isinstance(self.grid, bool) or not isinstance(self.grid, int) or self.grid < 0:
            raise InputError(f"grid = {self.grid!r}: give a whole number of pixels, 0 for any offset")
        if self.grid and (self.scale[0] != self.scale[1] or self.ratio != (1, 1)):
            raise InputError(f"grid = {self.grid!r}: only square patches of one fixed scale can lie on a grid")
        most = {"brightness": math.inf, "contrast": math.inf, "saturation": math.inf, "hue": 0.5}
        for name in (field.name for field in fields(self)[3:] if field.name != "grid"):
            value, limit = getattr(self, name), most.get(name, 1)
            if not (_is_number(value) and 0 <= value <= limit):
                allowed = "at least 0" if limit == math.inf else f"from 0 to {limit}"
                raise InputError(f"{name} = {value!r}: give a number {allowed}")
        if self.blur > 0 and self.size < 2:
            raise InputError(f"blur = {self.blur!r}: a patch of one pixel cannot be blurred; set blur to 0")


@dataclass(frozen=True)
class Colour:
    """The drawn colour changes of n patches; None stands for a change that no patch undergoes."""

    factors: Tensor | None = None  # float [n, 4]: of brightness, contrast, saturation; the turn of hue
    order: Tensor | None = None  # int64 [n, 4]: a permutation of the four per patch
    applied: Tensor | None = None  # bool [n]: whether the four are applied at all
    grey: Tensor | None = None  # bool [n]
    blur: Tensor | None = None  # bool [n]
    sigma: Tensor | None = None  # float [n], pixels
    solarise: Tensor | None = None  # bool [n]

    def to(self, device: torch.device) -> Colour:
        """The same on `device`."""
        return Colour(**{name: _move(value, device) for name, value in vars(self).items()})

    def __getitem__(self, part: slice) -> Colour:
        """The changes of some of the patches."""
        return Colour(**{name: None if value is None else value[part] for name, value in vars(self).items()})


def augment(pixels: Tensor, views: int, augmentation: Augmentation, generator: Generator,
            colour_by: Callable[[Tensor, Colour], Tensor] | None = None) -> Tensor:
    """Cut and colour `views` random patches of each image.

    pixels: uint8 [B, 3, H, W], on any device; generator: of the CPU or of that device; colour_by: `apply_colour`, or
    the same compiled.
    Returns float32 [views, B, 3, size, size] in [0, 1], contiguous. Equally seeded generators give equal bits.
    Raises InputError when the pixels have another shape or type, or fewer cells of the grid than views.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise InputError(f"pixels are {pixels.dtype} {list(pixels.shape)}: give uint8 [images, 3, height, width]")
    if views < 1:
        raise InputError(f"views = {views!r}: give at least 1")
    (batch, _, height, width), a, device = pixels.shape, augmentation, pixels.device
    count, side = views * batch, fixed_side(a.scale, a.ratio, height, width)
    if a.grid:
        boxes = draw_cells(views, batch, height, width, side, a.grid, generator).flatten(0, 1)
    else:
        boxes = draw_boxes(count, height, width, a.scale, a.ratio, generator)
    boxes = _move(boxes, device)
    flip = _move(_chance(count, a.flip, generator), device)
    colour = draw_colour(count, a, generator).to(device)
    image = torch.arange(batch, device=device).repeat(views)
    patches = torch.empty((count, 3, a.size, a.size), device=device)
    for part in _parts(count, 3 * (height * width if side is None else a.size**2), device):
        mirrored = None if flip is None else flip[part]
        cut = crop(pixels, boxes[part], a.size, mirrored, image=image[part], side=side)
        patches[part] = (colour_by or apply_colour)(cut, colour[part])
    return patches.view(views, batch, 3, a.size, a.size)


# ---------------------------------------------------------------------------------------------------- boxes


def native_size(scale: float, height: int, width: int) -> int:
    """Side in pixels of a square patch with the share `scale` of the image's area."""
    return max(1, min(round(math.sqrt(scale * height * width)), height, width))


def fixed_side(scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int) -> int | None:
    """The side in pixels that all boxes of these ranges share, None when they differ."""
    return native_size(scale[0], height, width) if scale[0] == scale[1] and ratio == (1, 1) else None


def draw_boxes(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: Generator,
) -> Tensor:
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
        area = _uniform((count, TRIES), *scale, generator) * (height * width)
        aspect = _uniform((count, TRIES), math.log(ratio[0]), math.log(ratio[1]), generator).exp()
        h, w = (area / aspect).sqrt().round().long(), (area * aspect).sqrt().round().long()
        valid = (h > 0) & (h <= height) & (w > 0) & (w <= width)
        first, fits = valid.int().argmax(1, keepdim=True), valid.any(1)
        tallest, widest = height, width
        if width / height < ratio[0]:
            tallest = round(width / ratio[0])
        elif width / height > ratio[1]:
            widest = round(height * ratio[1])
        h = torch.where(fits, h.gather(1, first)[:, 0], tallest)
        w = torch.where(fits, w.gather(1, first)[:, 0], widest)
    room = (height - h, width - w)
    top, left = (torch.where(fits, _below(free + 1, generator), free // 2) for free in room)
    return torch.stack([top, left, h, w], 1)


def grid_boxes(height: int, width: int, side: int, grid: int) -> Tensor:
    """Every square box of `side` pixels whose offsets are multiples of `grid`, row by row: int64 [cells, 4]."""
    top, left = torch.arange(0, height - side + 1, grid), torch.arange(0, width - side + 1, grid)
    corners = torch.cartesian_prod(top, left)
    return torch.cat([corners, torch.full_like(corners, side)], 1)


def draw_cells(
    views: int, batch: int, height: int, width: int, side: int, grid: int, generator: Generator
) -> Tensor:
    """Draw `views` different cells of the grid (see `grid_boxes`) in each of `batch` images.

    Any two views of an image are equally likely to be any two different cells, in either order.
    Returns int64 [views, batch, 4] on the generator's device. Raises InputError for more views than cells.
    """
    cells = _move(grid_boxes(height, width, side, grid), generator.device)
    if views > len(cells):
        raise InputError(f"{views} views do not fit on {len(cells)} different cells: lower views or grid")
    order = _uniform((batch, len(cells)), 0, 1, generator).argsort(1)
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


# ---------------------------------------------------------------------------------------------------- cutting


def crop(
    pixels: Tensor,
    boxes: Tensor,
    size: int,
    flip: Tensor | None = None,
    *,
    image: Tensor | None = None,
    side: int | None = None,
) -> Tensor:
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
        patches.lerp_(patches.flip(-1), _column(flip))
    return _resize_whole(patches, size)


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """The whole image, or its centred square when it is not square, resized with antialiasing.

    pixels: uint8 [N, 3, H, W]. Returns float32 [N, 3, size, size] in [0, 1].
    """
    count, _, height, width = pixels.shape
    side = min(height, width)
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


# ---------------------------------------------------------------------------------------------------- colouring


def draw_colour(n: int, augmentation: Augmentation, generator: Generator) -> Colour:
    """Draw the colour changes of n patches, on the generator's device."""
    a, drawn = augmentation, {}
    if a.jitter > 0:
        ranges = [(max(0.0, 1 - x), 1 + x) for x in (a.brightness, a.contrast, a.saturation)] + [(-a.hue, a.hue)]
        drawn["factors"] = torch.stack([_uniform((n,), *ends, generator) for ends in ranges], 1).float()
        drawn["order"] = _uniform((n, 4), 0, 1, generator).argsort(1)
        drawn["applied"] = _chance(n, a.jitter, generator)
    drawn["grey"] = _chance(n, a.grey, generator)
    if a.blur > 0:
        drawn["blur"] = _chance(n, a.blur, generator)
        drawn["sigma"] = _uniform((n,), *SIGMA, generator).float()
    return Colour(**drawn, solarise=_chance(n, a.solarise, generator))


def apply_colour(patches: Tensor, colour: Colour) -> Tensor:
    """Jitter, grey, blur and solarise patches float32 [n, 3, s, s] in [0, 1]: new patches of the same shape."""
    patches = patches.clone()
    if colour.order is not None:
        _jitter(patches, colour)
    if colour.grey is not None:
        patches.lerp_(_grey(patches)[:, None], _column(colour.grey))
    if colour.blur is not None:
        some = _drawn(colour.blur)
        patches[some] = _blur(patches[some], colour.blur[some], colour.sigma[some])
    if colour.solarise is not None:
        some = _drawn(colour.solarise)
        turned = (patches[some] >= SOLARISE_FROM) & colour.solarise[some, None, None, None]
        patches[some] = patches[some].lerp(1 - patches[some], turned.float())
    return patches.clamp_(0, 1)  # blur and hue leave the range by a rounding error


def _drawn(mine: Tensor) -> Tensor | slice:
    """The patches that a change was drawn for; all of them on a device that would have to be waited for to know."""
    return mine.nonzero()[:, 0] if mine.device.type == "cpu" else slice(None)


def _jitter(patches: Tensor, colour: Colour) -> None:
    """In place: the blends that come before hue in a patch's order, then hue, then the blends after it.

    Every patch takes all six of these slots, with the factor 1 in the three that are not its own, and one turn of
    hue: less work than a turn in each slot, and no shape depends on what was drawn.
    """
    order, factors = colour.order, torch.where(colour.applied[:, None], colour.factors, 1.0)
    turn = order.eq(HUE).int().argmax(1)
    for slot in (0, 1, 2):
        _blend(patches, order[:, slot], factors, slot < turn)
    shift = colour.factors[:, HUE]
    patches.lerp_(_turn_hue(patches, shift), _column(colour.applied & (shift != 0)))
    for slot in (1, 2, 3):
        _blend(patches, order[:, slot], factors, slot > turn)


def _blend(patches: Tensor, kind: Tensor, factors: Tensor, mine: Tensor) -> None:
    """In place: factor * patch + (1 - factor) * other, clamped; other is black, the mean grey or the grey patch."""
    factor = torch.where(mine, factors.gather(1, kind[:, None])[:, 0], 1.0)
    grey = _grey(patches)
    to_mean = grey.mean((1, 2)) * (1 - factor) * (kind == CONTRAST)
    to_grey = (1 - factor) * (kind == SATURATION)
    other = grey.mul_(to_grey[:, None, None]).add_(to_mean[:, None, None])
    patches.mul_(_column(factor)).add_(other[:, None]).clamp_(0, 1)


def _turn_hue(patches: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of the HSV hexcone by `shift` turns; value and saturation stay (Smith 1978)."""
    red, green, blue = patches.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    hue = 4 * chroma + red - green  # sixths of a turn, times chroma: if blue is the largest,
    hue.lerp_(2 * chroma + blue - red, value.eq(green).float())  # green,
    hue.lerp_(green - blue, value.eq(red).float())  # or red
    hue.div_((6 * chroma).clamp_(min=1e-30)).add_(shift[:, None, None])
    # channel = value - chroma * g(k), where g rises from 0 to 1 over one sixth, stays for two, falls over one
    k = hue[:, None] + (5 - 2 * torch.arange(3, device=patches.device)[:, None, None]) / 6
    k.sub_(k.floor()).mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma[:, None])
    return k.neg_().add_(value[:, None])


def blur_kernel(side: int) -> int:
    """Width in pixels of the blur's kernel for a patch of this side: about a tenth, odd, at least 3."""
    return max(3, round(side / 10) | 1)


def _blur(patches: Tensor, blur: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, reflected at the border; where it is not asked for, the kernel is a single 1."""
    side = patches.shape[-1]
    reach = blur_kernel(side) // 2
    tap = torch.arange(-reach, reach + 1, device=patches.device)
    kernel = (-0.5 * (tap / sigma[:, None]) ** 2).exp()
    kernel = torch.where(blur[:, None], kernel / kernel.sum(1, keepdim=True), (tap == 0).float())
    weights = [_column(weight) for weight in kernel.unbind(1)]
    padded = F.pad(patches, (reach,) * 4, mode="reflect")
    rows = sum(weight * padded[..., t : t + side, :] for t, weight in enumerate(weights))
    return sum(weight * rows[..., t : t + side] for t, weight in enumerate(weights))


# ---------------------------------------------------------------------------------------------------- small things


def _grey(patches: Tensor) -> Tensor:
    red, green, blue = patches.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _unit(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values.float().div_(255)


def _column(values: Tensor) -> Tensor:
    return values.float()[:, None, None, None]


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    # float64, so that a product with a count of pixels is never rounded up to that count
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64) * (high - low) + low


def _below(bounds: Tensor, generator: Generator) -> Tensor:
    return (_uniform(bounds.shape, 0, 1, generator) * bounds).long()


def _chance(n: int, probability: float, generator: Generator) -> Tensor | None:
    return _uniform((n,), 0, 1, generator) < probability if probability > 0 else None


def _move(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    # towards the CPU a copy that does not wait could be read before it has arrived
    return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
