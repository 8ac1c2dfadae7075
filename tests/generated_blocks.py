"""Blocks of generated networks: frozen descriptions, each of which builds its module.

A block takes (batch, length, width) and returns (batch, length, `outgoing(width)`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Nonlinearity = Literal["relu", "gelu", "silu", "tanh", "sigmoid"]
NormKind = Literal["layer", "written layer", "rms", "written rms", "batch", "group"]


class Block(Protocol):
    """A description that can be hashed, compared and built."""

    def outgoing(self, width: int) -> int: ...

    def module(self, width: int) -> nn.Module: ...


@dataclass(frozen=True)
class Linear:
    """A linear map, as `nn.Linear` or as a product with a loose matrix, with low-rank branches beside it."""

    width: int
    bias: bool
    loose: bool = False
    ranks: tuple[int, ...] = ()

    def outgoing(self, width: int) -> int:
        return self.width

    def module(self, width: int) -> nn.Module:
        return LinearLayer(self, width)


class LinearLayer(nn.Module):
    def __init__(self, settings: Linear, width: int) -> None:
        super().__init__()
        self.loose = nn.Parameter(torch.zeros(width, settings.width)) if settings.loose else None
        self.base = None if settings.loose else nn.Linear(width, settings.width, bias=settings.bias)
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for rank in settings.ranks)
        self.up = nn.ModuleList(nn.Linear(rank, settings.width, bias=False) for rank in settings.ranks)

    def forward(self, x: Tensor) -> Tensor:
        result = x @ self.loose if self.base is None else self.base(x)
        for down, up in zip(self.down, self.up):
            result = result + up(down(x)) * 0.5
        return result


@dataclass(frozen=True)
class Activation:
    name: Nonlinearity

    def outgoing(self, width: int) -> int:
        return width

    def module(self, width: int) -> nn.Module:
        return ActivationLayer(self.name)


class ActivationLayer(nn.Module):
    def __init__(self, name: Nonlinearity) -> None:
        super().__init__()
        self.function = getattr(torch.nn.functional if name in ("gelu", "silu") else torch, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True)
class Gated:
    """A gated waist: two weights, or one that is cut in two by `cut`."""

    waist: int
    cut: Literal["separate", "chunk", "split", "slice"]
    gate_first: bool

    def outgoing(self, width: int) -> int:
        return width

    def module(self, width: int) -> nn.Module:
        return GatedLayer(self, width)


class GatedLayer(nn.Module):
    def __init__(self, settings: Gated, width: int) -> None:
        super().__init__()
        self.settings = settings
        count = 1 if settings.cut == "separate" else 2
        self.ups = nn.ModuleList(nn.Linear(width, settings.waist * count) for _ in range(3 - count))
        self.down = nn.Linear(settings.waist, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        waist, up = self.settings.waist, [layer(x) for layer in self.ups]
        if self.settings.cut == "chunk":
            up = list(up[0].chunk(2, -1))
        elif self.settings.cut == "split":
            up = list(up[0].split(waist, -1))
        elif self.settings.cut == "slice":
            up = [up[0][..., :waist], up[0][..., waist:]]
        gate, other = up if self.settings.gate_first else up[::-1]
        return self.down(torch.sigmoid(gate) * other)


@dataclass(frozen=True)
class Norm:
    kind: NormKind
    groups: int = 1

    def outgoing(self, width: int) -> int:
        return width

    def module(self, width: int) -> nn.Module:
        if self.kind == "layer":
            return nn.LayerNorm(width)
        if self.kind == "rms":
            return nn.RMSNorm(width, eps=1e-5)
        if self.kind in ("batch", "group"):
            return ChannelNorm(
                nn.BatchNorm1d(width) if self.kind == "batch" else nn.GroupNorm(self.groups, width)
            )
        return WrittenNorm(width, centred=self.kind == "written layer")


class ChannelNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class WrittenNorm(nn.Module):
    def __init__(self, width: int, centred: bool) -> None:
        super().__init__()
        self.scale, self.centred = nn.Parameter(torch.ones(width)), centred

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


@dataclass(frozen=True)
class Rearranged:
    """The width seen as factors, each scaled or not, reordered, and seen as one width again.

    With `reduced` the last factor is summed up, or averaged.
    """

    factors: tuple[int, ...]
    order: tuple[int, ...]
    scaled: tuple[bool, ...]
    reduced: Literal["no", "sum", "mean"] = "no"

    def outgoing(self, width: int) -> int:
        return width if self.reduced == "no" else width // self.factors[self.order[-1]]

    def module(self, width: int) -> nn.Module:
        return RearrangedLayer(self)


class RearrangedLayer(nn.Module):
    def __init__(self, settings: Rearranged) -> None:
        super().__init__()
        self.settings = settings
        self.scales = nn.ParameterList(
            nn.Parameter(torch.ones(factor, *[1] * (len(settings.factors) - 1 - place)))
            for place, (factor, scaled) in enumerate(zip(settings.factors, settings.scaled))
            if scaled
        )

    def forward(self, x: Tensor) -> Tensor:
        s = self.settings
        y = x.view(*x.shape[:-1], *s.factors)
        for scale in self.scales:
            y = y * scale
        y = y.permute(0, 1, *(2 + place for place in s.order))
        if s.reduced != "no":
            y = y.sum(-1) if s.reduced == "sum" else y.mean(-1)
        return y.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Cut:
    """The width cut into pieces, of which some are laid end to end again, in any order."""

    sizes: tuple[int, ...]
    chosen: tuple[int, ...]
    sliced: bool

    def outgoing(self, width: int) -> int:
        return sum(self.sizes[piece] for piece in self.chosen)

    def module(self, width: int) -> nn.Module:
        return CutLayer(self)


class CutLayer(nn.Module):
    def __init__(self, settings: Cut) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.settings.sizes
        if self.settings.sliced:
            starts = [sum(sizes[:piece]) for piece in range(len(sizes))]
            pieces = [x[..., starts[piece] : starts[piece] + sizes[piece]] for piece in self.settings.chosen]
        else:
            split = x.split(list(sizes), -1)
            pieces = [split[piece] for piece in self.settings.chosen]
        return torch.cat(pieces, -1)


@dataclass(frozen=True)
class Convolution:
    """Along the length, with its channels in groups."""

    width: int
    groups: int
    kernel: Literal[1, 3]

    def outgoing(self, width: int) -> int:
        return self.width

    def module(self, width: int) -> nn.Module:
        padding = self.kernel // 2
        return ChannelNorm(nn.Conv1d(width, self.width, self.kernel, padding=padding, groups=self.groups))


@dataclass(frozen=True)
class Ladder:
    """A small U-Net: a shorter, wider signal beside the first, and both concatenated."""

    widths: tuple[int, int]

    def outgoing(self, width: int) -> int:
        return width

    def module(self, width: int) -> nn.Module:
        return LadderLayer(self.widths, width)


class LadderLayer(nn.Module):
    def __init__(self, widths: tuple[int, int], width: int) -> None:
        super().__init__()
        first, second = widths
        self.inward = nn.Conv1d(width, first, 3, padding=1)
        self.shorter = nn.Conv1d(first, second, 3)
        self.longer = nn.Conv1d(second, second + 1, 3, padding=2)
        self.outward = nn.Conv1d(first + second + 1, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.inward(x.transpose(1, 2)))
        second = torch.relu(self.longer(torch.relu(self.shorter(first))))
        return self.outward(torch.cat([first, second], 1)).transpose(1, 2)
