"""What the tracer is given, whatever kind of model it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from torch import nn

PREFIX = "model."
"""What the model's parameter names begin with in a `Traceable`'s module, which holds it as `model`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traceable:
    """A model as a function of flat tensors, with the names that these get in the file.

    Attributes:
        module: The function; it holds the model as its attribute `model`.
        arguments: Example arguments of its forward.
        dynamic_shapes: Their free axes, as `torch.export` takes them.
        input_names: Of all tensors in `arguments`, in order.
        output_names: Of all tensors that it returns, in order.
        name_axes: Names the free axes of the graph's inputs and outputs.
        graph_name: The graph's own name.
        remedy: What the user can do if it cannot be traced.
        context: What must hold while it is traced.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    dynamic_shapes: Any
    input_names: list[str]
    output_names: list[str]
    name_axes: Callable[[ir.Graph], None]
    graph_name: str
    remedy: str
    context: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
