"""Bags against the plain way: one patch, one forward pass at a time, with the batch-norm where it was."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from bagssl import bags, patches
from bagssl.augmentation import Augmentation
from bagssl.colours import apply_colour, draw_colour
from bagssl.encoders import build_encoder
from bagssl.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

KS = (0, 1, 3, 8)
OPTIONS = {"scale": 0.25, "size": 8}


def lived_in(module: nn.Module) -> nn.Module:
    """Batch-norm as it is after training: statistics, gains and shifts that are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.running_mean, -0.3, 0.3),
                (layer.running_var, 0.5, 2),
                (layer.weight.data, 0.5, 1.5),
                (layer.bias.data, -0.3, 0.3),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return module.eval()


PIXELS = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
ENCODER = lived_in(build_encoder("resnet10", 4))
LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).eval()


def boxes(count: int) -> torch.Tensor:
    return patches.evaluation_boxes(count, 6, 16, 16, 0.25, torch.Generator().manual_seed(0))


@torch.no_grad()
def plainly(encoder: nn.Module, k: int) -> torch.Tensor:
    if k == 0:
        return encoder(patches.centre_crop(PIXELS, 8))
    cut = [patches.crop(PIXELS, patch, 8) for patch in boxes(k)]
    return torch.stack([torch.stack([encoder(c[i : i + 1])[0] for c in cut]).mean(0) for i in range(6)])


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def test_one_pass_equals_the_plain_way():
    ours = bags.embed_bags(ENCODER, PIXELS, KS, **OPTIONS)
    assert list(ours) == list(KS)
    for k in KS:
        assert ours[k].dtype == torch.float32 and ours[k].shape == (6, ENCODER.dim)
        assert close(ours[k], plainly(ENCODER, k))
    assert not close(ours[3], ours[8], 1e-2) and not close(ours[0], ours[8], 1e-2)
    ours[8].requires_grad_()  # an ordinary tensor, not one of inference mode


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 9, 20, 1000])
def test_the_batch_size_does_not_matter(batch):
    whole = bags.embed_bags(ENCODER, PIXELS, KS, **OPTIONS)
    cut = bags.embed_bags(ENCODER, PIXELS, KS, **OPTIONS, batch=batch)
    assert all(close(cut[k], whole[k], 1e-5) for k in KS)


def test_bags_are_nested_and_follow_from_the_seed():
    many = bags.embed_bags(LINEAR, PIXELS, [16, 64], **OPTIONS)
    assert list(many) == [16, 64]
    assert close(bags.embed_bags(LINEAR, PIXELS, [16], **OPTIONS)[16], many[16], 1e-6)
    assert close(bags.embed_bags(LINEAR, PIXELS, [16, 16], **OPTIONS)[16], many[16], 1e-6)
    assert not close(bags.embed_bags(LINEAR, PIXELS, [16], **OPTIONS, seed=1)[16], many[16], 1e-3)


def test_a_linear_encoder_embeds_the_bag_as_it_embeds_the_mean_patch():
    mean = torch.stack([patches.crop(PIXELS, patch, 8) for patch in boxes(8)]).mean(0)
    ours = bags.embed_bags(LINEAR, PIXELS, [8], **OPTIONS)[8]
    with torch.no_grad():
        assert close(ours, LINEAR(mean))
        assert not close(bags.embed_bags(ENCODER, PIXELS, [8], **OPTIONS)[8], ENCODER(mean), 1e-3)


COLOURS = Augmentation((0.25, 0.25), (1.0, 1.0), 8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8,
                       grey=0.2, solarise=0.3)  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3, 7, 1000])
