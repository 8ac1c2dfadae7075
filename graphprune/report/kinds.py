"""How kinds of node groups look and read, the same in every picture, page and table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KindLook:
    """The colours of a kind on light and on dark pages, and what a unit of it is called.

    The palette was searched so that any two kinds stay apart (CIELAB distance above 20) for readers with
    protanopia, deuteranopia and none, each at least 3:1 against the page; colour is never the only sign.
    """

    light: str
    dark: str
    unit: str


_LOOKS = {
    "hidden": KindLook("#0b67e8", "#2f80ff", "one dimension of the residual stream"),
    "attention_heads": KindLook(
        "#933517", "#ff8f4d", "one key and value head, with the query heads it serves"
    ),
    "query_heads": KindLook(
        "#b38400", "#f6e027", "the query heads of one rank among those that share a key head"
    ),
    "head_dim": KindLook("#c337b8", "#df30b2", "one dimension inside of the heads"),
    "ffn": KindLook("#00a265", "#38c89a", "one channel of the feed-forward layer"),
    "expert": KindLook("#301a0d", "#b14a30", "one expert, with its row of the router"),
    "lora_rank": KindLook("#493c6a", "#afa4fd", "one rank of the adapter"),
    "vocabulary": KindLook("#505050", "#e3e9f2", "one row of a table that is read by number"),
}
_OTHER = KindLook("#878f9f", "#717171", "one index of the dimension")


def look_of(kind: str) -> KindLook:
    """Return the look of a kind; kinds that have none of their own share a grey."""
    return _LOOKS.get(kind, _OTHER)


def title_of(kind: str) -> str:
    """Return a kind as people write it."""
    return kind.replace("_", " ")
