"""ResNet-18 and ResNet-50 for small images (He et al. 2016).

The first convolution is 3x3 with stride 1 and no pooling follows it. Parameters have torchvision's names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        """From `before` to `width` channels; `stride` is that of the first convolution."""
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(before, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 [batch, before, h, w] to [batch, width, h / stride, w / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; four times as many channels leave it as work inside."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int) -> None:
        """From `before` to 4 * `width` channels; `stride` is that of the 3x3 convolution."""
        super().__init__()
        after = width * self.expansion
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample = _shortcut(before, after, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 [batch, before, h, w] to [batch, 4 * width, h / stride, w / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """A stem, four stages of blocks with 64, 128, 256 and 512 channels, a mean over positions, one linear layer."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: Sequence[int], in_channels: int, classes: int
    ) -> None:
        """`blocks`: the number of blocks in each of the four stages."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks[3], stride=2)
        self.fc = nn.Linear(512 * block.expansion, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 [batch, channels, height, width] to logits [batch, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        # A mean, not adaptive pooling: its gradient is deterministic on a GPU too.
        return self.fc(x.mean(dim=(2, 3)))


def resnet18(in_channels: int, image_size: tuple[int, int], classes: int) -> ResNet:
    """11,164,352 prunable weights for 3x32x32 images and 10 classes; `image_size` does not change the network."""
    return ResNet(BasicBlock, (2, 2, 2, 2), in_channels, classes)


def resnet50(in_channels: int, image_size: tuple[int, int], classes: int) -> ResNet:
    """23,467,712 prunable weights for 3x32x32 images and 10 classes; `image_size` does not change the network."""
    return ResNet(Bottleneck, (3, 4, 6, 3), in_channels, classes)


def _stage(block: type[BasicBlock | Bottleneck], before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = block(before, width, stride)
    rest = [block(width * block.expansion, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _shortcut(before: int, after: int, stride: int) -> nn.Sequential:
    """The identity (an empty Sequential) where shapes agree, else a 1x1 projection."""
    if before == after and stride == 1:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
