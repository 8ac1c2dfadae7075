"""Adapters in a file of their own, which ONNX Runtime puts in the place of those within a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from torch import nn

from graphprune.errors import ExportError
from graphprune.export.adapters import adapter_factors
from graphprune.export.packed_weights import label_of
from graphprune.files import replacing
from quant import PackedParameter, QuantLinear

BASE = "graphprune.base"
"""Key of a model file's metadata: the digest of the packed weights that its adapters were made for."""


def base_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all packed weights: names, shapes, formats and bytes, adapters left out."""
    digest = hashlib.sha256()
    for name, module in _with_room_for_adapters(model):
        quantized = module.quantized
        digest.update(f"{name} {quantized.shape} {quantized.format} {quantized.block_size}\n".encode())
        for part in quantized.parts().values():
            digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_adapter(model: nn.Module, path: Path, *, model_file: Path | None = None) -> Path:
    """Write a model's adapters as an ``.onnx_adapter`` file for the models exported from the same packed weights.

    Args:
        model: With `QuantLinear` layers or packed parameters.
        path: The file.
        model_file: The file that it is for, where the model is a pair of files: each takes the adapters of its own
            weights alone. None for all adapters.

    Returns:
        The path.

    Raises:
        ExportError: If the model has no adapters, or the file takes none.
    """
    taken = None if model_file is None else {value.name for value in ir.load(model_file).graph.inputs}
    parameters: dict[str, npt.NDArray[np.float32]] = {}
    for name, module in _with_room_for_adapters(model):
        if module.lora_A is not None:
            down, up = adapter_factors(module)
            # Contiguous, and held until all is written: ONNX Runtime's values only point into these arrays.
            for factor, array in (("lora_A", down), ("lora_B", up)):
                parameter = f"{name}.{factor}.weight"
                if taken is None or parameter in taken:
                    parameters[parameter] = np.ascontiguousarray(array)
    if not parameters:
        raise ExportError(
            "the model has no adapters"
            if model_file is None
            else f"{model_file} takes no adapters of the model",
            'quantize it with a rank above 0, and export it with adapters="overridable"',
        )
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(_version(base_digest(model)))
    file.set_parameters({name: value(array) for name, array in parameters.items()})
    with replacing(path) as temporary:
        file.export_adapter(str(temporary))
    return path


def _with_room_for_adapters(model: nn.Module) -> Iterator[tuple[str, QuantLinear | PackedParameter]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | PackedParameter):
            yield label_of(name), module


def open_adapter(path: Path, model: Path) -> onnxruntime.LoraAdapter:
    """Open an ``.onnx_adapter`` file for a session over an exported model.

    Args:
        path: The adapter.
        model: The model file that it is for.

    Raises:
        ExportError: If there is no such file, or it was not made for this model.
    """
    if not path.is_file():
        raise ExportError(f"there is no adapter {path}", "write one with write_adapter")
    opened = ir.load(model)
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
    except Exception as error:
        raise ExportError(f"{path} is no adapter: {error}", "write one with write_adapter") from error
    base = opened.metadata_props.get(BASE)
    if base is None or _version(base) != file.get_model_version():
        raise ExportError(
            f"{path} was made for other packed weights than those of {model}",
            "use the adapter and the model of one export",
        )
    strange = file.get_parameters().keys() - {value.name for value in opened.graph.inputs}
    if strange:
        raise ExportError(
            f"{model} does not take {min(strange)} from outside",
            'export the model with adapters="overridable"',
        )
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    return adapter


def _version(digest: str) -> int:
    """Return what the format has room for: a positive 32-bit integer."""
    return int(digest[:8], 16) >> 1
