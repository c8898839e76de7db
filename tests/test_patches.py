"""Patches equal torchvision's given the same parameters, and the parameters have torchvision's distributions.

Each check is a function of the thing checked, so that a plausible mistake can be shown to fail it (`mistake`).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as reference

from bagssl import colours as C
from bagssl import patches as P
from bagssl.augmentation import Augmentation, chance
from bagssl.colours import Colour, apply_colour, draw_colour
from bagssl.errors import InputError
from bagssl.patches import augment, crop, draw_boxes

pytestmark = pytest.mark.usefixtures("one_thread")

ADJUST = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
ORDERS = torch.tensor(list(itertools.permutations(range(4))))
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2, "jitter": 0.8}
FULL = JITTER | {"grey": 0.2, "blur": 0.3, "solarise": 0.3}
RARE = 1e-4  # probability below which a sample is not believed to have its distribution; the seeds are fixed


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mistake(check, wrong) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float32
    assert (actual - expected).abs().max().item() <= tolerance


def pictures(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise, grey noise, black, white, one grey, one colour, single bright pixels, two-valued noise: uint8."""
    noise = torch.randint(0, 256, (3, 3, height, width), generator=seeded(seed), dtype=torch.uint8)
    still = torch.tensor([[0, 0, 0], [255, 255, 255], [128, 128, 128], [200, 30, 30]], dtype=torch.uint8)
    corner, middle = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    corner[:, 0, 0], middle[1, height // 2, width // 2] = 255, 255
    return torch.cat([
        noise, noise[:1, :1].expand(1, 3, -1, -1), still[:, :, None, None].expand(4, 3, height, width),
        torch.stack([corner, middle]), 255 * (noise[:1] > 127).to(torch.uint8),
    ])  # fmt: skip


# ---------------------------------------------------------------------------------------------------- cutting


def torchvision_crop(pixels, boxes, size, flip):
    cut = []
    for picture, box, mirrored in zip(pixels, boxes.tolist(), flip.tolist(), strict=True):
        patch = reference.resized_crop(picture.float() / 255, *box, [size, size], antialias=True)
        cut.append(reference.hflip(patch) if mirrored else patch)
    return torch.stack(cut)


def check_cutting(cut, height, width, size, *, low, high, flips=True):
    """Boxes whose sides are between `low` and `high` times the output's."""
    pixels = pictures(height, width)
    for seed in range(6):
        generator, n = seeded(seed), len(pixels)
        least, most = max(1, math.ceil(low * size)), math.floor(high * size)
        h = torch.randint(least, min(most, height) + 1, (n,), generator=generator)
        w = torch.randint(least, min(most, width) + 1, (n,), generator=generator)
        top, left = (torch.rand(2, n, generator=generator) * torch.stack([height - h + 1, width - w + 1])).long()
        boxes = torch.stack([top, left, h, w], 1)
        flip = torch.rand(n, generator=generator) < (0.5 if flips else 0)
        close(cut(pixels, boxes, size, flip), torchvision_crop(pixels, boxes, size, flip))


def check_enlarging(cut):
    check_cutting(cut, 24, 31, 29, low=0.1, high=1, flips=False)


def check_shrinking(cut):
    check_cutting(cut, 40, 33, 7, low=1.2, high=9, flips=False)


def grid_crop(pixels, boxes, size, flip, *, align_corners=False, clamped=True):
    """grid_sample over the picture: right if it does not align corners and clamps the coordinates to the box."""
    images, grids = pixels.float() / 255, []
    for top, left, h, w in boxes.tolist():
        if align_corners:
            y, x = top + torch.linspace(0, h - 1, size), left + torch.linspace(0, w - 1, size)
        else:
            y, x = ((torch.arange(size) + 0.5) * side / size - 0.5 for side in (h, w))
            y, x = (y.clamp(0, h - 1) + top, x.clamp(0, w - 1) + left) if clamped else (y + top, x + left)
        y, x = 2 * (y + 0.5) / images.shape[2] - 1, 2 * (x + 0.5) / images.shape[3] - 1
        grids.append(torch.stack([x.expand(size, size), y[:, None].expand(size, size)], -1))
    return F.grid_sample(images, torch.stack(grids), align_corners=False, padding_mode="border")


def test_crop_equals_torchvision():
    check_enlarging(crop)
    check_shrinking(crop)
    for height, width, size in ((32, 32, 16), (32, 32, 32), (9, 50, 12), (5, 4, 3), (8, 8, 1)):
        check_cutting(crop, height, width, size, low=0, high=50)  # some axes enlarged, some shrunk, some mirrored


def test_crop_mistakes_are_seen():
    check_enlarging(grid_crop)
    mistake(check_enlarging, lambda *a: grid_crop(*a, align_corners=True))
    mistake(check_enlarging, lambda *a: grid_crop(*a, clamped=False))
    mistake(check_shrinking, grid_crop)  # which has no antialiasing


@pytest.mark.parametrize("size", [8, 13, 20, 3])
def test_boxes_of_one_side_take_the_short_way_to_the_same_patches(size):
    pixels = pictures(20, 26)
    boxes = draw_boxes(len(pixels), 20, 26, (169 / 520, 169 / 520), (1, 1), seeded())
    assert boxes[:, 2:].eq(13).all()
    flip = torch.rand(len(pixels), generator=seeded(1)) < 0.5
    short = crop(pixels, boxes, size, flip)
    close(short, torchvision_crop(pixels, boxes, size, flip))
    close(crop(pixels / 255, boxes, size, flip), short)
    mixed = torch.cat([boxes, torch.tensor([[0, 0, 20, 26]])])  # one other box forbids the short way
    long = crop(torch.cat([pixels, pixels[:1]]), mixed, size, torch.cat([flip, flip[:1]]))[:-1]
    close(long, short, 1e-6)
    if size == 13:
        exact = [p[:, t : t + 13, x : x + 13].float() / 255 for p, (t, x, _, _) in zip(pixels, boxes, strict=True)]
        exact = [p.flip(-1) if mirrored else p for p, mirrored in zip(exact, flip, strict=True)]
        assert torch.equal(short, torch.stack(exact)) and torch.equal(long, short)


def test_boxes_may_share_an_image():
    pixels, image = pictures(12, 12), torch.tensor([3, 0, 0, 5, 0])
    boxes = draw_boxes(5, 12, 12, (0.2, 1), (0.5, 2), seeded())
    assert torch.equal(crop(pixels, boxes, 6, image=image), crop(pixels[image], boxes, 6))


def test_crop_keeps_full_precision_where_products_are_cheapened():
    pixels = pictures(32, 32)
    boxes = draw_boxes(len(pixels), 32, 32, (0.2, 1), (0.5, 2), seeded())
    expected, before = crop(pixels, boxes, 24), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(crop(pixels, boxes, 24), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("height, width, size", [(32, 32, 16), (32, 32, 48), (30, 41, 16), (50, 21, 21), (7, 7, 7)])
def test_centre_crop_equals_torchvision(height, width, size):
    pixels, side = pictures(height, width), min(height, width)
    square = [(height - side) // 2, (width - side) // 2, side, side]
    expected = torch.stack([reference.resized_crop(p / 255, *square, [size, size], antialias=True) for p in pixels])
    close(P.centre_crop(pixels, size), expected)
    if height == width == size:
        assert torch.equal(P.centre_crop(pixels, size), pixels / 255)


# ---------------------------------------------------------------------------------------------------- colouring


def torchvision_colour(patches, colour):
    done = []
    for m, patch in enumerate(patches):
        if colour.order is not None and colour.applied[m]:
            for kind in colour.order[m].tolist():
                patch = ADJUST[kind](patch, colour.factors[m, kind].item())
        if colour.grey is not None and colour.grey[m]:
            patch = reference.rgb_to_grayscale(patch, 3)
        if colour.blur is not None and colour.blur[m]:
            patch = reference.gaussian_blur(patch, [C.blur_kernel(patch.shape[-1])] * 2, [colour.sigma[m].item()] * 2)
        if colour.solarise is not None and colour.solarise[m]:
            patch = reference.solarize(patch, 128 / 255)
        done.append(patch)
    return torch.stack(done)


def all_true(n):
    return torch.ones(n, dtype=torch.bool)


def check_jitter(apply):
    """Every order on every picture, with factors beyond the customary ranges so that each clamp bites."""
    orders, n = ORDERS, len(ORDERS)
    for k, picture in enumerate(pictures(6, 6)[[0, 3, 4, 5, 7, 9, 10]] / 255):
        factors = torch.rand(n, 4, generator=seeded(k)) * 2
        factors[:, C.HUE] = factors[:, C.HUE] / 2 - 0.5
        patches = picture.expand(n, -1, -1, -1)
        colour = Colour(factors=factors, order=orders, applied=all_true(n))
        close(apply(patches, colour), torchvision_colour(patches, colour))


def test_jitter_equals_torchvision_in_every_order():
    check_jitter(apply_colour)


def test_jitter_mistakes_are_seen():
    def one_order(patches, colour):
        return apply_colour(patches, Colour(colour.factors, colour.order[:1].expand(len(patches), 4), colour.applied))

    def yiq_rotation(patches, colour):
        """Hue as a turn of the chroma plane of YIQ, which other libraries have."""
        to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        angle = 2 * math.pi * colour.factors[:, C.HUE]
        turn = torch.eye(3).repeat(len(patches), 1, 1)
        turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
        turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
        return torch.einsum("nij,njhw->nihw", to_yiq.inverse() @ turn @ to_yiq, patches).clamp(0, 1)

    mistake(check_jitter, one_order)
    mistake(lambda apply: check_adjustment(apply, C.HUE, 0.1), yiq_rotation)


def check_adjustment(apply, kind, factor):
    patches = torch.cat([pictures(8, 8) / 255, torch.rand(5, 3, 8, 8, generator=seeded())])
    n = len(patches)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1)
    factors[:, kind] = factor
    colour = Colour(factors=factors, order=ORDERS[:1].expand(n, 4), applied=all_true(n))
    close(apply(patches, colour), torch.stack([ADJUST[kind](patch, factor) for patch in patches]))


@pytest.mark.parametrize("kind", range(4))
def test_each_adjustment_equals_torchvision(kind):
    for factor in (-0.5, -0.3, -1 / 6, 0.0, 0.05, 1 / 3, 0.5) if kind == C.HUE else (0.0, 0.3, 1.0, 1.4, 3.0):
        check_adjustment(apply_colour, kind, factor)


@pytest.mark.parametrize("side", [2, 3, 16, 96])
def test_grey_blur_and_solarise_equal_torchvision(side):
    patches = pictures(side, side) / 255
    n = len(patches)
    sigma = torch.linspace(0.1, 2, n)
    half = torch.arange(n) % 2 == 0
    for some in (half, ~half):
        for colour in (Colour(grey=some), Colour(blur=some, sigma=sigma), Colour(solarise=some)):
            close(apply_colour(patches, colour), torchvision_colour(patches, colour))
            untouched = apply_colour(patches, colour)[~some]
            assert torch.equal(untouched, patches[~some])


def test_colour_leaves_its_input_and_the_patches_not_chosen_alone():
    patches = pictures(8, 8) / 255
    before, n = patches.clone(), len(patches)
    colour = draw_colour(n, Augmentation((1, 1), (1, 1), 8, **FULL | {"jitter": 1.0}), seeded())
    none = torch.zeros(n, dtype=torch.bool)
    out = apply_colour(patches, Colour(colour.factors, colour.order, none, none, none, colour.sigma, none))
    assert torch.equal(patches, before) and torch.equal(out, before)


def test_blur_and_solarise_of_those_drawn_alone_give_the_same_bits(monkeypatch):
    a = Augmentation((0.25, 0.25), (1, 1), 16, blur=0.4, solarise=0.4)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    some = augment(pixels, 4, a, seeded())
    monkeypatch.setattr(C, "_drawn", lambda mine: slice(None))
    assert torch.equal(augment(pixels, 4, a, seeded()), some)


def test_the_blur_kernel_is_a_tenth_of_the_side():
    assert [C.blur_kernel(side) for side in (2, 16, 32, 64, 96, 224)] == [3, 3, 3, 7, 11, 23]


# ---------------------------------------------------------------------------------------------------- the whole chain


def torchvision_chain(pixels, views, a, generator):
    """What `augment` does, patch by patch, with the parameters it draws in the order it draws them."""
    batch, _, height, width = pixels.shape
    n = views * batch
    boxes = draw_boxes(n, height, width, a.scale, a.ratio, generator)
    flip = chance(n, a.flip, generator)
    colour = draw_colour(n, a, generator)
    cut = torchvision_crop(pixels.repeat(views, 1, 1, 1), boxes, a.size, flip)
    dim = torchvision_colour(cut, Colour(**vars(colour) | {"solarise": None}))
    # a rounding error at the threshold is an error of 1/255 once solarised: those pixels are not compared
    clear = (dim - 128 / 255).abs() > 1e-5
    shape = (views, batch, 3, a.size, a.size)
    return torchvision_colour(cut, colour).view(shape), clear.view(shape)


@pytest.mark.parametrize("scale, ratio, size", [
    ((0.25, 0.25), (1, 1), 16), ((0.25, 0.25), (1, 1), 32), ((0.25, 0.25), (1, 1), 12),
    ((0.08, 1), (3 / 4, 4 / 3), 16), ((0.2, 1), (3 / 4, 4 / 3), 32),
])  # fmt: skip
def test_augment_equals_torchvision(scale, ratio, size):
    a = Augmentation(scale, ratio, size, **FULL)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), generator=seeded(5), dtype=torch.uint8)
    pixels[:11] = pictures(32, 32)
    patches = augment(pixels, 3, a, seeded(1))
    expected, clear = torchvision_chain(pixels, 3, a, seeded(1))
    assert clear.float().mean() > 0.9
    close(torch.where(clear, patches, expected), expected)
    assert patches.is_contiguous() and 0 <= patches.min() and patches.max() <= 1
    assert torch.equal(patches, augment(pixels, 3, a, seeded(1)))
    assert not torch.equal(patches, augment(pixels, 3, a, seeded(2)))


