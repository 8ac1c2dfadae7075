"""The kind of a node group, inferred from what operators do with it, never from names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from graphprune.coupling.algebra import Side

Kind = Literal[
    "attention_heads",
    "query_heads",
    "head_dim",
    "ffn",
    "hidden",
    "expert",
    "lora_rank",
    "vocabulary",
    "other",
]


def infer_kind(marks: Collection[str], sides: Collection[Side], *, is_update: bool) -> Kind:
    """Infer the kind of a group.

    Args:
        marks: What operators do with its axes.
        sides: For its members that contractions touch, on which side.
        is_update: Whether it reaches two parameters that lie, one after the other, beside a third one.

    Returns:
        The first kind that fits:

        - ``expert``: units that a top-k chooses from;
        - ``vocabulary``: rows of a table that is read by index;
        - ``head_dim``: contracted between query and key, or the width of a head's values (rotary pairs too);
        - ``query_heads``: heads that share one key head; ``attention_heads``: key heads with all that hangs on them;
        - ``hidden``: an axis that a norm runs over;
        - ``ffn``: a width with a non-linearity in it;
        - ``lora_rank``: the waist of two linear maps with nothing in between, beside a weight that they update.
    """
    if "routed" in marks:
        return "expert"
    if "lookup" in marks:
        return "vocabulary"
    if "head_dim" in marks:
        return "head_dim"
    if "heads" in marks:
        return "query_heads" if "repeated" in marks else "attention_heads"
    if "normalised" in marks:
        return "hidden"
    if "nonlinear" in marks and "window" not in marks and {"produces", "consumes"} <= set(sides):
        return "ffn"
    if "nonlinear" not in marks and is_update and set(sides) == {"produces", "consumes"}:
        return "lora_rank"
    return "other"
