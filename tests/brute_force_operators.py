"""What each operator of an exported program demands of single rows; see `brute_force`.

Operators that move data are run on numbered elements. The others are said to be element-wise, a contraction, a
reduction or a norm, and nothing more. An operator that is not listed keeps all its rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from brute_force_rows import Rows
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_flatten

MOVES = frozenset(
    "view reshape _unsafe_view flatten unflatten unsqueeze squeeze transpose permute t expand slice split "
    "split_with_sizes chunk unbind select cat stack contiguous clone".split()
)
ELEMENTWISE = frozenset(
    "add sub rsub mul div neg pow rsqrt sqrt exp log relu gelu silu tanh sigmoid cos sin erf abs square to "
    "masked_fill where gt lt ge le eq dropout softmax _softmax clamp detach".split()
)
GUARDS = frozenset({"_assert_tensor_metadata", "_assert_scalar"})


@dataclass(frozen=True)
class Call:
    """An operator call: tensors in its arguments are replaced by their names, free ones by the reader's own copies."""

    node: fx.Node
    arguments: dict[str, Any]
    results: tuple[str, ...]

    @property
    def operator(self) -> str:
        """``view`` for ``aten.view.default``."""
        return base_name(self.node)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)


def base_name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if str(node.target).startswith("aten.") else str(node.target)


def name_of(node: fx.Node) -> str:
    """Return the name of the tensor that a node stands for; a picked result is the operator's own."""
    if node.target is operator.getitem:
        return f"{node.args[0]}:{node.args[1]}"
    return node.name


def calls_of(program: ExportedProgram, free: set[str]) -> list[Call]:
    """Return the calls of a program in order, and add to `free` what is computed of free tensors alone."""
    calls = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or base_name(node) in GUARDS:
            continue
        examples = node.meta["val"]
        single = isinstance(examples, Tensor)
        results = (node.name,) if single else tuple(f"{node.name}:{i}" for i in range(len(examples)))
        alone = all(name_of(source) in free for source in node.all_input_nodes)
        if alone:
            free.update(results)
        named = _named_arguments(node)
        positions = iter(range(100))

        def name(
            source: fx.Node, node: fx.Node = node, alone: bool = alone, positions: Any = positions
        ) -> Any:
            own = name_of(source)
            return Name(own if alone or own not in free else f"{own}@{node.name}.{next(positions)}")

        calls.append(Call(node, {key: fx.map_arg(item, name) for key, item in named.items()}, results))
    return calls


class Name(str):
    """A tensor's name, to tell it from arguments that are strings."""

    __slots__ = ()


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    given = {parameter.name: item for parameter, item in zip(parameters, node.args)}
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def rows_of(program: ExportedProgram, weights: Mapping[str, Tensor]) -> Rows:
    """Number the rows of all tensors of a program, and state what its operators demand.

    Args:
        program: An exported program.
        weights: Its parameters and buffers by qualified name; one tensor under two names is one parameter.
    """
    rows = Rows()
    names: dict[int, str] = {}
    nodes = {node.name: node for node in program.graph.nodes}
    for spec in program.graph_signature.input_specs:
        example = nodes[spec.arg.name].meta.get("val")
        if isinstance(example, Tensor):
            rows.add(spec.arg.name, example.shape)
            if spec.kind is InputKind.PARAMETER:
                first = names.setdefault(id(weights[spec.target]), spec.arg.name)
                rows.parameters[spec.arg.name] = rows.parameters.get(first, spec.target)
                for axis in range(example.dim() if first != spec.arg.name else 0):
                    rows.same(first, axis, spec.arg.name, axis)
                continue
            rows.free.add(spec.arg.name)
            if spec.kind is InputKind.USER_INPUT:
                rows.keep(spec.arg.name)
    for call in calls_of(program, rows.free):
        _state(rows, call)
    for node in program.graph.find_nodes(op="output")[0].all_input_nodes:
        rows.keep(name_of(node))
    rows.settle()
    return rows


def _state(rows: Rows, call: Call) -> None:
    examples = call.node.meta["val"]
    for name, example in zip(
        call.results, [examples] if isinstance(examples, Tensor) else examples, strict=True
    ):
        rows.add(name, example.shape)
    for name in operands(call):
        if "@" in name:
            rows.copy(*name.split("@"))
    if call.operator in MOVES:
        move(rows, call)
    elif call.operator in ELEMENTWISE:
        for name in operands(call):
            _broadcast(rows, name, call.results[0])
    else:
        DEMANDS.get(call.operator, _unknown)(rows, call)


def operands(call: Call) -> list[str]:
    """Return the tensors that a call reads, in order."""
    return [item for item in tree_flatten(call.arguments)[0] if isinstance(item, Name)]


def move(rows: Rows, call: Call) -> None:
    """Run the operator on numbered elements and see where each goes."""
    numbered: dict[str, Tensor] = {}
    offset = 0
    for name in operands(call):
        count = math.prod(rows.shapes[name])
        numbered[name] = (torch.arange(count) + offset).reshape(rows.shapes[name])
        offset += count
    results = run(call, numbered)
    for name, source in numbered.items():
        first, count = int(source.flatten()[0]), source.numel()
        for result, moved in zip(call.results, results, strict=True):
            elements = moved.numpy() - first
            rows.moved(name, result, np.where((elements >= 0) & (elements < count), elements, -1))


