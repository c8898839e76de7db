"""Networks of encoders that others trained, where neither torchvision nor timm has them: `arch=notebooks.others:NAME`.

An example of what `bagssl evaluate FILE --arch MODULE:FUNCTION` asks for: a function without arguments that returns a
torch.nn.Module, images [n, 3, s, s] -> h [n, dim], with the names of the file's tensors.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights: every second pixel, channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)))


class CifarResNet(nn.Module):
    """The residual networks of He et al. 2016, section 4.2: `blocks` in each of three stages, h of 64 dimensions."""

    def __init__(self, blocks: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            rest = (Block(outputs, outputs, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{stage}", nn.Sequential(Block(inputs, outputs, min(stage, 2)), *rest))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return x.mean(dim=(2, 3))


def resnet14() -> nn.Module:
    """Two blocks in a stage: of the VICReg encoder of github.com/AdityaaP27/VICReg-Cifar10."""
    return CifarResNet(2)


def resnet20() -> nn.Module:
    """Three blocks in a stage: of the supervised ones of github.com/akamaster/pytorch_resnet_cifar10."""
    return CifarResNet(3)
