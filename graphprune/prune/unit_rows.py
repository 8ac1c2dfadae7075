"""What units own of one weight, and sums over it by unit, from LoRA's factors in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphprune.prune.low_rank import ROWS, AdaptedWeight, working_dtype


@dataclass(frozen=True, slots=True)
class UnitRows:
    """Rows x of a weight, along the axis in which a group has its units.

    Attributes:
        weight: The weight; rows run along `axis`.
        axis: Which of its axes.
        owner: The unit that owns each row (rows,), or -1.
        update: The weight with its adapter, BA having the same rows; None without an adapter.
    """

    weight: nn.Parameter
    axis: int
    owner: Tensor
    update: AdaptedWeight | None

    def chosen(self, units: Tensor) -> Tensor:
        """Return a mask (rows,) of the rows of the units chosen by a mask (units,)."""
        return units[self.owner.clamp_min(0)] & (self.owner >= 0)

    def chunks(self, units: Tensor) -> Iterator[Tensor]:
        """Yield the numbers of the rows of chosen units, some at a time."""
        yield from torch.nonzero(self.chosen(units)).flatten().split(ROWS)

    def read(self, rows: Tensor) -> Tensor:
        """Return x, (rows, elements), in at least float32."""
        return self._along().index_select(0, rows).flatten(1).to(working_dtype(self.weight))

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Store x."""
        along = self._along()
        along[rows] = values.reshape(-1, *along.shape[1:]).to(along.dtype)

    def clear(self, units: Tensor) -> None:
        """Set x of chosen units to zero."""
        mask = self.chosen(units)
        along = self._along()
        along.masked_fill_(mask.view(-1, *[1] * (along.dim() - 1)), 0)

    def clear_update(self, units: Tensor) -> None:
        """Set B of chosen units to zero."""
        if self.update is not None:
            self.update.b.data.masked_fill_(self.chosen(units)[:, None], 0)

    def moved(self, x: Tensor, rows: Tensor, gamma: float) -> Tensor:
        """Return x + γ s BA; x without an adapter."""
        if self.update is None:
            return x
        b = self.update.b.data.index_select(0, rows).to(x.dtype)
        return torch.addmm(x, b, self.update.a.data.to(x.dtype), alpha=gamma * self.update.scale)

    def _along(self) -> Tensor:
        along = self.weight.data.movedim(self.axis, 0)
        return along if along.dim() > 1 else along[:, None]


Quantity = Callable[[UnitRows, Tensor], Tensor]
"""From rows, by number (rows,), to one number for each (rows,)."""


def sum_by_unit(parts: tuple[UnitRows, ...], units: Tensor, quantity: Quantity) -> Tensor:
    """Return a quantity summed over all rows of each chosen unit (units,); zero for the others.

    Args:
        parts: All that a group's units own.
        units: Mask (units,).
        quantity: What to sum.
    """
    total = torch.zeros(len(units), dtype=working_dtype(parts[0].weight), device=units.device)
    for part in parts:
        for rows in part.chunks(units):
            total.index_add_(0, part.owner[rows], quantity(part, rows).to(total.dtype))
    return total


def squared_norm(part: UnitRows, rows: Tensor) -> Tensor:
    """Return ‖x‖²."""
    return part.read(rows).square().sum(1)


def update_product(part: UnitRows, rows: Tensor) -> Tensor:
    """Return ⟨s BA, x⟩, from x Aᵀ."""
    x = part.read(rows)
    if part.update is None:
        return x.new_zeros(len(x))
    b = part.update.b.data.index_select(0, rows).to(x.dtype)
    return part.update.scale * (b * (x @ part.update.a.data.to(x.dtype).T)).sum(1)


def squared_update(part: UnitRows, rows: Tensor) -> Tensor:
    """Return ‖s BA‖², from A Aᵀ."""
    if part.update is None:
        return torch.zeros(len(rows), device=rows.device)
    dtype = working_dtype(part.weight)
    a = part.update.a.data.to(dtype)
    b = part.update.b.data.index_select(0, rows).to(dtype)
    return part.update.scale**2 * (b * (b @ (a @ a.T))).sum(1)


def gradient_product(part: UnitRows, rows: Tensor) -> Tensor:
    """Return ⟨s (∂B A + B ∂A), x⟩ with the factors' gradients ∂A and ∂B: what they say of the merged weight."""
    x = part.read(rows)
    total = x.new_zeros(len(x))
    update = part.update
    if update is not None and update.b.grad is not None:
        gradient = update.b.grad.index_select(0, rows).to(x.dtype)
        total += (gradient * (x @ update.a.data.to(x.dtype).T)).sum(1)
    if update is not None and update.a.grad is not None:
        b = update.b.data.index_select(0, rows).to(x.dtype)
        total += (b * (x @ update.a.grad.to(x.dtype).T)).sum(1)
    return total if update is None else update.scale * total