def run(call: Call, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Run the operator on tensors by name."""
    flat, tree = tree_flatten(call.arguments)
    arguments = tree.unflatten([tensors[item] if isinstance(item, Name) else item for item in flat])
    result = call.node.target(**arguments)  # type: ignore[operator]
    return [result] if isinstance(result, Tensor) else list(result)


def _broadcast(rows: Rows, name: str, result: str, skip: int = 0) -> None:
    """Couple axes from the right, `skip` of them left out, as far as they are not of one row."""
    for axis in range(-1 - skip, -1 - len(rows.shapes[name]), -1):
        if rows.shapes[name][axis] != 1 or rows.shapes[result][axis] == 1:
            rows.same(name, axis, result, axis)


def _unknown(rows: Rows, call: Call) -> None:
    inputs = operands(call)
    if set(call.results) <= rows.free and all(name in rows.free for name in inputs):
        inputs = [name for name in inputs if rows.is_kept(name)]
        if not inputs:
            return
    for name in (*inputs, *call.results):
        rows.keep(name)


def _factory(rows: Rows, call: Call) -> None:
    """Say nothing: any of its rows may be read."""


def _linear(rows: Rows, call: Call) -> None:
    (result,) = call.results
    rows.same(call["input"], -1, call["weight"], 1)
    rows.same(call["weight"], 0, result, -1)
    for axis in range(len(rows.shapes[result]) - 1):
        rows.same(call["input"], axis, result, axis)
    if call["bias"]:
        rows.same(call["bias"], 0, result, -1)


def _matmul(rows: Rows, call: Call) -> None:
    (result,) = call.results
    first, second = operands(call)
    rows.same(first, -1, second, -2)
    rows.same(first, -2, result, -2)
    rows.same(second, -1, result, -1)
    for name in (first, second):
        _broadcast(rows, name, result, skip=2)


def _attention(rows: Rows, call: Call) -> None:
    (result,) = call.results
    query, key, value = call["query"], call["key"], call["value"]
    batch, heads, length, width = rows.shapes[query]
    key_heads = rows.shapes[key][1]
    grid = _reshaped(rows, query, (batch, key_heads, heads // key_heads, length, width))
    for name in (key, value):
        rows.same(grid, 1, name, 1)
        rows.same(grid, 0, name, 0)
    rows.same(query, -1, key, -1)
    rows.same(key, -2, value, -2)
    rows.same(value, -1, result, -1)
    for axis in range(3):
        rows.same(query, axis, result, axis)
    if call["is_causal"]:
        rows.keep(query, -2)
        rows.keep(key, -2)
    if call["attn_mask"]:
        rows.keep(call["attn_mask"])


def _reshaped(rows: Rows, name: str, shape: tuple[int, ...]) -> str:
    """Number the rows of a tensor seen in another shape, which an operator gives it inside."""
    view = f"{name} as {shape}"
    if view not in rows.shapes:
        rows.add(view, shape)
        rows.moved(name, view, np.arange(math.prod(shape)).reshape(shape))
    return view


def _reduce(rows: Rows, call: Call) -> None:
    (result,) = call.results
    source = call["self"]
    rank = len(rows.shapes[source])
    gone = {dim % rank for dim in call["dim"]}
    left = [axis for axis in range(rank) if axis not in gone]
    for position, axis in enumerate(left):
        rows.same(source, axis, result, axis if call["keepdim"] else position)


def _norm(rows: Rows, call: Call) -> None:
    (result,) = call.results
    for axis in range(len(rows.shapes[result])):
        rows.same(call["input"], axis, result, axis)
    channel = 1 if call.operator == "batch_norm" else -1
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name]:
            rows.same(call[name], 0, result, channel)


def _group_norm(rows: Rows, call: Call) -> None:
    batch, channels, *rest = rows.shapes[call["input"]]
    split = (call["num_groups"], channels // call["num_groups"])
    inward, outward = (
        _reshaped(rows, name, (batch, *split, *rest)) for name in (call["input"], *call.results)
    )
    for axis in range(len(rest) + 3):
        rows.same(inward, axis, outward, axis)
    for name in (call["weight"], call["bias"]):
        own = _reshaped(rows, name, split)
        rows.same(own, 0, inward, 1)
        rows.same(own, 1, inward, 2)


def _convolution(rows: Rows, call: Call) -> None:
    (result,) = call.results
    source, weight, groups = call["input"], call["weight"], call["groups"]
    batch, channels, *lengths = rows.shapes[source]
    produced = rows.shapes[weight][0] // groups
    inward = _reshaped(rows, source, (batch, groups, channels // groups, *lengths))
    own = _reshaped(rows, weight, (groups, produced, *rows.shapes[weight][1:]))
    outward = _reshaped(rows, result, (batch, groups, produced, *rows.shapes[result][2:]))
    for name, axis in ((own, 0), (outward, 1)):
        rows.same(inward, 1, name, axis)
    rows.same(inward, 0, outward, 0)
    rows.same(inward, 2, own, 2)
    rows.same(own, 1, outward, 2)
    if call["bias"]:
        rows.same(call["bias"], 0, result, 1)
    for axis in range(2, len(rows.shapes[source])):
        for name in (source, weight, result):
            rows.keep(name, axis)


def _embedding(rows: Rows, call: Call) -> None:
    (result,) = call.results
    rows.keep(call["weight"], 0)
    rows.same(call["weight"], 1, result, -1)
    for axis in range(len(rows.shapes[call["indices"]])):
        rows.same(call["indices"], axis, result, axis)


DEMANDS: dict[str, Callable[[Rows, Call], None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
    "mean": _reduce,
    "sum": _reduce,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "batch_norm": _norm,
    "group_norm": _group_norm,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "embedding": _embedding,
    "arange": _factory,
}
