"""What `quant.json` says of a packed weight, and the packed weights of a model by the names they are stored under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from quant.affine import affine_layout
from quant.embedding import QuantEmbedding
from quant.errors import QuantError
from quant.linear import QuantLinear
from quant.packed import PackedWeight
from quant.parameters import PackedParameter, place_parameter_
from quant.quantized import QuantizedTensor
from quant.ternary import PackedExperts, TernaryTensor, replace_parameter_
from quant.tree import replace_module_

Packed = QuantLinear | QuantEmbedding | PackedParameter | PackedExperts
PARAMETRIZED = ".parametrizations."
TERNARY = "ternary"
NAMES = (
    "; names in the files must be those of the model's modules, which transformers writes by "
    "save_pretrained(..., save_original_format=False)"
)
"""What helps, too, where a stored name is no module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """One entry of `quant.json`.

    Attributes:
        kind: "linear", "embedding", "parameter" or "experts".
        format: Name of the format, or "ternary".
        block_size: Consecutive weights that share a scale; of ternary weights a whole row.
        shape: Shape of what is packed.
        rank: Rank of the adapters, 0 without any.
        scaling: Factor of the adapters' product.
        scale: What an embedding multiplies its rows by.
        tied_to: The layer that holds the tensors which this one lacks in the file, since both share them.
        transposed: Whether the parameter, or the weight of the layer replaced, is the transpose of what is packed.
        zeros: Of a ternary dictionary, see `TernaryTensor`.
        longest: Of a ternary dictionary, see `TernaryTensor`.
    """

    kind: str
    format: str
    block_size: int
    shape: tuple[int, ...]
    rank: int = 0
    scaling: float = 1.0
    scale: float = 1.0
    tied_to: str | None = None
    transposed: bool = False
    zeros: int | None = None
    longest: int | None = None

    def entry(self) -> dict[str, Any]:
        """Return the entry as JSON holds it."""
        left_out = {"transposed": False, "scale": 1.0}
        return {
            key: value
            for key, value in asdict(self).items()
            if value is not None and (key not in left_out or value != left_out[key])
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> StoredLayer:
        """Return the layer of a JSON entry; KeyError, TypeError or ValueError where it is malformed."""
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in entry.items() if key in known}
        return cls(
            **{
                **given,
                "block_size": int(entry["block_size"]),
                "shape": tuple(int(size) for size in entry["shape"]),
                "rank": int(entry["rank"]),
                "scaling": float(entry["scaling"]),
                "scale": float(entry.get("scale", 1)),
            }
        )

    @property
    def takes_parameter(self) -> bool:
        """Whether it takes the place of a parameter and not of a module."""
        return self.kind in ("parameter", "experts")

    @property
    def replaced_shape(self) -> tuple[int, ...]:
        """Shape of the weight whose place it takes."""
        return (*self.shape[:-2], *reversed(self.shape[-2:])) if self.transposed else self.shape

    def tensor(self, parts: Mapping[str, Tensor]) -> QuantizedTensor | TernaryTensor:
        """Return the packed tensor of these parts.

        Raises:
            QuantError: They do not fit the entry.
        """
        if self.format == TERNARY:
            return TernaryTensor.from_parts(
                parts, shape=self.shape, zeros=self.zeros or 0, longest=self.longest or 0
            )
        return QuantizedTensor.from_parts(
            parts, shape=self.shape, format=self.format, block_size=self.block_size
        )


def packed_weights(model: nn.Module) -> dict[str, Packed]:
    """Return a model's packed weights by the names of the modules or parameters whose place they have."""
    found: dict[str, Packed] = {}
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantEmbedding, PackedExperts)):
            found[name] = module
        elif isinstance(module, PackedParameter):
            holder, _, key = f".{name}".rpartition(PARAMETRIZED)
            found[f"{holder}.{key.removesuffix('.0')}".lstrip(".")] = module
    return found