def test_views_lie_by_image_and_parts_do_not_matter(monkeypatch):
    shades = torch.arange(0, 250, 10, dtype=torch.uint8)
    pixels = shades[:, None, None, None].expand(-1, 3, 16, 20)
    for scale in ((0.25, 0.25), (0.1, 1)):
        patches = augment(pixels, 3, Augmentation(scale, (1, 1), 8), seeded())
        close(patches, (shades / 255)[None, :, None, None, None].expand_as(patches).clone(), 1e-6)
    noise, a = pictures(16, 20), Augmentation((0.1, 1), (0.5, 2), 8, **FULL)
    whole = augment(noise, 3, a, seeded())
    monkeypatch.setitem(P.PART, "cpu", 2500)
    close(augment(noise, 3, a, seeded()), whole, 2e-6)


@pytest.mark.parametrize(("scale", "ratio"), [((0.25, 0.25), (1, 1)), ((0.1, 1), (0.5, 2))])
def test_a_slice_of_the_draws_gives_the_same_slice_of_the_patches(scale, ratio):
    """To the bit, wherever the parts end that are worked on at a time."""
    a, pixels = Augmentation(scale, ratio, 12, **FULL), pictures(24, 20)[:7]
    draws = P.draw(3, 7, 24, 20, a, seeded())
    whole = P.apply(pixels, draws, 12)
    assert torch.equal(whole, augment(pixels, 3, a, seeded()))
    for images in (slice(0, 3), slice(3, 7), slice(5, 6)):
        assert torch.equal(P.apply(pixels[images], draws.of(images), 12), whole[:, images])
    # negative control: the draws of other images
    assert not torch.equal(P.apply(pixels[0:3], draws.of(slice(1, 4)), 12), whole[:, 0:3])


