"""The exported program run on rows that are gone or have traded places; see `brute_force`.

Data is moved at full size: what a tensor has left is put into its old place among NaNs, the operator runs as it
stands, and what is left of its result is taken out. A NaN that gets into a result shows a removal that was none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from brute_force_operators import MOVES, Call, calls_of, name_of, operands, run
from brute_force_rows import Axis, Rows
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn.functional import group_norm

TOLERANCE = 1e-9
Order = Mapping[Axis, Tensor]
"""The rows that an axis has left, in their order; an axis that is not named has all."""


class Runner:
    """Runs one program on one input.

    Args:
        program: The exported program, in float64.
        rows: Its rows.
        weights: Parameters and buffers by qualified name.
        inputs: By keyword.
    """

    def __init__(
        self,
        program: ExportedProgram,
        rows: Rows,
        weights: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> None:
        self._rows = rows
        self._calls = calls_of(program, set(rows.free))
        self._outputs = [name_of(node) for node in program.graph.find_nodes(op="output")[0].all_input_nodes]
        self._given: dict[str, Tensor] = {}
        given = iter(inputs.values())
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                self._given[spec.arg.name] = next(given)
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self._given[spec.arg.name] = program.constants[spec.target]
            else:
                self._given[spec.arg.name] = weights[spec.target].detach()
        self.reference = self._run({})

    def trades(self, one: Iterable[int], other: Iterable[int]) -> bool:
        """Return whether two removals can trade places and leave the outputs as they are."""
        first, second = self._rows.by_axis(one), self._rows.by_axis(other)
        order = {}
        for axis, indices in first.items():
            traded = torch.arange(self._size(axis))
            traded[indices], traded[second[axis]] = torch.tensor(second[axis]), torch.tensor(indices)
            order[axis] = traded
        return _equal(self._run(order), self.reference)

    def removes(self, rows: Iterable[int]) -> bool:
        """Return whether the program without these rows computes what it computes with zeros in them."""
        order, zeroed = {}, dict(self._given)
        for (name, axis), indices in self._rows.by_axis(rows).items():
            left = torch.ones(self._size((name, axis)), dtype=torch.bool)
            left[indices] = False
            order[name, axis] = left.nonzero().flatten()
            if name in self._rows.parameters:
                zeroed[name] = zeroed[name].index_fill(axis, torch.tensor(indices), 0)
        return _equal(self._run(order), self._run({}, zeroed))

    def _size(self, axis: Axis) -> int:
        return self._rows.shapes[axis[0]][axis[1]]

    def _run(self, order: Order, given: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Run on what `order` leaves of each tensor; free tensors are computed whole."""
        values = {name: self._left(name, tensor, order) for name, tensor in (given or self._given).items()}
        for call in self._calls:
            for name in operands(call):
                if "@" in name:
                    values[name] = self._left(name, values[name.split("@")[0]], order)
            values.update(zip(call.results, self._call(call, values, order), strict=True))
        return [values[name] for name in self._outputs]

    def _left(self, name: str, tensor: Tensor, order: Order) -> Tensor:
        for axis in range(tensor.dim()):
            if (name, axis) in order:
                tensor = tensor.index_select(axis, order[name, axis])
        return tensor

    def _call(self, call: Call, values: dict[str, Tensor], order: Order) -> list[Tensor]:
        if not any((name, axis) in order for name in operands(call) for axis in range(values[name].dim())):
            return [
                self._left(name, t, order) for name, t in zip(call.results, run(call, values), strict=True)
            ]
        if call.operator in MOVES:
            whole = {name: self._in_place(name, values[name], order) for name in operands(call)}
            return [
                self._left(name, t, order) for name, t in zip(call.results, run(call, whole), strict=True)
            ]
        special = SPECIAL.get(call.operator)
        if special is None:
            return run(call, values)
        return [special(self, call, values)]

    def _in_place(self, name: str, tensor: Tensor, order: Order) -> Tensor:
        for axis in range(tensor.dim()):
            if (name, axis) in order:
                shape = list(tensor.shape)
                shape[axis] = self._size((name, axis))
                whole = (
                    tensor.new_full(shape, math.nan)
                    if tensor.is_floating_point()
                    else tensor.new_zeros(shape)
                )
                tensor = whole.index_copy(axis, order[name, axis], tensor)
        return tensor

    def _mean(self, call: Call, values: dict[str, Tensor]) -> Tensor:
        """Divide by the old number of rows."""
        old = math.prod(self._rows.shapes[call["self"]][dim] for dim in call["dim"])
        return values[call["self"]].sum(call["dim"], keepdim=call["keepdim"]) / old

    def _attention(self, call: Call, values: dict[str, Tensor]) -> Tensor:
        """Keep the scale."""
        width = self._rows.shapes[call["query"]][-1]
        arguments = {**call.arguments, "scale": call["scale"] or width**-0.5}
        return run(Call(call.node, arguments, call.results), values)[0]

    def _layer_norm(self, call: Call, values: dict[str, Tensor]) -> Tensor:
        shape = [values[call["input"]].shape[-1]]
        return run(Call(call.node, {**call.arguments, "normalized_shape": shape}, call.results), values)[0]

    def _rms_norm(self, call: Call, values: dict[str, Tensor]) -> Tensor:
        """Divide by the old number of rows, as weights and eps that are rescaled do."""
        x, old = values[call["input"]], self._rows.shapes[call["input"]][-1]
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / old + call["eps"]) * values[call["weight"]]

    def _group_norm(self, call: Call, values: dict[str, Tensor]) -> Tensor:
        """Keep the groups that have channels left."""
        x, channels = values[call["input"]], self._rows.shapes[call["input"]][1]
        per_group = channels // call["num_groups"]
        left = x.shape[1] // per_group if x.shape[1] % per_group == 0 else call["num_groups"]
        return group_norm(x, left, values[call["weight"]], values[call["bias"]], call["eps"])

    def _convolution(self, call: Call, values: dict[str, Tensor]) -> Tensor:
        """Read the number of groups off the channels."""
        groups = values[call["input"]].shape[1] // values[call["weight"]].shape[1]
        return run(Call(call.node, {**call.arguments, "groups": groups}, call.results), values)[0]


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    scale = max(float(output.abs().max()) for output in theirs)
    return all(bool(((a - b).abs() <= TOLERANCE * scale).all()) for a, b in zip(ours, theirs, strict=True))


SPECIAL: dict[str, Callable[[Runner, Call, dict[str, Tensor]], Tensor]] = {
    "mean": Runner._mean,
    "scaled_dot_product_attention": Runner._attention,
    "layer_norm": Runner._layer_norm,
    "rms_norm": Runner._rms_norm,
    "group_norm": Runner._group_norm,
    "conv1d": Runner._convolution,
    "conv2d": Runner._convolution,
}