def describe(packed: Packed, tied_to: str | None) -> StoredLayer:
    """Return the entry of a packed weight, whose tensors may be another's."""
    quantized = packed.quantized
    if isinstance(quantized, TernaryTensor):
        return StoredLayer(
            kind="experts",
            format=TERNARY,
            block_size=quantized.shape[-1],
            shape=quantized.shape,
            zeros=quantized.zeros,
            longest=quantized.longest,
            tied_to=tied_to,
        )
    kinds = {QuantLinear: "linear", QuantEmbedding: "embedding", PackedParameter: "parameter"}
    adapted = packed if isinstance(packed, (QuantLinear, PackedParameter)) else None
    return StoredLayer(
        kind=kinds.get(type(packed), "experts"),
        format=quantized.format,
        block_size=quantized.block_size,
        shape=quantized.shape,
        rank=adapted.rank if adapted else 0,
        scaling=adapted.scaling if adapted else 1.0,
        scale=packed.scale if isinstance(packed, QuantEmbedding) else 1.0,
        tied_to=tied_to,
        transposed=isinstance(packed, (QuantLinear, PackedParameter)) and packed.transposed,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The place in a model that a stored layer takes.

    Attributes:
        device: Of what is there; the CPU for meta, where nothing can be kept.
        dtype: Of the weight.
        put: Puts a packed weight there, in place.
        holder: The module, no linear layer, that keeps the bias beside a weight which becomes a packed parameter;
            None for others.
    """

    device: torch.device
    dtype: torch.dtype
    put: Callable[[Packed], None]
    holder: nn.Module | None = None


def find_slot(model: nn.Module, name: str, layer: StoredLayer) -> Slot:
    """Return where a stored layer belongs.

    Raises:
        QuantError: There is nothing of its kind and shape.
    """
    return _parameter_slot(model, name, layer) if layer.takes_parameter else _module_slot(model, name, layer)


def _module_slot(model: nn.Module, name: str, layer: StoredLayer) -> Slot:
    old = dict(model.named_modules(remove_duplicate=False)).get(name)
    if old is not None and layer.kind == "linear" and not layer.transposed and _multiplies_otherwise(old):
        # A checkpoint names matrices, not what reads them: this one is a parameter, such as Conv1D's.
        return replace(_parameter_slot(model, f"{name}.weight", layer), holder=old)
    if old is None or not (_kind_and_shape(old) == (layer.kind, layer.shape) or _is_transposed(old, layer)):
        found = "nothing" if old is None else f"a {type(old).__name__} of shape {_kind_and_shape(old)[1]}"
        raise _misfit(name, layer, found, NAMES if old is None and layer.kind == "linear" else "")
    weight = old._dtype_mark if isinstance(old, PackedWeight) else next(old.parameters())
    return Slot(_real(weight), weight.dtype, lambda new: replace_module_(model, old, new))


def _parameter_slot(model: nn.Module, name: str, layer: StoredLayer) -> Slot:
    old = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if old is None or tuple(old.shape) != layer.replaced_shape:
        packed = name in packed_weights(model)
        found = "packed already" if packed else "nothing" if old is None else f"of shape {tuple(old.shape)}"
        raise _misfit(name, layer, found)

    def put(new: Packed) -> None:
        if isinstance(new, PackedParameter):
            place_parameter_(model, name, new)
        elif isinstance(new, PackedExperts):
            holder, _, key = name.rpartition(".")
            replace_parameter_(model.get_submodule(holder), key, new)

    return Slot(_real(old), old.dtype, put)


def _holds_a_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None


def _multiplies_otherwise(module: nn.Module) -> bool:
    plain = isinstance(module, (nn.Linear, nn.Embedding))
    return not plain and _holds_a_weight(module) and affine_layout(module) != "out, in"


def _is_transposed(module: nn.Module, layer: StoredLayer) -> bool:
    """Whether a module is the layer that stores (in, out) whose place a stored one takes, such as a Conv1D."""
    weight = module._parameters.get("weight")
    fits = weight is not None and tuple(weight.shape) == layer.replaced_shape
    return layer.transposed and fits and affine_layout(module) == "in, out"


def _kind_and_shape(module: nn.Module) -> tuple[str, tuple[int, ...]]:
    kind = "embedding" if isinstance(module, (QuantEmbedding, nn.Embedding)) else "linear"
    if isinstance(module, PackedWeight):
        return kind, module.shape
    return kind, tuple(module.get_parameter("weight").shape) if _holds_a_weight(module) else ()


def _misfit(name: str, layer: StoredLayer, found: str, more: str = "") -> QuantError:
    return QuantError(
        f"{name} is {found} in the model, but a stored {layer.kind} {layer.replaced_shape}",
        f"build the model with the shapes that were saved{more}",
    )


def _real(weight: Tensor) -> torch.device:
    return torch.device("cpu") if weight.is_meta else weight.device
