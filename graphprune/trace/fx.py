"""The torch front end: `torch.export` on the model as it is, lowered to an operator graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphprune.errors import TraceError
from graphprune.trace.graph import Argument, Operator, OperatorGraph, Role, Value

# Nodes that compute nothing: shape guards that the exporter leaves behind.
GUARDS = frozenset({"aten._assert_tensor_metadata.default", "aten._assert_scalar.default"})

_ROLES: dict[InputKind, Role] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}


def trace(model: nn.Module, example_inputs: Mapping[str, Any]) -> OperatorGraph:
    """Trace a model into an operator graph.

    The model is exported whole by ``torch.export`` without decompositions, in evaluation mode and without
    gradients; it is not changed. Weights may live on the meta device.

    Args:
        model: Any module that ``torch.export`` takes; PEFT-wrapped ones show their adapters by name.
        example_inputs: Keyword arguments of its forward. Choose sizes that collide with nothing, such as a
            batch of 2 and a sequence of 11.

    Returns:
        The operator graph, which keeps the exported program for surgery.

    Raises:
        TraceError: If the model cannot be exported; the cause is attached.
    """
    try:
        with _evaluation(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args=(), kwargs=dict(example_inputs), strict=False)
    except Exception as error:
        raise TraceError(
            f"torch.export could not trace {type(model).__name__}: {_first_line(error)}",
            "run the model on the same example inputs; data-dependent Python control flow is the usual cause",
        ) from error
    return graph_of(program, _tied_names(model))


def graph_of(program: ExportedProgram, tied_groups: list[list[str]] | None = None) -> OperatorGraph:
    """Lower an exported program to an operator graph.

    Args:
        program: In training IR, as ``torch.export.export`` returns it, not decomposed.
        tied_groups: Names of weights that are one tensor, group by group.
    """
    values: dict[str, Value | tuple[Value | None, ...]] = {}
    tied = {name: group[0] for group in tied_groups or [] for name in group[1:]}
    inputs, weights = _placeholders(program, values, tied)
    operators: list[Operator] = []
    outputs: tuple[Value, ...] = ()
    for node in program.graph.nodes:
        if node.op == "call_function":
            if str(node.target) in GUARDS:
                continue
            if getattr(node.target, "__name__", "") == "getitem":
                source = values[node.args[0].name]
                values[node.name] = source[node.args[1]] if isinstance(source, tuple) else source
                continue
            operators.append(_operator(node, values))
        elif node.op == "output":
            outputs = tuple(
                value for value in _flat(_lower(node.args[0], values)) if isinstance(value, Value)
            )
    return OperatorGraph(tuple(operators), inputs, weights, outputs, tied, program)


def _placeholders(
    program: ExportedProgram, values: dict[str, Value | tuple[Value | None, ...]], tied: Mapping[str, str]
) -> tuple[tuple[Value, ...], dict[str, Value]]:
    inputs: list[Value] = []
    weights: dict[str, Value] = {}
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        example = node.meta.get("val")
        if not isinstance(example, Tensor):
            continue
        role = _ROLES.get(spec.kind, "input")
        name = node.name if role == "input" or not spec.target else spec.target
        value = _value(tied.get(name, name), example, role)
        values[node.name] = value
        if value.is_weight:
            weights[value.name] = value
        elif role == "input":
            inputs.append(value)
    return tuple(inputs), weights


def _operator(node: torch.fx.Node, values: dict[str, Value | tuple[Value | None, ...]]) -> Operator:
    arguments = {name: _lower(argument, values) for name, argument in _by_schema(node).items()}
    example = node.meta.get("val")
    if isinstance(example, Tensor):
        outputs: tuple[Value | None, ...] = (_value(node.name, example, "intermediate"),)
        values[node.name] = outputs[0]  # type: ignore[assignment]
    elif isinstance(example, (tuple, list)):
        outputs = tuple(
            _value(f"{node.name}:{i}", item, "intermediate") if isinstance(item, Tensor) else None
            for i, item in enumerate(example)
        )
        values[node.name] = outputs
    else:
        outputs = ()
    stack = node.meta.get("nn_module_stack") or {}
    module = next(reversed(stack.values()))[0] if stack else ""
    return Operator(node.name, str(node.target), arguments, outputs, module)


def _by_schema(node: torch.fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{f"argument_{i}": item for i, item in enumerate(node.args)}, **node.kwargs}
    named: dict[str, Any] = {}
    for position, parameter in enumerate(schema.arguments):
        if position < len(node.args):
            named[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            named[parameter.name] = node.kwargs[parameter.name]
        elif parameter.has_default_value():
            named[parameter.name] = parameter.default_value
    return named


def _lower(argument: Any, values: dict[str, Value | tuple[Value | None, ...]]) -> Argument:
    if isinstance(argument, torch.fx.Node):
        value = values.get(argument.name)
        return value if isinstance(value, (Value, tuple)) else None
    if isinstance(argument, (tuple, list)):
        return tuple(_lower(item, values) for item in argument)
    if isinstance(argument, dict):
        return tuple(_lower(item, values) for item in argument.values())
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return argument
    return str(argument)


def _flat(argument: Argument) -> Iterator[Argument]:
    if isinstance(argument, tuple):
        for item in argument:
            yield from _flat(item)
    else:
        yield argument


def _value(name: str, example: Tensor, role: Role) -> Value:
    shape = tuple(int(size) for size in example.shape)
    return Value(name, shape, str(example.dtype).removeprefix("torch."), role)


def _tied_names(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
