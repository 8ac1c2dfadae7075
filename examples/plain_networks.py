"""Plain torch networks, small, that are no transformers: convolutions, gates, skips, shared layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualNetwork(nn.Module):
    """Convolutions with BatchNorm, a strided short cut, and a classifier, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.second, self.second_norm = nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.down_norm = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.cut, self.cut_norm = nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.stem_norm(self.stem(x))), 2)
        inner = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(x + self.second_norm(self.second(inner)))
        x = torch.relu(self.down_norm(self.down(x)) + self.cut_norm(self.cut(x)))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class GroupedNetwork(nn.Module):
    """Grouped and depth-wise convolutions, GroupNorm, a squeeze-and-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped, self.norm = nn.Conv2d(12, 18, 3, padding=1, groups=3), nn.GroupNorm(3, 18)
        self.point = nn.Conv2d(18, 10, 1)
        self.deep = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.squeeze, self.excite = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.grouped(torch.relu(self.stem(x)))))
        x = functional.silu(self.deep(self.point(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(x * gate)


class UNet(nn.Module):
    """Down, up with a transposed convolution, and concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, padding=1)
        self.middle = nn.Conv2d(10, 14, 3, padding=1)
        self.up = nn.ConvTranspose2d(14, 9, 2, stride=2)
        self.merge = nn.Conv2d(19, 7, 3, padding=1)
        self.last = nn.Conv2d(13, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.first(x))
        second = torch.relu(self.down(functional.max_pool2d(first, 2)))
        middle = torch.relu(self.middle(functional.max_pool2d(second, 2)))
        merged = torch.relu(self.merge(torch.cat([self.up(middle), second], 1)))
        return self.last(torch.cat([functional.interpolate(merged, scale_factor=2), first], 1))


class GatedBranches(nn.Module):
    """Branches of different widths, gated by a scalar and by each other, then concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.gate, self.narrow = nn.Linear(5, 9), nn.Linear(5, 9), nn.Linear(5, 4)
        self.scalar, self.out = nn.Linear(5, 1), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.tanh(self.wide(x)) * torch.sigmoid(self.gate(x))
        narrow = functional.gelu(self.narrow(x)) * torch.sigmoid(self.scalar(x))
        return self.out(torch.cat([wide, narrow], -1))


class SharedLayers(nn.Module):
    """One block used three times on a residual stream under RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.norm = nn.Linear(5, 12), nn.RMSNorm(12, eps=1e-6)
        self.up, self.down, self.outward = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for _ in range(3):
            x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.outward(x)
