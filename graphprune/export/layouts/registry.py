"""What an ONNX form of `x @ weight.T` is, which there are, and which a weight gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphprune.errors import ExportError
from graphprune.export.graph_writer import GraphWriter
from graphprune.export.packed_matrix import PackedMatrix

Write = Callable[[GraphWriter, ir.Value, PackedMatrix], ir.Value]
Fits = Callable[[PackedMatrix], bool]
Profile = Literal["cpu", "cuda", "portable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One ONNX form of a packed weight.

    Attributes:
        name: Key in `LAYOUTS`.
        exact: Whether the file computes with the quantized weight itself and not with a rounded one.
        fits: Whether a weight can take this form.
        write: Adds the nodes that compute `x @ weight.T` and returns their output.
    """

    name: str
    exact: Callable[[PackedMatrix], bool]
    fits: Fits
    write: Write


LAYOUTS: dict[str, Layout] = {}
"""All layouts by name."""

PROFILES: dict[Profile, tuple[str, ...]] = {
    "cpu": ("grid", "byte_table", "bnb4", "unpacked"),
    "cuda": ("grid", "bnb4", "byte_table", "unpacked"),
    "portable": ("dequantize", "unpacked"),
}
"""For each profile its layouts, the fastest first; `portable` has no operator outside the ONNX standard."""


def always(weight: PackedMatrix) -> bool:
    """Return True: for layouts that hold any weight exactly."""
    return True


def layout(name: str, *, fits: Fits, exact: Fits = always) -> Callable[[Write], Write]:
    """Register the decorated function as a `Layout`."""

    def decorate(write: Write) -> Write:
        LAYOUTS[name] = Layout(name=name, exact=exact, fits=fits, write=write)
        return write

    return decorate


def choose_layout(weight: PackedMatrix, profile: Profile = "cpu", *, exact: bool = False) -> Layout:
    """Return the profile's first layout that fits the weight, among the exact ones alone if asked."""
    forms = (LAYOUTS[name] for name in PROFILES[profile])
    return next(form for form in forms if form.fits(weight) and (not exact or form.exact(weight)))


def check_profile(profile: str) -> None:
    """Raise ExportError unless there is a profile of this name."""
    if profile not in PROFILES:
        raise ExportError(f"there is no export profile {profile!r}", f"use one of {', '.join(PROFILES)}")
