"""Mixers that look at neighbouring tokens alone: depthwise convolution, average pooling."""

import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv(nn.Module):
    """A convolution of each channel over the (B, H, W, C) grid."""

    def __init__(self, dim: int, kernel_size: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding="same", groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class AveragePooling(nn.Module):
    """The mean of 3x3 tokens less the token itself: PoolFormer's mixer (https://arxiv.org/abs/2111.11418)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False)
        return mean.permute(0, 2, 3, 1) - x