@pytest.mark.gpu
@pytest.mark.parametrize("ratio, size", [((1, 1), 16), ((1, 1), 32), ((3 / 4, 4 / 3), 32)])
def test_a_gpu_gives_the_same_patches(ratio, size):
    a = Augmentation((0.25, 0.25), ratio, size, **FULL | {"solarise": 0.0})
    pixels = pictures(32, 32)
    close(augment(pixels.cuda(), 4, a, seeded()).cpu(), augment(pixels, 4, a, seeded()))
    own = augment(pixels.cuda(), 4, a, torch.Generator("cuda").manual_seed(0))
    assert own.is_cuda and torch.equal(own, augment(pixels.cuda(), 4, a, torch.Generator("cuda").manual_seed(0)))


# ---------------------------------------------------------------------------------------------------- distributions

GEOMETRIES = [
    (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
    (32, 32, (0.2, 1.0), (0.999, 1.001)),
    (24, 60, (0.4, 1.0), (3 / 4, 4 / 3)),  # many tries fail, some patches fall back
    (60, 24, (0.9, 1.0), (3 / 4, 4 / 3)),  # all fall back
    (60, 24, (0.5, 0.9), (1, 3)),
    (32, 32, (0.25, 0.25), (1, 1)),
    (24, 60, (0.6, 0.6), (1, 1)),  # the square does not fit
]


def check_boxes(draw, geometry, n=3000):
    """Two samples, ours and torchvision's, of each side, the area, the ratio and the relative offsets."""
    height, width, scale, ratio = geometry
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(picture, list(scale), list(ratio)) for _ in range(n)])
    ours = draw(n, height, width, scale, ratio, seeded(1))
    assert ours.shape == (n, 4) and ours.dtype == torch.int64
    top, left, h, w = ours.T
    assert min(top.min(), left.min()) >= 0 and min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height and (left + w).max() <= width

    def measures(boxes):
        top, left, h, w = boxes.double().T
        yield from (top, left, h, w, h * w, w.log() - h.log())
        yield from (top / (height - h + 1), left / (width - w + 1), top * left)

    for our, their in zip(measures(ours), measures(theirs), strict=True):
        assert stats.ks_2samp(our.numpy(), their.numpy(), method="asymp").pvalue > RARE


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_boxes_have_torchvisions_distribution(geometry):
    check_boxes(draw_boxes, geometry)


