"""Stacks of matrices, such as the experts of a mixture: found in the traced graph, and packed as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphprune.coupling.groups import node_groups
from graphprune.trace.model import trace
from quant.apply import LayerReport
from quant.blockwise import check_weight, quantize
from quant.loftq import relative_error
from quant.parameters import pack_parameter_
from quant.scales import Storage
from quant.stack import check_stackable


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter of three axes, each matrix of which a product reads.

    Attributes:
        name: Its qualified name.
        transposed: Whether its matrices are (in, out).
    """

    name: str
    transposed: bool


def find_stacks(model: nn.Module, examples: Mapping[str, Any]) -> list[Stack]:
    """Return a model's stacks; only a model with parameters of three axes is traced.

    Args:
        model: Not packed yet.
        examples: Inputs to trace it with.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    if not names:
        return []
    groups = node_groups(trace(model, examples))
    sides = {
        (member.parameter, member.axis): member.side for group in groups.values() for member in group.members
    }
    layouts = {("produces", "consumes"): False, ("consumes", "produces"): True}
    found = [(name, layouts.get((sides.get((name, 1), ""), sides.get((name, 2), "")))) for name in names]
    return [Stack(name, transposed) for name, transposed in found if transposed is not None]


def stack_storage(scale_storage: Storage) -> Storage:
    """Return how a stack's scales are stored: they cannot be quantized twice, and stay float32 then."""
    return "float32" if scale_storage == "double" else scale_storage


def check_stack(model: nn.Module, stack: Stack, block_size: int) -> None:
    """Raise QuantError if a stack cannot be packed."""
    parameter = model.get_parameter(stack.name)
    check_weight(parameter, stack.name)
    check_stackable(parameter, block_size, "float32", stack.name)


def pack_stack_(
    model: nn.Module, stack: Stack, format: str, block_size: int, scale_storage: Storage
) -> LayerReport:
    """Pack a stack in place, without adapters.

    Args:
        model: The model.
        stack: One of its stacks.
        format: Of the codes.
        block_size: Weights that share a scale.
        scale_storage: Of the scales, as far as `stack_storage` allows.

    Raises:
        QuantError: If it cannot be packed.
    """
    check_stack(model, stack, block_size)
    parameter = model.get_parameter(stack.name)
    weight = (parameter.detach().mT if stack.transposed else parameter.detach()).contiguous()
    packed = quantize(weight, format, block_size, scale_storage=stack_storage(scale_storage), name=stack.name)
    before = parameter.nbytes
    pack_parameter_(model, stack.name, packed, transposed=stack.transposed)
    return LayerReport(
        name=stack.name,
        shape=tuple(packed.shape),
        format=packed.format,
        errors=(relative_error(weight.float(), packed.dequantize()),),
        bytes_before=before,
        bytes_after=packed.nbytes,
    )
