"""The torch front end: `torch.export` on the model as it is, lowered to an operator graph."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphprune.errors import TraceError, TraceWarning
from graphprune.trace.caches import without_caches
from graphprune.trace.fold import known_numbers
from graphprune.trace.graph import Argument, DynamicSize, Operator, OperatorGraph, Role, Value
from graphprune.trace.inputs import fixed_sizes, keyword_inputs, naming, open_sizes, unnamed, wanted

# Nodes that compute nothing: shape guards that the exporter leaves behind.
GUARDS = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)

_ROLES: dict[InputKind, Role] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
# How the exporter names a module of a slice of a list: the slice as Python writes it, and the place in it.
_SLICED = re.compile(r"slice\((None|\d+), (?:None|-?\d+), (None|\d+)\)\.(\d+)")
_UNKNOWN_SIZE = 17  # for a size that follows from the inputs' numbers; what has it is pinned

_Lowered = Value | DynamicSize | tuple[Value | None, ...]


def trace_module(model: nn.Module, example_inputs: Any, *, dynamic: bool = True) -> OperatorGraph:
    """Trace a torch module into an operator graph.

    The model is exported whole by ``torch.export`` without decompositions, in evaluation mode and without
    gradients; it is not changed. Weights may live on the meta device, or be fake.

    Args:
        model: Any module that ``torch.export`` takes; PEFT-wrapped ones show their adapters by name.
        example_inputs: Keyword arguments of its forward by name; or one tensor, or a tuple of its first arguments.
            Choose sizes that collide with nothing, such as a batch of 2 and a sequence of 11. A forward that names
            ``use_cache`` and is not told gets False.
        dynamic: Whether the batch and the sequence stay open in the program; a `TraceWarning` tells where the model
            does not allow it.

    Returns:
        The operator graph, which keeps the exported program for surgery.

    Raises:
        TraceError: If the model cannot be exported, with the exporter's first line.
    """
    inputs = keyword_inputs(model, example_inputs)
    with _evaluation(model), without_caches(model):
        program = _exported(model, inputs, dynamic)
    return trace_program(program, _tied_names(model))


def trace_program(program: ExportedProgram, tied_groups: list[list[str]] | None = None) -> OperatorGraph:
    """Lower an exported program to an operator graph.

    Args:
        program: In training IR, as ``torch.export.export`` returns it, not decomposed.
        tied_groups: Names of weights that are one tensor, group by group; by default those of its state.
    """
    if tied_groups is None:
        tied_groups = _same_tensors(program.state_dict.items())
    values: dict[str, _Lowered] = {}
    known = known_numbers(program)
    tied = {name: group[0] for group in tied_groups for name in group[1:]}
    inputs, weights = _placeholders(program, values, tied, known)
    operators: list[Operator] = []
    outputs: tuple[Value, ...] = ()
    for node in program.graph.nodes:
        if node.op == "call_function":
            _lower_call(node, values, operators, known)
        elif node.op == "output":
            outputs = tuple(
                value for value in _flat(_lower(node.args[0], values)) if isinstance(value, Value)
            )
    return OperatorGraph(_live(operators, outputs), inputs, weights, outputs, tied, program)


def _live(operators: list[Operator], outputs: tuple[Value, ...]) -> tuple[Operator, ...]:
    """Return the operators whose numbers reach an output; some are traced only for the sizes of their result."""
    needed = {value.name for value in outputs}
    kept = []
    for operator in reversed(operators):
        if operator.in_place or any(value is not None and value.name in needed for value in operator.outputs):
            kept.append(operator)
            needed.update(() if operator.has_own_shape else (value.name for value in operator.inputs))
    return tuple(reversed(kept))


def _exported(model: nn.Module, inputs: dict[str, Any], dynamic: bool) -> ExportedProgram:
    """Export with open sizes, or else with those of the example: some models fix their sizes."""
    program, problem = None, ""
    for sizes in (open_sizes(inputs), None) if dynamic else (None,):
        try:
            program = _export(model, inputs, sizes)
            break
        except Exception as error:
            problem = f": {_first_line(error)}"
    if (
        program is None
    ):  # the exporter's own traceback, hundreds of lines, says no more than its first line does
        raise TraceError(
            f"torch.export could not trace {type(model).__name__}{problem}", _remedy(model, inputs)
        )
    fixed = fixed_sizes(program) if dynamic else []
    if fixed:
        warnings.warn(
            f"{type(model).__name__} is traced for the example's sizes alone ({'; '.join(fixed)}){problem}",
            TraceWarning,
            stacklevel=4,
        )
    return program


def _remedy(model: nn.Module, inputs: dict[str, Any]) -> str:
    strange = unnamed(model, inputs)
    if strange:
        return f"its forward does not name {', '.join(strange)}: {wanted(model)}"
    return "run the model on the same example inputs; data-dependent Python control flow is the usual cause"


def _export(model: nn.Module, inputs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    with torch.no_grad(), naming(model, inputs), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args=(), kwargs=inputs, strict=False, dynamic_shapes=dynamic_shapes)


def _placeholders(
    program: ExportedProgram,
    values: dict[str, _Lowered],
    tied: Mapping[str, str],
    known: Mapping[str, Tensor],
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
        value = _value(tied.get(name, name), example, role, known.get(node.name))
        values[node.name] = value
        if value.is_weight:
            weights[value.name] = value
        elif role == "input":
            inputs.append(value)
    return tuple(inputs), weights


def _lower_call(
    node: torch.fx.Node,
    values: dict[str, _Lowered],
    operators: list[Operator],
    known: Mapping[str, Tensor],
) -> None:
    """Add the operator of a node to `operators`, and what it returns to `values`."""
    example = node.meta.get("val")
    if str(node.target) in GUARDS:
        return
    if getattr(node.target, "__name__", "") == "getitem":
        several: Any = node.args[0]
        source = values.get(several.name)
        picked = source[node.args[1]] if isinstance(source, tuple) else source  # type: ignore[index]
        if picked is not None:
            values[node.name] = picked
    elif isinstance(example, (torch.SymInt, int)) and not isinstance(example, bool):
        values[node.name] = DynamicSize(_hint(example))
    elif isinstance(example, (Tensor, tuple, list)):
        operators.append(_operator(node, values, known))


def _operator(node: torch.fx.Node, values: dict[str, _Lowered], known: Mapping[str, Tensor]) -> Operator:
    arguments = {name: _lower(argument, values) for name, argument in _by_schema(node).items()}
    example = node.meta["val"]
    if isinstance(example, Tensor):
        value = _value(node.name, example, "intermediate", known.get(node.name))
        outputs: tuple[Value | None, ...] = (value,)
        values[node.name] = value
    else:
        outputs = tuple(
            _value(f"{node.name}:{i}", item, "intermediate") if isinstance(item, Tensor) else None
            for i, item in enumerate(example)
        )
        values[node.name] = outputs
    stack = node.meta.get("nn_module_stack") or {}
    module = _SLICED.sub(_place, next(reversed(stack.values()))[0]) if stack else ""
    return Operator(node.name, str(node.target), arguments, outputs, module)


def _place(sliced: re.Match[str]) -> str:
    """Return the place in a list of modules that is meant by a place in a slice of it."""
    start, step, place = (int(text) if text != "None" else None for text in sliced.groups())
    return str((start or 0) + (step or 1) * (place or 0))


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


def _lower(argument: Any, values: Mapping[str, _Lowered]) -> Argument:
    if isinstance(argument, torch.fx.Node):
        return values.get(argument.name)
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


def _value(name: str, example: Tensor, role: Role, known: Tensor | None = None) -> Value:
    shape = tuple(_hint(size) for size in example.shape)
    content = None if known is None else known.to(torch.int64).numpy()
    return Value(name, shape, str(example.dtype).removeprefix("torch."), role, content)


def _hint(size: Any) -> int:
    """Return a size at the example inputs."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if isinstance(size, torch.SymInt) else None
    return int(hint) if hint is not None else _UNKNOWN_SIZE


def _tied_names(model: nn.Module) -> list[list[str]]:
    return _same_tensors(
        pair
        for named in (model.named_parameters, model.named_buffers)
        for pair in named(remove_duplicate=False)
    )


def _same_tensors(named: Iterable[tuple[str, Any]]) -> list[list[str]]:
    """Group names by identity: pointers say nothing on the meta device."""
    names: dict[int, list[str]] = {}
    for name, tensor in named:
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