def test_box_mistakes_are_seen():
    def linear_ratio(n, height, width, scale, ratio, generator):
        uniform = torch.linspace(*ratio, 50).tolist()
        boxes = [draw_boxes(n // 50, height, width, scale, (r, r + 1e-6), generator) for r in uniform]
        return torch.cat(boxes)

    def exclusive_offsets(n, height, width, scale, ratio, generator):
        boxes = draw_boxes(n, height - 1, width - 1, (0.25, 0.25), (1, 1), generator)
        boxes[:, 2:] = 16
        return boxes

    def one_box_per_batch(n, height, width, scale, ratio, generator):
        return draw_boxes(1, height, width, scale, ratio, generator).expand(n, 4)

    mistake(lambda draw: check_boxes(draw, GEOMETRIES[0]), linear_ratio)
    mistake(lambda draw: check_boxes(draw, GEOMETRIES[5]), one_box_per_batch)
    mistake(check_offsets, exclusive_offsets)


def check_offsets(draw):
    """A box of 16 x 16 in 32 x 32 lies at each of 17 x 17 places equally often, both ends included."""
    n, side = 17 * 17 * 40, (0.25, 0.25)
    top, left, h, w = draw(n, 32, 32, side, (1, 1), seeded(2)).T
    assert h.eq(16).all() and w.eq(16).all()
    assert stats.chisquare(torch.bincount(17 * top + left, minlength=17 * 17).numpy()).pvalue > RARE


def test_offsets_are_uniform_and_inclusive():
    check_offsets(draw_boxes)
    check_offsets(lambda n, h, w, scale, ratio, g: P.evaluation_boxes(10, n // 10, h, w, scale[0], g).view(n, 4))


def test_evaluation_boxes_are_nested():
    many = P.evaluation_boxes(64, 7, 20, 30, 0.1, seeded())
    assert many.shape == (64, 7, 4) and many.dtype == torch.int64
    assert many[..., 2:].eq(P.native_size(0.1, 20, 30)).all()
    for count in (1, 4, 16):
        assert torch.equal(P.evaluation_boxes(count, 7, 20, 30, 0.1, seeded()), many[:count])
    generator = seeded()
    halves = [P.evaluation_boxes(count, 7, 20, 30, 0.1, generator) for count in (10, 54)]
    assert torch.equal(torch.cat(halves), many)


def check_cells(draw):
    """Any two of three views lie on each of the 6 x 5 ordered pairs of different cells equally often; images differ."""
    n = 6 * 5 * 200
    boxes = draw(3, n, 16, 24, 8, 8, seeded(7))
    assert boxes.shape == (3, n, 4) and boxes.dtype == torch.int64 and boxes[..., 2:].eq(8).all()
    top, left = boxes[..., 0], boxes[..., 1]
    assert (top % 8).eq(0).all() and (left % 8).eq(0).all()
    cell = 3 * (top // 8) + left // 8
    for first, second in itertools.permutations(cell, 2):
        met = torch.bincount(6 * first + second, minlength=36).view(6, 6)
        assert met.diagonal().eq(0).all()
        assert stats.chisquare(met[~torch.eye(6, dtype=torch.bool)].numpy()).pvalue > RARE
    assert stats.chisquare(torch.bincount(6 * cell[0, ::2] + cell[0, 1::2], minlength=36).numpy()).pvalue > RARE


def test_views_on_a_grid_are_drawn_without_replacement():
    def with_replacement(views, batch, height, width, side, grid, generator):
        cells = P.grid_boxes(height, width, side, grid)
        return cells[torch.randint(len(cells), (views, batch), generator=generator)]

    def in_order(*shape):
        return P.draw_cells(*shape).sort(0).values

    check_cells(P.draw_cells)
    mistake(check_cells, with_replacement)
    mistake(check_cells, in_order)


def test_grid_boxes():
    assert P.grid_boxes(8, 12, 4, 4).tolist() == [[t, x, 4, 4] for t in (0, 4) for x in (0, 4, 8)]
    assert P.grid_boxes(8, 8, 5, 2).tolist() == [[t, x, 5, 5] for t in (0, 2) for x in (0, 2)]  # the rest is left


def test_native_size():
    assert [P.native_size(s, 32, 32) for s in (0.25, 0.2, 1.0, 1e-6)] == [16, 14, 32, 1]
    assert P.native_size(0.9, 24, 60) == 24


def check_orders(draw):
    """The 24 orders are equally frequent, and neighbours in a batch have independent ones."""
    order = draw(24 * 24 * 20, Augmentation((1, 1), (1, 1), 8, **FULL), seeded(3)).order
    assert torch.equal(order.sort(1).values, torch.arange(4).expand_as(order))
    number = (order[:, None] == ORDERS).all(2).int().argmax(1)
    pairs = torch.bincount(24 * number[::2] + number[1::2], minlength=24 * 24).view(24, 24)
    assert stats.chisquare(pairs.sum(0).numpy()).pvalue > RARE
    assert stats.chisquare(pairs.view(-1).numpy()).pvalue > RARE


def test_each_patch_draws_its_own_order():
    def one_per_batch(n, a, generator):
        drawn = draw_colour(n, a, generator)
        return Colour(**vars(drawn) | {"order": drawn.order[:1].expand(n, 4)})

    check_orders(draw_colour)
    mistake(check_orders, one_per_batch)


def check_factors(draw, strengths, n=3000):
    torch.manual_seed(1)
    jitter = ColorJitter(*strengths)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = torch.tensor([jitter.get_params(*ranges)[1:] for _ in range(n)])
    names = ("brightness", "contrast", "saturation", "hue")
    a = Augmentation((1, 1), (1, 1), 8, jitter=0.5, **dict(zip(names, strengths, strict=True)))
    ours = draw(n, a, seeded(4)).factors
    for kind in range(4):
        assert stats.ks_2samp(ours[:, kind].numpy(), theirs[:, kind].numpy()).pvalue > RARE
        low, high = ranges[kind]
        assert stats.kstest(((ours[:, kind] - low) / (high - low)).numpy(), "uniform").pvalue > RARE
    correlation = torch.corrcoef(ours.T) - torch.eye(4)
    assert correlation.abs().max() < stats.norm.isf(RARE / 2) / math.sqrt(n)


def test_factors_have_torchvisions_distribution():
    def log_uniform(n, a, generator):
        drawn = draw_colour(n, a, generator)
        high = 1 + torch.tensor([a.brightness, a.contrast, a.saturation])
        blends = ((2 * torch.rand(n, 3, generator=generator) - 1) * high.log()).exp()
        return Colour(**vars(drawn) | {"factors": torch.cat([blends, drawn.factors[:, 3:]], 1)})

    check_factors(draw_colour, (0.4, 0.8, 0.2, 0.1))
    check_factors(draw_colour, (1.5, 1.0, 2.0, 0.5))  # ranges cut off at 0
    mistake(lambda draw: check_factors(draw, (0.4, 0.8, 0.2, 0.1)), log_uniform)


def test_chances_and_sigma():
    n = 20000
    colour = draw_colour(n, Augmentation((1, 1), (1, 1), 8, **FULL), seeded(5))
    events = [colour.applied, colour.grey, colour.blur, colour.solarise]
    for event, probability in zip(events, (0.8, 0.2, 0.3, 0.3), strict=True):
        assert stats.binomtest(int(event.sum()), n, probability).pvalue > RARE
    correlation = torch.corrcoef(torch.stack(events).float()) - torch.eye(4)
    assert correlation.abs().max() < stats.norm.isf(RARE / 2) / math.sqrt(n)
    assert stats.kstest(((colour.sigma - 0.1) / 1.9).numpy(), "uniform").pvalue > RARE
    assert colour.sigma.min() >= 0.1 and colour.sigma.max() <= 2
    ramp = torch.arange(8, dtype=torch.uint8).expand(1, 3, 8, 8)
    patches = augment(ramp, n // 10, Augmentation((1, 1), (1, 1), 8, flip=0.3), seeded(6))
    flips = patches[:, 0, 0, 0, 0] > patches[:, 0, 0, 0, 1]
    assert stats.binomtest(int(flips.sum()), n // 10, 0.3).pvalue > RARE


def test_what_has_no_chance_is_not_drawn():
    plain = draw_colour(5, Augmentation((1, 1), (1, 1), 8), seeded())
    assert all(value is None for value in vars(plain).values())
    sure = draw_colour(50, Augmentation((1, 1), (1, 1), 8, jitter=1, grey=1, blur=1, solarise=1), seeded())
    assert all(event.all() for event in (sure.applied, sure.grey, sure.blur, sure.solarise))
    assert sure.factors[:, :3].eq(1).all() and sure.factors[:, 3].eq(0).all()


# ---------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("name, value", [
    ("scale", (0.5, 0.2)), ("scale", (0.0, 1.0)), ("scale", (0.5, 1.5)), ("scale", 0.25), ("scale", (0.25,)),
    ("scale", (0.1, math.nan)), ("scale", "ab"), ("ratio", (2, 1)), ("ratio", (0, 1)), ("ratio", (1, math.inf)),
    ("size", 0), ("size", 16.0), ("size", True), ("flip", -0.1), ("flip", 1.1), ("flip", None),
    ("brightness", -1), ("contrast", math.nan), ("saturation", "0.4"), ("hue", 0.6), ("hue", -0.1),
    ("jitter", 2), ("grey", math.nan), ("blur", -1), ("solarise", 1.5), ("solarise", True),
    ("grid", -8), ("grid", 8.0), ("grid", True),
])  # fmt: skip
def test_senseless_augmentations_are_refused(name, value):
    given = {"scale": (0.25, 0.25), "ratio": (1, 1), "size": 16, name: value}
    with pytest.raises(InputError, match=f"^{name} = [^\n]*$"):
        Augmentation(**given)


def test_other_wrong_input_is_refused():
    a = Augmentation([0.25, 0.25], [1, 1], 4)
    assert a.scale == (0.25, 0.25) and hash(a) is not None
    with pytest.raises(InputError, match="cannot be blurred"):
        Augmentation((0.25, 0.25), (1, 1), 1, blur=0.5)
    for pixels in (torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(0, 3, 8, 8).byte()):
        with pytest.raises(InputError, match="give uint8"):
            augment(pixels, 2, a, seeded())
    with pytest.raises(InputError, match="grid = 4: only square patches of one fixed scale"):
        Augmentation((0.25, 0.5), (1, 1), 4, grid=4)
    with pytest.raises(InputError, match="5 views do not fit on 4 different cells"):
        augment(pictures(8, 8), 5, Augmentation((0.25, 0.25), (1, 1), 4, grid=4), seeded())
    with pytest.raises(InputError, match="views = 0"):
        augment(pictures(8, 8), 0, a, seeded())
