"""Measures of locality on features with known answers, each beside a control that comes out otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn

from bagssl import bags, patches
from bagssl.errors import InputError
from bagssl.study import claims, figures, locality

pytestmark = pytest.mark.usefixtures("one_thread")

COLOUR = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # a linear encoder: the mean colour
PIXEL = nn.Flatten()
KS = [1, 2, 4, 8, 16, 32, 64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(count: int, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def nested(drawn: Tensor) -> dict[int, Tensor]:
    """Bags of the first K of drawn [patches, images, dim]."""
    return {k: drawn[:k].mean(dim=0) for k in KS if k <= len(drawn)}


def random_boxes(count: int, n: int, side: int = 16) -> Tensor:
    return patches.evaluation_boxes(count, n, side, side, 0.25, torch.Generator().manual_seed(3))


# ---- intervals


def test_an_interval_has_the_width_that_theory_says_and_a_paired_one_is_narrower():
    common, own = normal(900, seed=1).numpy(), 0.1 * normal(900, seed=2).numpy()
    found = locality.estimate(locality.share(common))
    assert found.value == pytest.approx(common.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * common.std() / 30, rel=0.15)
    a, b = locality.share(common + own), locality.share(common)
    paired = locality.estimate(a, minus=b)
    assert paired.value == pytest.approx(own.mean()) and paired.high - paired.low < 0.03
    unpaired = locality.estimate(a, minus=locality.share(common[::-1]))  # the control: other images
    assert unpaired.high - unpaired.low > 0.1


def test_a_ratio_is_that_of_the_means_not_the_mean_of_ratios():
    over, under = np.array([1.0, 4.0]), np.array([1.0, 2.0])
    found = locality.estimate(locality.Ratio(over, under)).value
    assert found == pytest.approx(5 / 3) and (over / under).mean() == 1.5


def test_another_image_is_never_the_same():
    for count in (2, 3, 50):
        other = locality.another(count, seed=count)
        assert (other != torch.arange(count)).all() and sorted(other.tolist()) == list(range(count))
    with pytest.raises(InputError, match="two images"):
        locality.another(1)


# ---- convergence


def tiled(encoder: nn.Module) -> dict[int, Tensor]:
    pixels = noise(20)
    boxes = patches.grid_boxes(16, 16, 4, 4)[:, None].expand(-1, 20, -1)
    whole = bags.embed_bags(encoder, pixels, [0], scale=1, size=16)[0]
    return {0: whole, 16: bags.patch_embeddings(encoder, pixels, boxes, 4).mean(dim=0)}


class Contrast(nn.Module):
    """A non-linear encoder: the standard deviation of each colour."""

    def forward(self, x: Tensor) -> Tensor:
        return x.std(dim=(2, 3))


def test_a_linear_encoder_embeds_the_whole_as_the_mean_of_its_tiles():
    frame = locality.convergence(tiled(COLOUR))
    own, other = (frame[frame["patches"] == name] for name in ("own", "another image's"))
    assert len(own) == len(other) == 2 * 20
    assert own["cosine"].min() > 1 - 1e-6 and own["error"].max() < 1e-4
    assert other[other["centred"]]["cosine"].mean() < 0.3 and other[other["centred"]]["error"].min() > 0.1
    frame = locality.convergence(tiled(Contrast()))  # the control: another encoder
    assert frame[frame["patches"] == "own"]["error"].median() > 0.02


def test_a_constant_inflates_the_raw_cosine_and_leaves_the_centred_one():
    embedded = {k: normal(30, 8, seed=k) for k in (0, 1, 4)}
    plain = locality.convergence(embedded)
    moved = locality.convergence({k: h + 50 for k, h in embedded.items()})
    centred = plain["centred"]
    np.testing.assert_allclose(plain[centred]["cosine"], moved[centred]["cosine"], atol=1e-9)
    assert moved[~centred]["cosine"].min() > 0.99 and plain[~centred]["cosine"].abs().mean() < 0.5


def test_each_number_of_the_frame_is_the_plain_one():
    embedded = {k: normal(5, 3, seed=k) for k in (0, 1, 4)}
    frame = locality.convergence(embedded)
    (row,) = frame.query("image == 2 and k == 1 and patches == 'own' and centred").to_dict("records")
    whole = (embedded[0] - embedded[0].mean(0))[2].numpy()
    mean = (embedded[1] - embedded[4].mean(0))[2].numpy()
    assert row["cosine"] == pytest.approx(whole @ mean / np.linalg.norm(whole) / np.linalg.norm(mean))
    assert row["error"] == pytest.approx(np.linalg.norm(mean - whole) / np.linalg.norm(whole))


def test_independent_patches_converge_with_the_exponent_one_half():
    drawn = normal(64, 400, 16)
    ks, squared = locality.sampling_error(nested(drawn))
    assert ks == KS[:-1] and squared.shape == (400, 6)
    np.testing.assert_allclose(squared.mean(axis=0), 16 / np.array(ks), rtol=0.05)  # one per dimension
    found = locality.exponent(ks, squared)
    assert found.low < -0.5 < found.high and found.high - found.low < 0.05
    growing = drawn * torch.arange(1, 65)[:, None, None] ** 0.25  # the control: ever noisier patches
    assert -0.35 < locality.exponent(*locality.sampling_error(nested(growing))).value < -0.2
    with pytest.raises(InputError, match="K, 2K"):
        locality.sampling_error({1: drawn[0], 16: drawn[1]})


def test_what_levels_off_is_told_from_what_falls():
    centre, drawn = normal(400, 16, seed=1), 2 * normal(64, 400, 16)
    embedded = {0: centre + 0.5 * normal(400, 16, seed=2), **nested(drawn + centre)}
    stays, falls = locality.levelling(embedded)
    assert stays.value == pytest.approx(16 / 4, rel=0.1) and falls.value == pytest.approx(4 * 16, rel=0.05)
    assert stays.low < 4 < stays.high
    ks, squared = locality.whole_error(embedded)
    np.testing.assert_allclose(squared.mean(axis=0), stays.value + falls.value / np.array(ks), rtol=0.1)
    embedded[0] = centre  # the control: nothing stays
    assert abs(locality.levelling(embedded)[0].value) < 0.3


def test_nearness_is_that_of_the_largest_bags_and_its_control():
    drawn, centre = normal(64, 200, 16), normal(200, 16, seed=1)
    embedded = [{0: centre, **nested(drawn + kept * centre)} for kept in (1, 0)]
    near, far = map(locality.convergence, embedded)
    cosine, over_other, over_control = locality.nearness(near, far).values()
    mean, whole = (embedded[0][k] - embedded[0][k].mean(0) for k in (64, 0))
    assert cosine.value == pytest.approx(torch.cosine_similarity(mean, whole).mean().item()) and cosine.value > 0.95
    assert cosine.low < cosine.value < cosine.high and over_other.value > 0.8 and over_control.value > 0.8
    # the control: an encoder whose patches say nothing of the whole, compared with itself
    nothing, _, itself = locality.nearness(far, far).values()
    assert abs(nothing.value) < 0.1 and itself.value == 0


# ---- position


def test_position_is_decoded_where_the_image_shows_it_and_only_there():
    column = torch.arange(16).expand(16, 16)
    ramp = torch.stack([column, column.T, torch.zeros_like(column)]).mul(16).byte()
    boxes = random_boxes(8, 60)
    shown = bags.patch_embeddings(COLOUR, ramp.expand(60, -1, -1, -1), boxes, 8)
    assert locality.estimate(locality.position(shown, boxes)).value > 0.9999
    hidden = bags.patch_embeddings(COLOUR, noise(60), boxes, 8)
    found = locality.estimate(locality.position(hidden, boxes))
    assert found.value < 0.05 and found.low < 0


def test_r2_is_that_of_least_squares_and_scikit_learn():
    boxes = random_boxes(16, 80)
    centres = (boxes[..., :2] + boxes[..., 2:] / 2).double()
    features = torch.cat([centres + normal(16, 80, 2), normal(16, 80, 3, seed=1)], dim=2)
    found = locality.position(features, boxes, seed=5)
    train, test = torch.randperm(80, generator=torch.Generator().manual_seed(5)).tensor_split(2)
    x, y = features.numpy(), centres.numpy()

    def design(index: Tensor) -> np.ndarray:
        return np.column_stack([x[:, index].reshape(-1, 5), np.ones(16 * len(index))])

    weights = np.linalg.lstsq(design(train), y[:, train].reshape(-1, 2), rcond=None)[0]
    expected = r2_score(y[:, test].reshape(-1, 2), design(test) @ weights, multioutput="variance_weighted")
    assert locality.estimate(found).value == pytest.approx(expected, abs=2e-3) and 0.5 < expected < 0.95
    # the control: which image a patch comes from tells nothing of where it lies in it
    image = torch.eye(80, dtype=torch.float64).expand(16, -1, -1)
    assert locality.estimate(locality.position(image, boxes)).value < 0.05


# ---- neighbours

LABELS = torch.arange(12) % 3


def by_hand(features: Tensor, labels: Tensor, boxes: Tensor, k: int) -> dict[str, float]:
    """The shares, patch by patch."""
    count, n = features.shape[:2]
    x = features - features.mean(dim=(0, 1))
    every = [(p, i) for p in range(count) for i in range(n)]
    cosine = {(a, b): float(x[a] @ x[b] / x[a].norm() / x[b].norm()) for a in every for b in every if a != b}

    def ranked(q: tuple[int, int], allowed) -> list[tuple[int, int]]:
        return sorted((o for o in every if o != q and allowed(o)), key=lambda o: -cosine[q, o])

    def offset(q: tuple[int, int], o: tuple[int, int]) -> Tensor:
        return (boxes[q][:2] - boxes[o][:2]).double().abs()

    def judged(q: tuple[int, int]) -> list[float]:
        side, others = int(boxes[q][2]), ranked(q, lambda o: o[1] != q[1])[:k]
        apart = ranked(q, lambda o: o[1] != q[1] or bool((offset(q, o) >= side).any()))
        near = np.mean([float(offset(q, o).norm()) <= side / 2 for o in others])
        kind = np.mean([bool(labels[o[1]] == labels[q[1]]) for o in others])
        return [ranked(q, lambda o: True)[0][1] == q[1], apart[0][1] == q[1], kind, near]

    names = ("same image", "same image, apart", "same class", "same position")
    return dict(zip(names, np.mean([judged(q) for q in every], axis=0), strict=True))


def shares(found: dict) -> dict[str, float]:
    return {name: locality.estimate(own).value for name, (own, _) in found.items()}


def chances(found: dict) -> dict[str, float]:
    return {name: locality.estimate(chance).value for name, (_, chance) in found.items()}


def test_neighbours_are_those_found_patch_by_patch():
    boxes, image = random_boxes(5, 12), normal(12, 6, seed=4)
    features = normal(5, 12, 6) + 0.7 * image  # between the patch and its image
    found = locality.neighbours(features, LABELS, boxes, k=4)
    assert shares(found) == pytest.approx(by_hand(features, LABELS, boxes, 4))
    assert 0 < shares(found)["same image"] < 1
    assert chances(found)["same image"] == pytest.approx(4 / 59)
    assert chances(found)["same class"] == pytest.approx(15 / 55)


def test_features_that_show_one_thing_alone_have_neighbours_that_share_it():
    boxes, jitter = random_boxes(8, 60), 0.01 * normal(8, 60, 60)
    labels = torch.arange(60) % 3
    image = locality.neighbours(torch.eye(60).expand(8, -1, -1) + jitter, labels, boxes)
    assert shares(image)["same image"] == 1 and shares(image)["same class"] < 0.5
    kind = torch.eye(3)[labels].expand(8, -1, -1) + jitter[..., :3]
    kind = shares(locality.neighbours(kind, labels, boxes))
    assert kind["same class"] == 1 and kind["same image"] < 0.2
    cell = nn.functional.one_hot(boxes[..., 0] // 3 * 3 + boxes[..., 1] // 3, 9)  # 3 px wide, of 9 offsets
    place = shares(locality.neighbours(cell + jitter[..., :9], labels, boxes))
    assert place["same position"] == 1 and place["same class"] < 0.5
    # the control: features that show nothing have neighbours by chance
    nothing = locality.neighbours(normal(8, 60, 5), labels, boxes)
    assert shares(nothing) == pytest.approx(chances(nothing), abs=0.05)
    assert chances(nothing)["same position"] == pytest.approx(chances(image)["same position"])


def test_the_block_size_does_not_matter_and_bags_have_no_place(monkeypatch):
    features = normal(2, 40, 5)
    labels = torch.arange(40) % 4
    whole = locality.neighbours(features, labels, k=3)
    assert set(whole) == {"same image", "same class"}
    monkeypatch.setattr(locality, "BLOCK", 500)
    assert shares(locality.neighbours(features, labels, k=3)) == pytest.approx(shares(whole))
    with pytest.raises(InputError, match="too few for k = 79"):
        locality.neighbours(features, labels, k=79)


def test_nearest_shows_each_image_once_and_never_the_querys_own():
    features = normal(6, 10, 4)
    features[3, 7] = features[2, 4]  # a copy
    found, images = locality.nearest(features, 2, 4, 5)
    assert (found[0], images[0]) == (3, 7) and 4 not in images and len(set(images.tolist())) == 5


# ---- changes


def test_changes_do_what_their_names_say_and_stay_inside():
    pixels = noise(40, 32)
    boxes = locality.inner_boxes(6, pixels, 0.2, [1, 4])
    before = bags.patch_embeddings(PIXEL, pixels, boxes, 14).view(6, 40, 3, 14, 14)
    changed = locality.changes(pixels, boxes, [1, 4])
    assert list(changed) == ["shift 1 px", "shift 4 px", "scale", "colour", "flip"]
    for _, moved in changed.values():
        assert moved[..., :2].min() >= 0 and (moved[..., :2] + moved[..., 2:]).max() <= 32
    after = {n: bags.patch_embeddings(PIXEL, *c, 14).view_as(before) for n, c in changed.items()}
    assert torch.equal(after["flip"], before.flip(4)) and not torch.equal(after["flip"], before)
    step = changed["shift 4 px"][1] - boxes
    assert (step.abs().sum(dim=2) == 4).all() and (step == step[:1]).all() and len(step[0].unique(dim=0)) == 4
    down = step[0, :, 0] == 4
    assert torch.equal(after["shift 4 px"][:, down, :, :-4], before[:, down, :, 4:])
    sides = changed["scale"][1][..., 2]
    assert set(sides.unique().tolist()) == {10, 20} and (sides == sides[:1]).all()
    middle = (changed["scale"][1] - boxes)[..., :2] * 2 + sides[..., None] - 14
    assert middle.abs().max() <= 1  # half a pixel
    assert torch.equal(changed["colour"][1], boxes) and (after["colour"] - before).abs().mean() > 0.05
    # the control: boxes drawn anywhere would leave the image
    loose = patches.evaluation_boxes(6, 40, 32, 32, 0.2, torch.Generator().manual_seed(0))
    assert locality.changes(pixels, loose, [4])["shift 4 px"][1].min() < 0
    with pytest.raises(InputError, match="no room"):
        locality.inner_boxes(2, pixels, 0.6, [1, 4])


def test_sensitivity_is_0_for_what_is_kept_and_1_for_what_is_lost():
    pixels = noise(60, 32)
    boxes = locality.inner_boxes(4, pixels, 0.2, [4])
    changed = locality.changes(pixels, boxes, [4])

    def found(encoder: nn.Module, name: str) -> float:
        before, after = (bags.patch_embeddings(encoder, *c, 14) for c in ((pixels, boxes), changed[name]))
        return locality.estimate(locality.sensitivity(before, after)).value

    assert found(COLOUR, "flip") == pytest.approx(0, abs=1e-3) and found(COLOUR, "shift 4 px") > 0.02
    assert found(PIXEL, "flip") == pytest.approx(1, abs=0.05)  # noise and its mirror image are unrelated
    assert found(PIXEL, "shift 4 px") == pytest.approx(1, abs=0.05)
    before, unrelated = normal(4, 200, 8), normal(4, 200, 8, seed=1)
    assert locality.estimate(locality.sensitivity(before, unrelated)).value == pytest.approx(1, abs=0.05)
    assert locality.estimate(locality.sensitivity(before, -before)).value == pytest.approx(2, abs=0.1)
    moved = locality.sensitivity(before + 50, unrelated + 50)  # raw cosines would all be 1, and 0 over 0 anything
    np.testing.assert_allclose(moved.over, locality.sensitivity(before, unrelated).over, atol=1e-9)


def test_projections_are_those_of_the_embeddings():
    head, pixels, boxes = nn.Linear(3, 5).eval(), noise(6), random_boxes(4, 6)
    found = locality.features(COLOUR, head, pixels, boxes, 8)
    both = bags.patch_embeddings(nn.Sequential(COLOUR, head), pixels, boxes, 8)
    assert found["h"].shape == (4, 6, 3) and torch.allclose(found["z"], both, atol=1e-5)


def test_without_a_projector_there_is_h_alone():
    pixels, boxes = noise(12, 24), random_boxes(4, 12, 24)
    assert set(locality.features(COLOUR, None, pixels, boxes, 8)) == {"h"}
    how = {"scale": 0.2, "size": 8, "count": 2, "shifts": [1], "k": 2, "progress": False}
    alone, both = (locality.measures(COLOUR, head, pixels, LABELS, **how) for head in (None, nn.Identity()))
    assert set(alone) == {key for key in both if key[0] == "h"} and len(both) == 2 * len(alone)
    assert all(np.array_equal(alone[key].over, both[key].over) for key in alone)


def test_whitening_makes_spaces_equal_that_differ_in_their_axes_alone():
    before, change = normal(8, 200, 6), normal(8, 200, 6, seed=1)
    change[..., 0] = 0  # the first axis is kept, the others are not
    mixed = normal(6, 6, seed=2) * torch.tensor([10.0, 1, 1, 1, 1, 1]).double()[:, None]

    def found(*pair: Tensor) -> float:
        return locality.estimate(locality.sensitivity(*pair)).value

    spaces = [(before, before + change), (before @ mixed + 3, (before + change) @ mixed + 3)]
    plain, white = ([found(*each(*pair)) for pair in spaces] for each in (lambda *x: x, locality.whitened))
    assert white[0] == pytest.approx(white[1], rel=1e-6)
    assert plain[1] < 0.7 * plain[0]  # the control: a cosine listens to the loud axis, which is kept
    flat = locality.whitened(*spaces[1])[0].flatten(0, 1)
    assert torch.allclose(torch.cov(flat.T), torch.eye(6).double(), atol=1e-9)


def test_all_measures_of_a_colour_encoder_are_what_its_pictures_say():
    shade = torch.arange(60)[:, None, None, None] * 4  # images of one colour each, but for a column's ramp
    ramp = torch.arange(32)[None, None, None, :] * torch.tensor([0, 0, 4])[None, :, None, None]
    pixels = (shade * torch.tensor([1, 0, 0])[None, :, None, None] + ramp).expand(60, 3, 32, 32).byte()
    how = {"scale": 0.2, "size": 14, "shifts": [4], "progress": False}
    table = locality.measures(COLOUR, nn.Identity(), pixels, torch.arange(60) // 20, **how)
    value = {key: locality.estimate(measure).value for key, measure in table.items()}
    assert {key[:2] for key in value} == {("h", "patch"), ("h", "bag"), ("z", "patch"), ("z", "bag")}
    assert all(value["z", *key[1:]] == found for key, found in value.items() if key[0] == "h")
    assert value["h", "patch", "position R2"] == pytest.approx(0.5, abs=0.05)  # the columns, not the rows
    assert value["h", "bag", "same class"] > 2 * value["h", "bag", "same class by chance"] - 0.05
    assert value["h", "patch", "flip sensitivity"] == pytest.approx(0, abs=1e-5)
    assert value["h", "patch", "shift 4 px sensitivity"] > 10 * value["h", "patch", "flip sensitivity"] + 1e-3


def test_claims_c5_and_c6_are_asked_of_the_measures_that_they_name():
    """A table in which h knows more than z by what is written, against one where it is the other way."""
    def ratio(value):
        return locality.share(np.full(20, value))

    shift, flipped = "shift 4 px sensitivity", {"h": "z", "z": "h"}
    measured = {("h", "patch", "position R2"): ratio(0.5), ("z", "patch", "position R2"): ratio(0.2),
                ("h", "patch", "same class"): ratio(0.3), ("h", "patch", "same class by chance"): ratio(0.1),
                ("h", "bag", shift): ratio(0.1)}  # fmt: skip
    for name, more in ((shift, 0.3), ("scale sensitivity", 0.2), ("colour sensitivity", 0.1)):
        for how in ("", ", whitened"):
            measured |= {("h", "patch", name + how): ratio(0.4), ("z", "patch", name + how): ratio(0.4 - more)}
    found = {(claim, measure): each.value for claim, measure, each in locality.evidence(measured, 4)}
    asked = {("C5", "position R2 of patches"): 0.5, ("C5", "neighbours of the same class over chance"): 0.2,
             ("C5", "shift sensitivity, patch over bag"): 0.3, ("C6", "position R2, h over z"): 0.3,
             ("C6", "shift sensitivity, h over z"): 0.3, ("C6", "scale sensitivity, h over z"): 0.2,
             ("C6", "colour sensitivity, h over z"): 0.1}  # fmt: skip
    assert found.keys() > asked.keys() and all(found[key] == pytest.approx(value) for key, value in asked.items())
    assert {measure for claim, measure in asked if claim == "C6"} == {
        each.measure for each in claims.CLAIMS["C6"].conditions}
    assert {measure for claim, measure in asked if claim == "C5"} == {
        each.measure for each in claims.CLAIMS["C5"].conditions}
    other = {(flipped[key[0]], *key[1:]): value for key, value in measured.items()}
    turned = {measure: each.value for claim, measure, each in locality.evidence(other | {
        ("h", "bag", shift): ratio(0.1)}, 4) if claim == "C6"}  # fmt: skip
    assert all(turned[measure] == pytest.approx(-value) for (claim, measure), value in asked.items() if claim == "C6")
    alone = {key: value for key, value in measured.items() if key[0] == "h"}
    assert {claim for claim, *_ in locality.evidence(alone, 4)} == {"C5"}


# ---- pictures


def test_pictures_mark_the_patches_and_lay_the_maps_where_their_centres_are():
    pixels, boxes = noise(6, 12).view(2, 3, 3, 12, 12), random_boxes(3, 2, 12).transpose(0, 1)
    figure = figures.gallery(pixels, boxes, [["A", "B", "A"], ["B", "A", "C"]], "Nearest")
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 6 and [len(axis.patches) for axis in shown] == [2] * 6
    assert shown[4].patches[1].get_xy() == (boxes[1, 1, 1] - 0.5, boxes[1, 1, 0] - 0.5)
    bold = [axis.title.get_text() for axis in shown if axis.title.get_fontweight() == "bold"]
    assert bold == ["A"]  # the one neighbour of the query's class
    assert not figures.gallery(pixels, None, [["A"] * 3] * 2, "Nearest").axes[0].patches
    maps = {"h": np.linspace(-1, 1, 3 * 4 * 4).reshape(3, 4, 4)}  # 6 px in 12 px, every 2 px
    axis = figures.similarity_maps(pixels[0], maps, [2, 4, 6, 6], 2).axes[4]  # row 2, image 2
    left, right, bottom, top = axis.images[1].get_extent()
    assert (left + right) / 2 == (bottom + top) / 2 == 5.5  # the centre of the image, in pixels from 0 to 11
    assert (left + 1, right - 1) == (2.5, 8.5)  # the centres of the first patch and of the last
    np.testing.assert_array_equal(axis.images[1].get_array(), maps["h"][1])
