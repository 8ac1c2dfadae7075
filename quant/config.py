"""What LoftQ over a whole model is to do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quant.codebooks import get_format
from quant.errors import QuantError
from quant.quantized import check_block_size
from quant.scales import Storage, check_storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """How packed blocks are trained for what the dense ones put out; see `quant.reconstruction`.

    Attributes:
        epochs: Passes over the calibration batches, each batch a step.
        code_rate: Learning rate of the numbers that codes round, in mean gaps between two levels.
        scale_rate: Learning rate of scales and offsets, in such gaps times the layer's mean scale.
        adapter_rate: Learning rate of the adapters.

    Raises:
        QuantError: A value is out of range.
    """

    epochs: int = 2
    code_rate: float = 0.02
    scale_rate: float = 0.003
    adapter_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or isinstance(self.epochs, bool) or self.epochs < 1:
            raise QuantError(
                f"reconstruction in {self.epochs!r} epochs is not possible",
                "choose a whole number of at least 1, or no reconstruction",
            )
        for name in ("code_rate", "scale_rate", "adapter_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise QuantError(
                    f"a {name} of {getattr(self, name)} is not possible", "choose one of at least 0"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoftQConfig:
    """What `loftq_model` does.

    Attributes:
        format: Format of the linear layers: a name, or a number of bits for the best format of that many.
        formats: Pairs of a regular expression and a format; a layer takes the first whose expression is found
            in its qualified name, and `format` if none is.
        block_size: Consecutive weights that share a scale: a power of two from 16 to 4096.
        scale_storage: How scales are stored: "float32", "float16" or "double" (quantized too).
        rank: Rank of the adapters.
        alpha: LoRA's alpha: the adapters' product is multiplied by alpha / rank, and they are stored so that
            this leaves it right. None multiplies by 1.
        rslora: Multiply by alpha / sqrt(rank) instead.
        iterations: Alternating steps of LoftQ; 0 is QLoRA.
        compensated: Whether rounding makes up for its own errors; None for yes where there is calibration text.
        propagation: With calibration text, the share of what earlier layers shifted a layer's inputs by that
            its own weight takes back.
        reconstruction: With calibration text, how codes, scales and adapters of each block are trained together
            afterwards; None for not at all.
        seed: Of the random parts; each layer draws from its own stream.
        include: Regular expressions, or a single one; a linear layer is taken if one is found in its qualified name.
        exclude: Regular expressions, or a single one; a layer, or a tied group with one such name, is left as it is.
        embedding_format: Format of embeddings that share their weight with a linear layer, and of that layer;
            None leaves both as they are.
        embedding_block_size: Their block size.

    Raises:
        QuantError: A value is out of range, a format unknown, or an expression malformed.
    """

    format: str | int = "nf4"
    formats: tuple[tuple[str, str | int], ...] = ()
    block_size: int = 64
    scale_storage: Storage = "float32"
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    iterations: int = 5
    compensated: bool | None = None
    propagation: float = 0.5
    reconstruction: Reconstruction | None = None
    seed: int = 0
    include: tuple[str, ...] = (".*",)
    exclude: tuple[str, ...] = ()
    embedding_format: str | None = None
    embedding_block_size: int = 32

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_expressions(getattr(self, name)))
        object.__setattr__(self, "formats", _pairs(self.formats))
        for format in (self.format, self.embedding_format, *(format for _, format in self.formats)):
            if format is not None:
                get_format(format)
        check_block_size(self.block_size)
        check_block_size(self.embedding_block_size)
        check_storage(self.scale_storage)
        check_rank(self.rank)
        check_iterations(self.iterations)
        if not 0 <= self.propagation <= 1:
            raise QuantError(f"a propagation of {self.propagation} is not possible", "choose one from 0 to 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise QuantError(f"an alpha of {self.alpha} is not possible", "choose one above 0, or None")
        check_expressions((*self.include, *self.exclude, *(expression for expression, _ in self.formats)))

    @property
    def scaling(self) -> float:
        """What the adapters' product is multiplied by."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def format_of(self, name: str) -> str:
        """Return the name of the format that the linear layer of this qualified name takes."""
        chosen = (format for expression, format in self.formats if re.search(expression, name))
        return get_format(next(chosen, self.format)).name

    def includes(self, name: str) -> bool:
        """Tell whether the linear layer of this qualified name is to be quantized."""
        return any(re.search(expression, name) for expression in self.include) and not self.excludes(name)

    def excludes(self, name: str) -> bool:
        """Tell whether the layer of this qualified name is to be left as it is."""
        return any(re.search(expression, name) for expression in self.exclude)


def check_rank(rank: int) -> None:
    """Raise QuantError unless this can be the rank of adapters."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise QuantError(
            f"adapters of rank {rank!r} are not possible", "choose a whole number of at least 1, such as 16"
        )


def check_iterations(iterations: int) -> None:
    """Raise QuantError unless LoftQ can take so many steps."""
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise QuantError(
            f"{iterations!r} iterations are not possible",
            "choose 0 (QLoRA) or a whole number above, such as 5",
        )


def check_formats(formats: Iterable[tuple[str, str | int]], names: Sequence[str]) -> None:
    """Raise QuantError for an expression that would give no layer its format, such as a misspelt one.

    Args:
        formats: Pairs of a regular expression and a format.
        names: Qualified names of the layers that are quantized, at least one.
    """
    for expression, format in formats:
        if not any(re.search(expression, name) for name in names):
            raise QuantError(
                f"no layer to quantize has a name with {expression!r}, which was to be {format}",
                f"write it as the names are, such as {names[0]}",
            )


def _pairs(formats: object) -> tuple[tuple[str, str | int], ...]:
    """Return pairs of expression and format, in whatever collection they are given."""
    pairs = tuple(formats.items()) if isinstance(formats, Mapping) else formats
    if not isinstance(pairs, (tuple, list)) or any(
        not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs
    ):
        raise QuantError(
            f"formats {formats!r} are no pairs",
            'pass ((expression, format), …), such as (("down_proj$", 3),)',
        )
    return tuple((expression, format) for expression, format in pairs)


def as_expressions(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return expressions as a tuple; a string, which is a sequence of letters too, surely means itself."""
    return (given,) if isinstance(given, str) else tuple(given)


def check_expressions(expressions: Iterable[str]) -> None:
    """Raise QuantError for the first that is not a regular expression."""
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise QuantError(
                f"{expression!r} is not a regular expression: {error}", "escape its special characters"
            ) from error