def test_patches_are_coloured_as_in_training_if_that_is_asked_for(batch):
    """The plain way: each patch drawn, cut and coloured in its turn. The centre crop, and what is not asked, is not."""
    generator, cut = torch.Generator().manual_seed(bags.COLOUR), []
    for patch in boxes(8):
        cut.append(apply_colour(patches.crop(PIXELS, patch, 8), draw_colour(6, COLOURS, generator)))
    with torch.no_grad():
        each = torch.stack([ENCODER(patch) for patch in cut])
    ours = bags.embed_bags(ENCODER, PIXELS, [0, 3, 8], **OPTIONS, colour=COLOURS, batch=batch)
    plain = bags.embed_bags(ENCODER, PIXELS, [0, 3, 8], **OPTIONS)
    assert all(close(ours[k], each[:k].mean(0)) and not close(ours[k], plain[k], 1e-2) for k in (3, 8))
    assert close(ours[0], plain[0])
    none = Augmentation((0.25, 0.25), (1.0, 1.0), 8)
    assert close(bags.embed_bags(ENCODER, PIXELS, [8], **OPTIONS, colour=none)[8], plain[8])


def test_the_colour_of_a_patch_does_not_follow_from_its_place():
    """Though both follow from the seed. Of one stream of numbers, the brightest patches would be the lowest."""
    coloured = Augmentation((0.25, 0.25), (1.0, 1.0), 8, brightness=0.4, contrast=0.4, jitter=1.0)
    pixels = torch.zeros(2000, 3, 32, 32)
    place = bags._boxes(pixels, 2, 0.25, seed=0).float()[..., :2]

    def related(seed):
        factors = bags._colours(len(pixels), 2, coloured, seed).factors
        both = torch.cat([place[0].T, place[1].T, factors[0, :, :2].T, factors[1, :, :2].T])
        return torch.corrcoef(both)[:4, 4:].abs().max()

    assert related(0) < 0.1 and related(-bags.COLOUR) > 0.9  # negative control: the boxes' own seed


def test_the_whole_image_has_no_patch_to_be_coloured_and_k_may_be_a_whole_float():
    once, four = (bags.embed_bags(ENCODER, PIXELS, [k], **OPTIONS)[k] for k in (0, 4))
    assert close(bags.embed_bags(ENCODER, PIXELS, [0], **OPTIONS, colour=COLOURS)[0], once)
    assert torch.equal(bags.embed_bags(ENCODER, PIXELS, [4.0], **OPTIONS)[4], four)


def test_k_0_is_the_whole_image_once():
    whole = bags.embed_bags(nn.Flatten(), PIXELS, [0], scale=0.25, size=16, batch=4)[0]
    assert torch.equal(whole, PIXELS.flatten(1) / 255)


def test_one_image_has_bags_too():
    alone, among = (bags.embed_bags(LINEAR, pixels, [0, 4], **OPTIONS) for pixels in (PIXELS[:1], PIXELS))
    assert alone[4].shape == among[4][:1].shape and torch.isfinite(alone[4]).all()
    assert torch.allclose(alone[0], among[0][:1], atol=1e-6)


def test_single_patches_are_those_of_the_bag():
    single = bags.patch_embeddings(ENCODER, PIXELS, boxes(8), 8)
    ours = bags.embed_bags(ENCODER, PIXELS, KS, **OPTIONS)
    assert single.shape == (8, 6, ENCODER.dim)
    assert all(close(single[:k].mean(0), ours[k]) for k in KS[1:])
    assert close(bags.patch_embeddings(ENCODER, PIXELS, boxes(8), 8, batch=5), single)


def test_single_patches_may_differ_in_size():
    wide = boxes(2).clone()
    wide[1] = torch.tensor([0, 0, 16, 16])
    single = bags.patch_embeddings(nn.Flatten(), PIXELS, wide, 8)
    assert close(single[1], patches.centre_crop(PIXELS, 8).flatten(1))
    assert close(single[0], patches.crop(PIXELS, wide[0], 8).flatten(1))


def test_the_callers_encoder_stays_as_it_is_and_its_mode_does_not_matter():
    encoder = copy.deepcopy(ENCODER)
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    ours = bags.embed_bags(encoder, PIXELS, [8], **OPTIONS)[8]
    assert close(ours, plainly(ENCODER, 8))
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    # the control: batch statistics would have given something else
    assert not close(encoder(patches.centre_crop(PIXELS, 8)), plainly(ENCODER, 0), 1e-2)


