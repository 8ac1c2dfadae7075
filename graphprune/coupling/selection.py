"""From units to indices: which indices of an axis a choice of units keeps, and in which order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from graphprune.coupling.layout import Layout, find

Indices = NDArray[np.int64]
Selection = Mapping[int, Indices]
"""The units to keep of an atom, in their new order, by the atom's identity. Atoms not named keep all."""


def select(layout: Layout, selection: Selection) -> Indices:
    """Return the indices of an axis that a selection keeps.

    A permutation is a selection of all units in another order, a removal one of fewer units; both go through here.

    Args:
        layout: The axis' layout.
        selection: Units to keep, by atom.

    Returns:
        Indices into the axis, in their new order.
    """
    layout = find(layout)
    if layout.form == "atom":
        kept = selection.get(layout.identity)
        return np.arange(layout.size) if kept is None else kept
    if layout.form == "concat":
        pieces, offset = [], 0
        for part in layout.parts:
            pieces.append(offset + select(part, selection))
            offset += part.size
        return np.concatenate(pieces)
    indices = np.zeros(1, dtype=np.int64)
    for part in layout.parts:
        inner = select(part, selection)
        indices = (indices[:, None] * part.size + inner[None, :]).reshape(-1)
    return indices


def unit_of_index(layout: Layout, atom: Layout) -> Indices:
    """Return, for each index of an axis, the unit of `atom` that owns it, or -1."""
    layout = find(layout)
    if layout is atom:
        return np.arange(layout.size)
    if layout.form == "atom":
        return np.full(layout.size, -1, dtype=np.int64)
    parts = [unit_of_index(part, atom) for part in layout.parts]
    if layout.form == "concat":
        return np.concatenate(parts)
    owner = np.full(1, -1, dtype=np.int64)
    for part in parts:
        owner = np.maximum(owner[:, None], part[None, :]).reshape(-1)
    return owner
