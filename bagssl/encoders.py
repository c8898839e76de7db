"""Encoders f (patch -> embedding h) and projectors g (h -> projection z).

The encoders are torchvision's residual networks with the stem that small pictures need: a 3x3 convolution of
stride 1 and no max-pooling. The projectors are lightly's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from bagssl.errors import InputError, check_choice

BLOCKS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class Encoder(nn.Module):
    """A ResNet of basic blocks (He et al. 2016) with a CIFAR stem: patches [batch, 3, s, s] in [0, 1] -> h [batch, dim].

    The stages have `width` x (1, 2, 4, 8) channels; `dim` = 8 x width. Width 64 is the usual network: its
    parameters carry torchvision's names.
    """

    def __init__(self, blocks: tuple[int, ...], width: int):
        super().__init__()
        self.dim = width * 2 ** (len(blocks) - 1)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        channels = [width, *(width * 2**stage for stage in range(len(blocks)))]
        for stage, count in enumerate(blocks):
            self.add_module(f"layer{stage + 1}", _stage(*channels[stage : stage + 2], count, 1 if stage == 0 else 2))
        self.stages = len(blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
                module.__class__ = _Conv3x3

    def forward(self, patches: Tensor) -> Tensor:
        # fixed constants, not a dataset's mean and deviation: an encoder then takes any picture as it is
        x = (patches - 0.5) * 4
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)  # several times faster than over (2, 3), channels last


class _Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 that is a matrix product on maps of 2x2 pixels and less.

    There every input pixel meets every output pixel in one of the nine taps, or in none: the product does 16 of the 36
    multiplications that a convolution does with its padding (1 of 9 on a single pixel), at the speed of a product.
    """

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
        return (y if self.bias is None else y + self.bias).permute(0, 3, 1, 2)


def _stage(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(count - 1)))


def build_encoder(name: str, width: int = 64, seed: int = 0) -> Encoder:
    """The encoder `name` (resnet10, resnet18 or resnet34) with weights drawn from `seed`, on the CPU.

    Raises InputError for an unknown name or a width below 1.
    """
    check_choice("encoder", name, BLOCKS)
    if width < 1:
        raise InputError(f"encoder width must be at least 1, not {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(BLOCKS[name], width)


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
