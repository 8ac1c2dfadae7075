"""NF4 weights from and to bitsandbytes, bit for bit: a change of container, nothing is quantized again.

Codes agree as they are (the even flat index in the high nibble), and so do both ways of storing the scales:
float32, or quantized once more (``compress_statistics=True``, the storage "double" here).

What `quant.quantize` computes differs from ``bitsandbytes.functional.quantize_4bit`` in four places only:

- bitsandbytes multiplies a whole block by the float32 reciprocal of its scale where we divide (it too divides a
  last, shorter block). Both take the lower level on a tie. So codes can differ only where a scaled weight lies
  within a few rounding errors of the midpoint of two levels; random weights show none in four million.
- With double quantization it chooses the codes by the scales before they were rounded, we by those which
  dequantization will use: about 0.5 % of the codes differ, and our error is the lower one.
- Its native CPU code for those rounded scales does not always take the nearest level: one in a thousand differs.
- A last, shorter block of zeros gets the scale 1e-38 there and 0 here; a block whose scale is below 1e-38 is
  flushed to zeros there.

Beware: bitsandbytes 0.50 dequantizes on the CPU wrongly where a row is not a whole number of blocks (a relative
error of 0.21 in place of 0.09); its other devices and `QuantizedTensor.dequantize` do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant.codebooks import get_format
from quant.errors import QuantError
from quant.linear import QuantLinear
from quant.quantized import QuantizedTensor
from quant.scales import DOUBLE_BLOCK, Scales, dynamic_levels
from quant.tree import replace_module_

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

FORMAT = "nf4"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PADDING = 7
"""The code of zero, which bitsandbytes writes behind an odd number of weights; `quant.packing` writes 0."""


def to_bitsandbytes_state(
    quantized: QuantizedTensor, name: str = "weight", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return a weight as the entries of a bitsandbytes state dict, without bitsandbytes.

    Args:
        quantized: In "nf4", any shape.
        name: Qualified name of the parameter.
        dtype: float32, float16 or bfloat16: what bitsandbytes dequantizes to.

    Returns:
        `name` with the packed codes, uint8 (bytes, 1), and ``name.absmax``, ``name.quant_map``,
        ``name.quant_state.bitsandbytes__nf4`` and, with double quantization, ``name.nested_absmax`` and
        ``name.nested_quant_map``: what ``Linear4bit.state_dict()`` holds, byte for byte.

    Raises:
        QuantError: Format, block size or dtype are unknown to bitsandbytes.
    """
    _check_representable(quantized, dtype)
    scales, device = quantized.scales, quantized.codes.device
    tensors = {"absmax": scales.stored if scales.storage == "double" else scales.values()}
    tensors["quant_map"] = get_format(FORMAT).levels.to(device, copy=True)
    facts: dict[str, Any] = {
        "quant_type": FORMAT,
        "blocksize": quantized.block_size,
        "dtype": _dtype_name(dtype),
        "shape": quantized.shape,
    }
    if scales.absmax is not None and scales.mean is not None:
        tensors["nested_absmax"] = scales.absmax
        tensors["nested_quant_map"] = dynamic_levels().to(device, copy=True)
        facts["nested_blocksize"] = DOUBLE_BLOCK
        facts["nested_dtype"] = "float32"
        facts["nested_offset"] = scales.mean.item()
    tensors[f"quant_state.bitsandbytes__{FORMAT}"] = torch.tensor(
        list(json.dumps(facts).encode()), dtype=torch.uint8
    )
    codes = _with_padding(quantized.codes, quantized.shape, PADDING).unsqueeze(1)
    return {name: codes, **{f"{name}.{key}": tensor for key, tensor in tensors.items()}}


def from_bitsandbytes_state(state: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
    """Return a weight from the entries of a bitsandbytes state dict, without bitsandbytes.

    Args:
        state: A state dict or an opened checkpoint; entries of other parameters are left alone.
        name: Qualified name of the parameter, such as "model.layers.0.mlp.up_proj.weight".

    Raises:
        QuantError: An entry is missing, or the weight is not NF4 with the tables that bitsandbytes uses.
    """
    facts = _facts(state, name)
    scales = _scales(state, name, facts)
    _check_table(state, name, "quant_map", get_format(FORMAT).levels)
    shape = tuple(facts["shape"])
    codes = _entry(state, name).contiguous().view(torch.uint8).reshape(-1)
    return QuantizedTensor(
        codes=_with_padding(codes, shape, 0),
        scales=scales,
        shape=shape,
        format=FORMAT,
        block_size=facts["blocksize"],
    )


def to_bitsandbytes(
    quantized: QuantizedTensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, QuantState]:
    """Return what ``bitsandbytes.functional.dequantize_4bit`` takes: codes, uint8 (bytes, 1), and their state.

    Args:
        quantized: In "nf4", any shape.
        dtype: float32, float16 or bfloat16: what bitsandbytes dequantizes to.

    Raises:
        QuantError: Format, block size or dtype are unknown to bitsandbytes.
    """
    from bitsandbytes.functional import QuantState

    state = to_bitsandbytes_state(quantized, "weight", dtype)
    codes = state.pop("weight")
    return codes, QuantState.from_dict(state, device=codes.device)


def from_bitsandbytes(codes: Tensor, state: QuantState) -> QuantizedTensor:
    """Return what ``bitsandbytes.functional.quantize_4bit`` returned as a `QuantizedTensor`.

    Raises:
        QuantError: The weight is not NF4, or bitsandbytes has rewritten it for its CPU kernel.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise QuantError(
            "bitsandbytes has repacked this weight for its CPU kernel and rounded its scales to bfloat16",
            "convert before the first forward in eval mode on the CPU, or load the checkpoint again",
        )
    entries = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return from_bitsandbytes_state({"weight": codes.detach(), **entries})


def linear_to_bitsandbytes(layer: QuantLinear) -> Linear4bit:
    """Return the packed weight and the bias as a ``bitsandbytes.nn.Linear4bit``; adapters are not part of it.

    `quant.bridges.peft_adapters.adapters_to_peft` exports the adapters.

    Raises:
        QuantError: Format, block size or dtype are unknown to bitsandbytes.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    state = to_bitsandbytes_state(layer.quantized, "weight", layer.dtype)
    codes = state.pop("weight")
    linear = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.dtype,
        compress_statistics=layer.quantized.scales.storage == "double",
        quant_type=FORMAT,
        device="meta",
    )
    linear.weight = Params4bit.from_prequantized(codes, state, device=codes.device, module=linear)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return linear