def test_projections_come_from_encoder_and_projector_in_a_row():
    head = nn.Sequential(nn.Linear(ENCODER.dim, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5))
    both = nn.Sequential(ENCODER, head).eval()
    assert close(bags.embed_bags(both, PIXELS, [3], **OPTIONS)[3], plainly(both, 3))


@pytest.mark.parametrize("name", ["ours", "basic", "bottleneck"])
def test_batch_norm_folds_exactly(name):
    blocks = {"basic": BasicBlock, "bottleneck": Bottleneck}
    plain = lived_in(build_encoder("resnet18", 4) if name == "ours" else ResNet(blocks[name], [1, 1, 2, 1]))
    folded = bags.fold_batch_norm(plain)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert close(folded(x), plain(x), 1e-5)
        assert close(bags.fold_batch_norm(plain.double())(x.double()), plain(x.double()), 1e-10)
        # the control: without the statistics it is another network
        for layer in plain.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.zero_()
        assert not close(plain(x.double()), folded.double()(x.double()), 1e-3)


class NormFirst(BasicBlock):
    """The names of a ResNet, called in the order of a pre-activation ResNet: folding it would be wrong."""

    def forward(self, x):
        return (x + self.conv2(self.bn2(self.conv1(self.bn1(x))).relu())).flatten(1)


def test_an_encoder_that_must_not_be_folded_is_not():
    encoder = lived_in(NormFirst(3, 3))
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert not close(bags.fold_batch_norm(encoder)(x), encoder(x), 1e-2)
    assert close(bags.embed_bags(encoder, PIXELS, [3], **OPTIONS)[3], plainly(encoder, 3))


def test_progress_is_shown_when_asked_for():
    shown = bags.embed_bags(LINEAR, PIXELS, [0, 2], **OPTIONS, progress=True)
    assert list(shown) == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [4, -1]}, "at least 0"),
        ({"ks": []}, "at least 0"),
        ({"ks": [1.5]}, "whole numbers"),
        ({"scale": 0.0}, r"\(0, 1\]"),
        ({"scale": 1.5}, r"\(0, 1\]"),
        ({"scale": float("nan")}, r"\(0, 1\]"),
        ({"pixels": PIXELS[:0]}, "one at least"),
        ({"pixels": PIXELS / 255}, "uint8"),
        ({"pixels": PIXELS[0]}, "uint8"),
    ],
)
def test_senseless_input_is_named(change, message):
    arguments = {"pixels": PIXELS, "ks": [1], **OPTIONS, **change}
    with pytest.raises(InputError, match=message):
        bags.embed_bags(LINEAR, **arguments)


def test_boxes_of_other_images_are_refused():
    with pytest.raises(ValueError, match="boxes must be"):
        bags.patch_embeddings(LINEAR, PIXELS, boxes(2)[:, :5], 8)
    with pytest.raises(ValueError, match="batch"):
        bags.embed_bags(LINEAR, PIXELS, [1], **OPTIONS, batch=0)


def test_no_batch_waits_for_the_device(monkeypatch):
    """On the meta device, whose tensors have no values, all batches are embedded; only then are the bags asked for."""
    seen = []

    def embed(crops):
        seen.append(len(crops))
        return crops.flatten(1)

    monkeypatch.setattr(torch, "autocast", lambda *how, **more: contextlib.nullcontext())
    monkeypatch.setattr(bags, "_prepare", lambda *how: (embed, torch.device("meta"), 4))
    with pytest.raises(NotImplementedError, match="meta"):
        bags.embed_bags(LINEAR, PIXELS, KS, **OPTIONS)
    assert sum(seen) == len(PIXELS) * (1 + max(KS)) and len(seen) == 2 + 6 * 2
    looks = (lambda crops: embed(crops) / crops.max().item(), torch.device("meta"), 4)
    monkeypatch.setattr(bags, "_prepare", lambda *how: looks)
    seen.clear()
    with pytest.raises(RuntimeError, match="meta"):  # negative control: an encoder that looks at its values
        bags.embed_bags(LINEAR, PIXELS, KS, **OPTIONS)
    assert len(seen) == 1
