"""Weights of which every row holds three values, kept as dictionary codes: below one bit a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.ternary.coding import decode, encode
from quant.ternary.dictionary import FEWEST_ZEROS, MOST_ZEROS, best_longest, dictionary
from quant.ternary.grid import ternary_values
from quant.ternary.pickling import Bits16, with_uint16, without_uint16

PART_NAMES = ("codes", "row_codes", "levels")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TernaryTensor:
    """A matrix (rows, columns), or a stack of them (experts, rows, columns), as codes of ternary words.

    Attributes:
        codes: uint16 (codes,), row after row.
        row_codes: (all rows,), how many codes each row has: uint16, or int32 where a row is so wide as to need it.
        levels: bfloat16 (all rows, 2): what the symbols 1 and 2 of a row stand for; symbol 0 is zero.
        shape: (rows, columns) or (experts, rows, columns).
        zeros: p(0) of the dictionary, in per mille.
        longest: The most pairs of symbols in a word of the dictionary.
    """

    codes: Tensor
    row_codes: Tensor
    levels: Tensor
    shape: tuple[int, ...]
    zeros: int
    longest: int

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3):
            raise QuantError(
                f"ternary weights of shape {self.shape}", "pass (rows, columns) or (experts, rows, columns)"
            )
        rows = math.prod(self.shape[:-1])
        found = tuple(self.row_codes.shape), tuple(self.levels.shape)
        kinds = self.codes.dtype, self.row_codes.dtype, self.levels.dtype
        wanted = torch.uint16, _count_dtype(self.shape[-1]), torch.bfloat16
        if found != ((rows,), (rows, 2)) or kinds != wanted or self.codes.dim() != 1:
            raise QuantError(
                f"parts of shapes {found} and dtypes {kinds} are not those of ternary weights {self.shape}",
                f"pass uint16 codes, their counts ({rows},) and bfloat16 levels ({rows}, 2)",
            )
        counted = int(self.row_codes.to(torch.int64).sum())
        if counted != len(self.codes):
            raise QuantError(
                f"{len(self.codes)} codes, and {counted} counted in rows",
                "pass the parts of one tensor, whole",
            )

    @property
    def experts(self) -> int:
        """Matrices in the stack; 1 for a matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def nbytes(self) -> int:
        """Bytes of codes, counts and levels: all that is stored but the shape and the two numbers."""
        return sum(part.nbytes for part in self.parts().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all that is stored, by weights."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    @property
    def code_bits(self) -> float:
        """Bits of the codes alone, by weights: the rate that the entropy is a bound of."""
        return 8 * self.codes.nbytes / max(1, math.prod(self.shape))

    def symbols(self, expert: int | None = None) -> Tensor:
        """Return the symbols of all weights, or of one expert's: uint8, of the shape of those weights.

        Raises:
            QuantError: The codes are damaged, or there is no such expert.
        """
        if expert is None:
            return decode(self.codes, self.row_codes, self.shape[-1], self.zeros, self.longest).view(
                self.shape
            )
        if not 0 <= expert < self.experts:
            raise QuantError(
                f"there is no expert {expert} among {self.experts}", "count from 0, from the front"
            )
        row_codes = self.row_codes.to(torch.int64).view(self.experts, self.shape[-2])
        start, count = int(row_codes[:expert].sum()), int(row_codes[expert].sum())
        codes = self.codes[start : start + count]
        return decode(codes, row_codes[expert], self.shape[-1], self.zeros, self.longest)

    def dequantize(self, dtype: torch.dtype = torch.float32, expert: int | None = None) -> Tensor:
        """Return the weights, or those of one expert, which alone are then decoded: (rows, columns).

        Args:
            dtype: Of the result. float32 and bfloat16 hold the levels exactly.
            expert: Index of the expert; None for the whole tensor, of shape `shape`.

        Raises:
            QuantError: The codes are damaged, or there is no such expert.
        """
        symbols = self.symbols(expert)
        levels = self.levels.to(dtype).view(self.experts, self.shape[-2], 2)
        low, high = (levels if expert is None else levels[expert]).split(1, dim=-1)
        return ternary_values(symbols, low, high).view(symbols.shape)

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors alone, by name."""
        return {"codes": self.codes, "row_codes": self.row_codes, "levels": self.levels}

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], *, shape: tuple[int, ...], zeros: int, longest: int
    ) -> TernaryTensor:
        """Return the tensor of these parts.

        Raises:
            QuantError: A part is missing or does not fit the others.
        """
        missing = set(PART_NAMES) - parts.keys()
        if missing:
            raise QuantError(f"a ternary tensor lacks {', '.join(sorted(missing))}", "pass all of its parts")
        found = {name: parts[name] for name in PART_NAMES}
        return cls(**found, shape=shape, zeros=zeros, longest=longest)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how pickle makes the tensor again."""
        return _from_pickle, (without_uint16(self.parts()), self.shape, self.zeros, self.longest)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors alone, ready for a safetensors file; `from_state_dict` is the way back."""
        return {
            **self.parts(),
            "shape": torch.tensor(self.shape, dtype=torch.int64),
            "dictionary": torch.tensor([self.zeros, self.longest], dtype=torch.int64),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> TernaryTensor:
        """Return the tensor that `state_dict` described.

        Raises:
            QuantError: A part is missing or does not fit the others.
        """
        missing = {"shape", "dictionary"} - state.keys()
        if missing:
            raise QuantError(
                f"a ternary tensor lacks {', '.join(sorted(missing))}", "pass a whole state_dict()"
            )
        zeros, longest = state["dictionary"].tolist()
        return cls.from_parts(state, shape=tuple(state["shape"].tolist()), zeros=zeros, longest=longest)


def encode_ternary(
    symbols: Tensor, low: Tensor, high: Tensor, *, zeros: int | None = None, longest: int | None = None
) -> TernaryTensor:
    """Code ternary symbols without loss.

    Args:
        symbols: uint8 (rows, columns) or (experts, rows, columns) of 0, 1 and 2.
        low: (..., rows): what 1 stands for; kept as bfloat16.
        high: (..., rows): what 2 stands for; kept as bfloat16.
        zeros: p(0) of the dictionary in per mille; None for the measured one, in steps of 10, so that tensors
            share dictionaries.
        longest: The most pairs in a word; None for what suits p(0).

    Returns:
        The coded tensor, on the device of the symbols.
    """
    if zeros is None:
        share = 1000 * int((symbols == 0).sum()) / max(1, symbols.numel())
        zeros = min(max(10 * round(share / 10), FEWEST_ZEROS), MOST_ZEROS)
    longest = best_longest(zeros) if longest is None else longest
    codes, row_codes = encode(symbols.flatten(0, -2), dictionary(zeros, longest))
    return TernaryTensor(
        codes=codes,
        row_codes=row_codes.to(_count_dtype(symbols.shape[-1])),
        levels=torch.stack([low.reshape(-1), high.reshape(-1)], dim=1).to(torch.bfloat16),
        shape=tuple(symbols.shape),
        zeros=zeros,
        longest=longest,
    )


def _from_pickle(
    parts: Mapping[str, Tensor | Bits16 | None], shape: tuple[int, ...], zeros: int, longest: int
) -> TernaryTensor:
    held = {name: part for name, part in with_uint16(parts).items() if part is not None}
    return TernaryTensor.from_parts(held, shape=shape, zeros=zeros, longest=longest)


def _count_dtype(columns: int) -> torch.dtype:
    # A row has at most one code for each pair of weights.
    return torch.uint16 if (columns + 1) // 2 < 1 << 16 else torch.int32
