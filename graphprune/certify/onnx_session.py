"""A model in memory, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from graphprune.errors import InputsError, VerificationError

Arrays = Mapping[str, NDArray[Any]]
_ERRORS = (
    errors.EPFail,
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NotImplemented,
    errors.RuntimeException,
)


class OnnxSession:
    """Runs a model on the CPU.

    Args:
        model: The model, of any size: its weights go through a temporary file, as external data.
        settings: Entries of the session's configuration.

    Raises:
        VerificationError: If onnxruntime does not take it.
    """

    def __init__(self, model: ir.Model, settings: Mapping[str, str] | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        for key, value in (settings or {}).items():
            options.add_session_config_entry(key, value)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            ir.save(model, path, external_data="model.onnx.data")
            try:
                self._session = onnxruntime.InferenceSession(
                    path, options, providers=["CPUExecutionProvider"]
                )
            except _ERRORS as error:
                raise _refused(error) from error

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Return outputs by their names.

        Raises:
            VerificationError: If onnxruntime fails on the way.
        """
        try:
            return [np.asarray(array) for array in self._session.run(list(outputs), dict(inputs))]
        except _ERRORS as error:
            raise _refused(error) from error


def as_arrays(inputs: Mapping[str, Any], model: ir.Model) -> Arrays:
    """Return a model's inputs as arrays.

    Args:
        inputs: Arrays or torch tensors by name.
        model: The model.

    Raises:
        InputsError: If an input is missing, or there is none of that name.
    """
    wanted = [value.name for value in model.graph.inputs if value.name not in model.graph.initializers]
    missing, unknown = [name for name in wanted if name not in inputs], inputs.keys() - set(wanted)
    if missing or unknown:
        raise InputsError(
            f"the file's inputs are {', '.join(map(str, wanted))}; "
            + (f"not given: {', '.join(map(str, missing))}" if missing else f"none is '{min(unknown)}'"),
            "give each by its name: certify(None, groups, {'input_ids': array})",
        )
    return {
        name: np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        for name, value in inputs.items()
    }


def _refused(error: Exception) -> VerificationError:
    reason = str(error).strip().splitlines()[0]
    return VerificationError(
        f"onnxruntime cannot run the model: {reason}",
        "check that the file runs as it is, on these inputs; if it does, please report this model",
    )