def linear_from_bitsandbytes(layer: Linear4bit) -> QuantLinear:
    """Return a ``bitsandbytes.nn.Linear4bit`` as a `QuantLinear` without adapters.

    Raises:
        QuantError: The weight is not quantized yet, not NF4, or rewritten for the CPU kernel.
    """
    state = layer.weight.quant_state
    if state is None:
        raise QuantError(
            f"the weight of this {type(layer).__name__} is not quantized yet",
            "move the layer to a device first: that is when bitsandbytes quantizes",
        )
    return QuantLinear(from_bitsandbytes(layer.weight.data, state), layer.bias, dtype=state.dtype)


def model_to_bitsandbytes_(model: nn.Module) -> list[str]:
    """Replace every `QuantLinear` of a model by a ``Linear4bit``, in place; adapters are dropped.

    Returns:
        The qualified names of the layers replaced.

    Raises:
        QuantError: A layer is not in "nf4"; the model is left as it was.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, layer in layers.items():
        try:
            _check_representable(layer.quantized, layer.dtype)
        except QuantError as error:
            raise QuantError(f"{name}: {error.problem}", error.remedy) from error
    for layer in layers.values():
        replace_module_(model, layer, linear_to_bitsandbytes(layer))
    return list(layers)


def _check_representable(quantized: QuantizedTensor, dtype: torch.dtype) -> None:
    if quantized.format != FORMAT:
        raise QuantError(
            f"bitsandbytes has no format {quantized.format!r}",
            f"quantize to {FORMAT!r} (its fp4 has other levels)",
        )
    if quantized.block_size not in BLOCK_SIZES:
        raise QuantError(
            f"bitsandbytes has no blocks of {quantized.block_size}", "quantize in blocks of 32 or more"
        )
    if dtype not in DTYPES:
        raise QuantError(f"bitsandbytes has no {dtype}", "use float32, float16 or bfloat16")


def _with_padding(codes: Tensor, shape: tuple[int, ...], padding: int) -> Tensor:
    """Return the codes with this value in the low nibble behind an odd number of weights."""
    if torch.Size(shape).numel() % 2 == 0:
        return codes
    return torch.cat([codes[:-1], (codes[-1:] & 0xF0) | padding])


def _facts(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Return what bitsandbytes writes as JSON into a uint8 tensor."""
    key = f"quant_state.bitsandbytes__{FORMAT}"
    if f"{name}.quant_state.bitsandbytes__fp4" in state:
        raise QuantError(f"{name} is in bitsandbytes' fp4", f"quantize it to {FORMAT!r}")
    facts: dict[str, Any] = json.loads(bytes(_entry(state, name, key).tolist()))
    return facts


def _scales(state: Mapping[str, Tensor], name: str, facts: Mapping[str, Any]) -> Scales:
    stored = _entry(state, name, "absmax")
    if "nested_offset" not in facts:
        return Scales(stored=stored)
    _check_table(state, name, "nested_quant_map", dynamic_levels())
    if facts.get("nested_blocksize") != DOUBLE_BLOCK:
        raise QuantError(
            f"the scales of {name} are quantized in blocks of {facts.get('nested_blocksize')}",
            f"bitsandbytes writes blocks of {DOUBLE_BLOCK}; quantize the weight again",
        )
    mean = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=stored.device)
    return Scales(stored=stored, absmax=_entry(state, name, "nested_absmax"), mean=mean)


def _entry(state: Mapping[str, Tensor], name: str, key: str = "") -> Tensor:
    full = f"{name}.{key}" if key else name
    if full not in state:
        raise QuantError(
            f"the state dict has no {full}",
            "pass the state dict of a model that bitsandbytes has quantized to 4 bits",
        )
    return state[full]


def _check_table(state: Mapping[str, Tensor], name: str, key: str, levels: Tensor) -> None:
    table = _entry(state, name, key)
    if not torch.equal(table.to(levels.device, levels.dtype), levels):
        raise QuantError(f"{name}.{key} is not bitsandbytes' table", "quantize the weight again")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
