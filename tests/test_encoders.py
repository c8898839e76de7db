"""Encoders are torchvision's networks, heads are lightly's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet34, resnet50

from bagssl.config import PretrainConfig
from bagssl.encoders import Conv3x3, build_encoder, build_projector
from bagssl.errors import InputError
from bagssl.objectives import OBJECTIVES


def reference(make, stem):
    """torchvision's network without a classifier; with the stem for small pictures where that is asked for."""
    network = make(num_classes=1)
    if stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network


@pytest.mark.parametrize(("stem", "other", "side"), [("cifar", "imagenet", 16), ("imagenet", "cifar", 64)])
@pytest.mark.parametrize("make", [resnet18, resnet34, resnet50])
def test_width_64_is_torchvisions_network(make, stem, other, side):
    name = make.__name__
    theirs, ours = reference(make, stem).double(), build_encoder(name, 64, stem=stem).double()
    theirs.load_state_dict(ours.state_dict())  # the same names and shapes
    x = torch.rand(2, 3, side, side, dtype=torch.double)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours(x), theirs((x - 0.5) * 4))
    assert ours.dim == ours(x).shape[1] == {"resnet50": 2048}.get(name, 512)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    # negative controls: other weights, and the other stem, are other networks
    assert not torch.allclose(ours(x), build_encoder(name, 64, 1, stem).double().eval()(x), rtol=1e-2)
    with pytest.raises(RuntimeError):
        reference(make, other).load_state_dict(ours.state_dict())


def test_a_stem_is_no_part_of_the_keys_of_runs_before_it():
    assert "stem" not in PretrainConfig().to_dict() and PretrainConfig(stem="imagenet").to_dict()["stem"] == "imagenet"
    with pytest.raises(InputError, match="stem"):
        PretrainConfig(stem="large")


def test_width_and_seed():
    encoder = build_encoder("resnet10", 8, seed=3)
    assert encoder(torch.rand(2, 3, 14, 14)).shape == (2, 64) and encoder.dim == 64
    same, other = build_encoder("resnet10", 8, seed=3), build_encoder("resnet10", 8, seed=4)
    assert torch.equal(encoder.conv1.weight, same.conv1.weight)
    assert not torch.equal(encoder.conv1.weight, other.conv1.weight)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build_encoder("resnet10", 4)
    build_projector("simclr", 32, 16, 8)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("objective", [*OBJECTIVES, "one of tomorrow"])
def test_projectors(objective):
    assert build_projector(objective, 32, 16, 8)(torch.rand(4, 32)).shape == (4, 8)


@pytest.mark.parametrize(("name", "width"), [("resnet99", 16), ("resnet10", 0)])
def test_wrong_names_are_refused(name, width):
    with pytest.raises(InputError):
        build_encoder(name, width)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 4)])
def test_small_maps_are_convolved_exactly(side, stride):
    conv = Conv3x3(5, 7, stride).double()
    conv.bias = nn.Parameter(torch.randn(7, dtype=torch.double))  # as a folded batch-norm leaves one
    x = torch.randn(4, 5, *side, dtype=torch.double).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = conv(x), F.conv2d(x, conv.weight, conv.bias, stride, 1)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(theirs)
    inputs = [x, conv.weight, conv.bias]
    expected = torch.autograd.grad(theirs, inputs, gradient)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, gradient), expected)
    assert not torch.allclose(ours, F.conv2d(x, conv.weight.roll(1, 2), conv.bias, stride, 1))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_3x3_convolution_of_the_encoder_takes_the_short_cut(name):
    encoder = build_encoder(name, 8)
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert {type(module) for module in convolutions if module.kernel_size == (3, 3)} == {Conv3x3}
