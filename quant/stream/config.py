"""What the streaming mode does beside LoftQ, and to which tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quant.config import LoftQConfig, as_expressions, check_expressions
from quant.errors import QuantError

NOT_LINEAR = (
    r"(^|\.)(lm_head|embed_out|score|classifier)$",
    r"embed",
    r"(^|\.)(wte|wpe|shared)$",
    r"norm",
    r"(^|\.)(ln_\w+|ln)$",
    r"(^|\.)(router|gate|shared_expert_gate)$",
    r"relative_attention_bias$",
    r"conv",
)
"""Usual names of matrices that are no linear layers of a block: embeddings, heads, norms, routers of experts.

A checkpoint names tensors and does not say what reads them, so this can only go by names; `exclude` replaces it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig(LoftQConfig):
    """What `loftq_checkpoint` does; what is not listed is as in `LoftQConfig`.

    Attributes:
        exclude: Regular expressions; a matrix with such a name is copied as it is. By default those that are
            no linear layers of a block.
        stacked: Regular expressions, or a single one; a tensor of three dimensions with such a name is a stack of
            matrices, each quantized by itself under the name of the stack and its index.
        shard_bytes: Most bytes of a file written; a single larger tensor gets a file of its own.
        peft_adapters: Whether the adapters are also written in PEFT's layout, to the folder `adapters`.

    Raises:
        QuantError: A value is out of range, a format unknown, or an expression malformed; or one is set that
            needs the whole model.
    """

    exclude: tuple[str, ...] = NOT_LINEAR
    stacked: tuple[str, ...] = (r"experts",)
    shard_bytes: int = 2_000_000_000
    peft_adapters: bool = False

    def __post_init__(self) -> None:
        LoftQConfig.__post_init__(self)  # a class with slots is made twice, which breaks super()
        object.__setattr__(self, "stacked", as_expressions(self.stacked))
        check_expressions(self.stacked)
        if self.shard_bytes < 1:
            raise QuantError(f"files of {self.shard_bytes} bytes", "allow at least one byte")
        if self.embedding_format is not None or self.compensated:
            raise QuantError(
                "tied embeddings and compensated rounding need the whole model, which is never in memory",
                "leave embedding_format and compensated unset, or use loftq_model",
            )

    def takes_stack(self, name: str) -> bool:
        """Tell whether the tensor of this name and of three dimensions is a stack of such matrices."""
        return any(re.search(expression, name) for expression in self.stacked) and self.includes(name)
