"""Attention in the many layouts that people write it in, for generated networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Fusion = Literal["separate", "stacked", "per_head", "unbound", "per_group"]
Turn = Literal["none", "halves", "pairs", "partial"]
Attend = Literal["operator", "written", "grouped"]
Tables = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Attention:
    """A layer of attention.

    Attributes:
        key_heads: Heads of keys and values.
        repeat: Query heads that share a key head.
        width: Of a query and a key.
        value_width: Of a value.
        fusion: Three weights; one as [q | k | v]; one as (heads, q + k + v); one as (3, heads, width), unbound;
            or one as (key heads, repeat + 2, width).
        turn: Rotary embedding: by halves, by neighbouring pairs, by halves of the first part only, or none.
        attend: By torch's operator, by matmul and softmax, or by the operator that repeats the heads itself.
        causal: Whether later positions are hidden.
        normed: Whether queries and keys pass an RMSNorm over their width.
        bias: Whether the projections have one.
    """

    key_heads: int
    repeat: int
    width: int
    value_width: int
    fusion: Fusion
    turn: Turn
    attend: Attend
    causal: bool
    normed: bool
    bias: bool

    @property
    def turned(self) -> int:
        """How much of a head's width is turned."""
        return {"none": 0, "partial": 2 * (self.width // 4)}.get(self.turn, self.width)

    def outgoing(self, width: int) -> int:
        return width

    def module(self, width: int) -> nn.Module:
        return AttentionLayer(self, width)


class AttentionLayer(nn.Module):
    def __init__(self, settings: Attention, hidden: int) -> None:
        super().__init__()
        self.settings = s = settings
        heads = s.key_heads * s.repeat
        self.sizes = [heads * s.width, s.key_heads * s.width, s.key_heads * s.value_width]
        if s.fusion == "separate":
            self.query = nn.Linear(hidden, self.sizes[0], bias=s.bias)
            self.key = nn.Linear(hidden, self.sizes[1], bias=s.bias)
            self.value = nn.Linear(hidden, self.sizes[2], bias=s.bias)
        else:
            self.fused = nn.Linear(hidden, sum(self.sizes), bias=s.bias)
        if s.normed:
            self.query_scale = nn.Parameter(torch.ones(s.width))
            self.key_scale = nn.Parameter(torch.ones(s.width))
        self.out = nn.Linear(heads * s.value_width, hidden, bias=s.bias)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        s = self.settings
        q, k, v = (t.transpose(1, 2) for t in getattr(self, f"_{s.fusion}")(x))
        if s.normed:
            q, k = _normed(q, self.query_scale), _normed(k, self.key_scale)
        if s.turn != "none":
            cos, sin = tables[s.turned]
            q, k = (_turned(t, cos, sin, s) for t in (q, k))
        if s.repeat > 1 and s.attend != "grouped":
            k, v = _repeated(k, s.repeat), _repeated(v, s.repeat)
        return self.out(_attended(q, k, v, s).transpose(1, 2).flatten(2))

    def _heads(self, t: Tensor, heads: int) -> Tensor:
        return t.view(*t.shape[:2], heads, -1)

    def _separate(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = self.settings.key_heads * self.settings.repeat
        k, v = (self._heads(part(x), self.settings.key_heads) for part in (self.key, self.value))
        return self._heads(self.query(x), heads), k, v

    def _stacked(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.fused(x).split(self.sizes, dim=-1)
        heads = self.settings.key_heads
        return self._heads(q, heads * self.settings.repeat), self._heads(k, heads), self._heads(v, heads)

    def _per_head(self, x: Tensor) -> tuple[Tensor, ...]:
        s = self.settings
        fused = self._heads(self.fused(x), s.key_heads)
        return fused[..., : s.width], fused[..., s.width : 2 * s.width], fused[..., 2 * s.width :]

    def _unbound(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.fused(x).view(*x.shape[:2], 3, self.settings.key_heads, -1).unbind(2)

    def _per_group(self, x: Tensor) -> tuple[Tensor, ...]:
        s = self.settings
        fused = self.fused(x).view(*x.shape[:2], s.key_heads, s.repeat + 2, s.width)
        q, k, v = fused.split([s.repeat, 1, 1], dim=3)
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)


def _normed(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale


def _turned(x: Tensor, cos: Tensor, sin: Tensor, settings: Attention) -> Tensor:
    if settings.turn == "partial":
        turned, rest = x[..., : settings.turned], x[..., settings.turned :]
        return torch.cat([_by_halves(turned, cos, sin), rest], -1)
    return (_by_pairs if settings.turn == "pairs" else _by_halves)(x, cos, sin)


def _by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    both = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    return x * both[0] + torch.cat([-second, first], -1) * both[1]


def _by_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def _repeated(x: Tensor, times: int) -> Tensor:
    batch, heads, length, width = x.shape
    return (
        x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)
    )


def _attended(q: Tensor, k: Tensor, v: Tensor, settings: Attention) -> Tensor:
    if settings.attend != "written":
        grouped = settings.attend == "grouped" and settings.repeat > 1
        return scaled_dot_product_attention(q, k, v, is_causal=settings.causal, enable_gqa=grouped)
    scores = q @ k.transpose(-1, -2) * settings.width**-0.5
    if settings.causal:
        positions = torch.arange(q.shape[-2])
        scores = scores.masked_fill(positions[None, :] > positions[:, None], -1e4)
    return scores.softmax(-1) @ v
