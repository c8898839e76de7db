"""The colour of patches: jitter, grey, blur and solarise, drawn apart from being applied.

What is drawn is a `Colour`, whose values can be handed to torchvision: the results agree to 1e-5, and the values have
the distributions of its ColorJitter, RandomGrayscale, GaussianBlur and RandomSolarize, applied in this order. Nothing
loops over patches or waits for the device. Choices by 0 and 1 are made with lerp, which is exact there and several
times faster on the CPU than where.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from bagssl.augmentation import Augmentation, chance, uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering, in `Colour.factors` and `Colour.order`
LUMA = (0.2989, 0.587, 0.114)  # torchvision's grey
SIGMA = (0.1, 2.0)  # the range of the blur's standard deviation in pixels (SimCLR, appendix A)
SOLARISE_FROM = 128 / 255


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

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """`change` of each tensor."""
        return Colour(**{name: None if value is None else change(value) for name, value in vars(self).items()})

    def __getitem__(self, part: slice) -> Self:
        """The changes of some of the patches."""
        return self.map(lambda values: values[part])


def draw_colour(n: int, augmentation: Augmentation, generator: Generator) -> Colour:
    """Draw the colour changes of n patches, on the generator's device."""
    a, drawn = augmentation, {}
    if a.jitter > 0:
        ranges = [(max(0.0, 1 - x), 1 + x) for x in (a.brightness, a.contrast, a.saturation)] + [(-a.hue, a.hue)]
        drawn["factors"] = torch.stack([uniform((n,), *ends, generator) for ends in ranges], 1).float()
        drawn["order"] = uniform((n, 4), 0, 1, generator).argsort(1)
        drawn["applied"] = chance(n, a.jitter, generator)
    drawn["grey"] = chance(n, a.grey, generator)
    if a.blur > 0:
        drawn["blur"] = chance(n, a.blur, generator)
        drawn["sigma"] = uniform((n,), *SIGMA, generator).float()
    return Colour(**drawn, solarise=chance(n, a.solarise, generator))


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


def _grey(patches: Tensor) -> Tensor:
    red, green, blue = patches.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _column(values: Tensor) -> Tensor:
    return values.float()[:, None, None, None]
