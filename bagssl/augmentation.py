"""The distribution of training patches, and how numbers are drawn from it."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

from bagssl.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """How training patches are cut and coloured. Raises InputError for a value without sense."""

    scale: tuple[float, float]  # range of the box's share of the image's area; equal ends are one fixed scale
    ratio: tuple[float, float]  # range of its width / height; (1, 1) for patches, (3/4, 4/3) for multi-scale crops
    size: int  # side of the patch that the encoder sees, in pixels
    flip: float = 0.5  # probability
    brightness: float = 0.0  # the factor is drawn from [max(0, 1 - x), 1 + x]
    contrast: float = 0.0  # likewise
    saturation: float = 0.0  # likewise
    hue: float = 0.0  # the turn is drawn from [-x, x]
    jitter: float = 0.0  # probability of these four
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability
    solarise: float = 0.0  # probability
    grid: int = 0  # or the pixels of which all offsets are multiples; views are then different cells (`draw_cells`)

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


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    """Numbers from low to high, on the generator's device."""
    # float64, so that a product with a count of pixels is never rounded up to that count
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64) * (high - low) + low


def chance(n: int, probability: float, generator: Generator) -> Tensor | None:
    """Which of n patches something happens to, bool [n]; None when it happens to none."""
    return uniform((n,), 0, 1, generator) < probability if probability > 0 else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
