"""What the streaming mode does, and to which tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quant.blockwise import check_block_size
from quant.codebooks import get_format
from quant.errors import QuantError
from quant.scales import Storage, check_storage

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
"""Names of matrices that are no linear layers of a block: embeddings, heads, norms, routers of experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What `loftq_checkpoint` does.

    Attributes:
        format: Format of the linear layers: a name, or a number of bits for the best format of that many.
        formats: Pairs of a regular expression and a format: the first one found in a layer's name replaces
            `format` there.
        block_size: Consecutive weights that share a scale: a power of two from 16 to 4096.
        scale_storage: How scales are stored: "float32", "float16" or "double".
        rank: Rank of the adapters.
        iterations: Alternating steps of LoftQ; 0 is QLoRA.
        seed: With a layer's name it gives the seed of that layer.
        include: Regular expressions; a matrix is a linear layer if one is found in its name.
        exclude: Regular expressions; a matrix with such a name is copied as it is.
        stacked: Regular expressions; a tensor of three dimensions with such a name is a stack of matrices,
            each quantized by itself under the name of the stack and its index.
        shard_bytes: Most bytes of a file written; a single larger tensor gets a file of its own.
        peft_adapters: Whether the adapters are also written in PEFT's layout, to the folder `adapters`.

    Raises:
        QuantError: A value is out of range, a format unknown, or an expression malformed.
    """

    format: str | int = "nf4"
    formats: tuple[tuple[str, str | int], ...] = ()
    block_size: int = 64
    scale_storage: Storage = "float32"
    rank: int = 16
    iterations: int = 5
    seed: int = 0
    include: tuple[str, ...] = (".*",)
    exclude: tuple[str, ...] = NOT_LINEAR
    stacked: tuple[str, ...] = (r"experts",)
    shard_bytes: int = 2_000_000_000
    peft_adapters: bool = False

    def __post_init__(self) -> None:
        for format in (self.format, *(format for _, format in self.formats)):
            get_format(format)
        check_block_size(self.block_size)
        check_storage(self.scale_storage)
        if self.rank < 1 or self.iterations < 0 or self.shard_bytes < 1:
            raise QuantError(
                f"rank {self.rank}, {self.iterations} iterations and files of {self.shard_bytes} bytes",
                "choose a rank of at least 1, 0 iterations (QLoRA) or more, and files of at least one byte",
            )
        expressions = (*self.include, *self.exclude, *self.stacked, *(first for first, _ in self.formats))
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise QuantError(
                    f"{expression!r} is not a regular expression: {error}", "escape its special characters"
                ) from error

    def takes(self, name: str) -> bool:
        """Tell whether the matrix of this name is a linear layer to quantize."""
        return _found(self.include, name) and not _found(self.exclude, name)

    def takes_stack(self, name: str) -> bool:
        """Tell whether the tensor of this name and of three dimensions is a stack of such matrices."""
        return _found(self.stacked, name) and self.takes(name)

    def format_of(self, name: str) -> str:
        """Return the name of the format of the layer of this name."""
        chosen = (format for expression, format in self.formats if re.search(expression, name))
        return get_format(next(chosen, self.format)).name


def _found(expressions: tuple[str, ...], name: str) -> bool:
    return any(re.search(expression, name) for expression in expressions)
