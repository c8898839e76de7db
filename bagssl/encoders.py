"""Encoders f (patch -> embedding h) and projectors g (h -> projection z).

The encoders are torchvision's residual networks. They begin as small pictures need it, with a 3x3 convolution of
stride 1 and no max-pooling (the CIFAR stem), or as for ImageNet. The projectors are lightly's.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bagssl.errors import InputError, check_choice

BLOCKS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
STEMS = ("cifar", "imagenet")


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padding 1, no bias, that is a matrix product on maps of 2x2 pixels and less.

    There every input pixel meets every output pixel in one of the nine taps, or in none: the product does 16 of the 36
    multiplications that a convolution does with its padding (1 of 9 on a single pixel), at the speed of a product.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        if max(height, width) > 2:
            return super().forward(x)
        rows, columns = ((side - 1) // step + 1 for side, step in zip((height, width), self.stride, strict=True))
        taps = self.weight.permute(2, 3, 1, 0)
        # [out column, out row, row, column, in, out]: an output pixel k meets the input pixel i in the tap i - k + 1
        taps = torch.stack([taps[1 - k : 1 - k + height] for k in range(rows)])
        taps = torch.stack([taps[:, :, 1 - k : 1 - k + width] for k in range(columns)])
        matrix = taps.permute(2, 3, 4, 1, 0, 5).reshape(height * width * self.in_channels, -1)
        y = (x.permute(0, 2, 3, 1).reshape(n, -1) @ matrix).view(n, rows, columns, -1)
        return (y if self.bias is None else y + self.bias).permute(0, 3, 1, 2)  # a folded batch-norm leaves a bias


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The identity, or where the shapes differ a 1x1 convolution, as option B of He et al. 2016."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """The basic block of He et al. 2016, with torchvision's names: two 3x3 convolutions and a shortcut."""

    widens = 1  # channels that come out, for each of those inside

    def __init__(self, inputs: int, outputs: int, stride: int, conv: Callable[..., nn.Module]):
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """The bottleneck of He et al. 2016, with torchvision's names: 1x1, 3x3, 1x1 to four times the channels.

    The 3x3 convolution has the stride, as torchvision's has ("ResNet V1.5").
    """

    widens = 4

    def __init__(self, inputs: int, channels: int, stride: int, conv: Callable[..., nn.Module]):
        super().__init__()
        outputs = self.widens * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        y += self.downsample(x)
        return self.relu(y)


class Encoder(nn.Module):
    """A ResNet (He et al. 2016): patches [batch, 3, s, s] in [0, 1] -> h [batch, dim].

    The stages have `width` x (1, 2, 4, 8) channels inside their blocks; `dim` = 8 x width, 32 x width of bottlenecks.
    Width 64 is the usual network: its parameters carry torchvision's names. conv: what makes a 3x3 convolution of
    inputs, outputs and stride.
    """

    def __init__(self, name: str, width: int, stem: str = STEMS[0], conv: Callable[..., nn.Module] = Conv3x3):
        super().__init__()
        block, self.dim = _block(name), embedding_dim(name, width)
        imagenet = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False) if imagenet else conv(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if imagenet else nn.Identity()
        inputs = width
        for stage, count in enumerate(BLOCKS[name]):
            channels, stride = width * 2**stage, 1 if stage == 0 else 2
            outputs = block.widens * channels
            first = block(inputs, channels, stride, conv)
            rest = (block(outputs, channels, 1, conv) for _ in range(count - 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            inputs = outputs
        self.stages = len(BLOCKS[name])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, patches: Tensor) -> Tensor:
        # fixed constants, not a dataset's mean and deviation: an encoder then takes any picture as it is
        x = (patches - 0.5) * 4
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)  # several times faster than over (2, 3), channels last


def _block(name: str) -> type[Block] | type[Bottleneck]:
    return Bottleneck if name == "resnet50" else Block


def embedding_dim(name: str, width: int) -> int:
    """The dimensions of h: the channels that the last stage gives."""
    return _block(name).widens * width * 2 ** (len(BLOCKS[name]) - 1)


def build_encoder(name: str, width: int = 64, seed: int = 0, stem: str = STEMS[0],
                  conv: Callable[..., nn.Module] = Conv3x3) -> Encoder:  # fmt: skip
    """The encoder `name`, one of BLOCKS, weights drawn from `seed`, on the CPU; stem: one of STEMS; conv: as there.

    Raises InputError for an unknown name or stem, or a width below 1.
    """
    check_choice("encoder", name, BLOCKS)
    check_choice("stem", stem, STEMS)
    if width < 1:
        raise InputError(f"encoder width must be at least 1, not {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(name, width, stem, conv)


def build_projector(objective: str, dim: int, hidden: int, out: int, seed: int = 0) -> nn.Module:
    """The projector of `objective`: h [batch, dim] -> z [batch, out], weights drawn from `seed`.

    SimCLR, BYOL and MoCo have one hidden layer, as in their papers; all others two, as Barlow Twins (VICReg and TCR
    have the same three layers; lightly's VICReg head adds a batch-norm).
    """
    from lightly.models.modules import heads  # slow to import

    shorter = {"simclr": heads.SimCLRProjectionHead, "byol": heads.BYOLProjectionHead, "moco": heads.BYOLProjectionHead}
    head = shorter.get(objective, heads.BarlowTwinsProjectionHead)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return head(dim, hidden, out)


def build_predictor(dim: int, hidden: int, seed: int = 0) -> nn.Module:
    """The predictor of BYOL and MoCo: z [batch, dim] -> prediction of the target's z [batch, dim]."""
    from lightly.models.modules.heads import BYOLPredictionHead

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        return BYOLPredictionHead(dim, hidden, dim)
