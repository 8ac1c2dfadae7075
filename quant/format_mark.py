"""What the packed bytes in a state dict do not tell: by which format they are read.

Formats of equal width have codes of equal shape, so that loading one's state into a layer of the other would go
unnoticed, and all weights be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.errors import QuantError

KEY = "_extra_state"
"""Where `nn.Module` keeps what `get_extra_state` returns, behind the module's prefix."""


def mark_of(name: str) -> Tensor:
    """Return a format's name as a tensor (bytes,), uint8, which any file of tensors holds."""
    return torch.tensor(list(name.encode()), dtype=torch.uint8)


def check_mark(state: Mapping[str, Any], prefix: str, name: str) -> None:
    """Check that a state is of a format, before anything of it is copied; a state without a mark passes.

    Args:
        state: A state dict.
        prefix: Of the layer's names in it, with the dot.
        name: The layer's format.

    Raises:
        QuantError: It is of another.
    """
    mark = state.get(prefix + KEY)
    if not isinstance(mark, Tensor):
        return
    found = bytes(mark.to(torch.uint8).flatten().tolist()).decode(errors="replace")
    if found != name:
        raise QuantError(
            f"the state of {prefix.rstrip('.') or 'the layer'} is of format {found}, and the layer is {name}",
            f"build the layer in {found}, or load the state that was saved from this one",
        )
