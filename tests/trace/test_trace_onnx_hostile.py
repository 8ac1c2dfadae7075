"""Files that nobody's exporter writes: each is refused by name, at once, and nothing outside its folder is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.coupling.groups import node_groups
from graphprune.errors import TraceError
from graphprune.trace.onnx import trace_onnx

UP = np.ones((6, 8), np.float32)


def value(name: str, *shape: Any) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def tensor(name: str = "up", numbers: Any = UP) -> TensorProto:
    return numpy_helper.from_array(np.asarray(numbers), name)


def external(location: str, **entries: Any) -> TensorProto:
    held = TensorProto(name="up", data_type=TensorProto.FLOAT, dims=UP.shape)
    held.data_location = TensorProto.EXTERNAL
    for key, entry in {"location": location, **entries}.items():
        held.external_data.add(key=key, value=str(entry))
    return held


def model(
    *nodes: onnx.NodeProto,
    up: TensorProto | None = None,
    more: tuple[TensorProto, ...] = (),
    output: str = "y",
) -> onnx.ModelProto:
    """Two linear maps, and whatever comes beside them."""
    layers = [
        helper.make_node("MatMul", ["x", "up"], ["h"]),
        helper.make_node("MatMul", ["h", "down"], ["y"]),
    ]
    weights = [up or tensor(), tensor("down", np.ones((8, 3), np.float32)), *more]
    graph = helper.make_graph(
        [*layers, *nodes], "g", [value("x", "b", 6)], [value(output, None, None)], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def misshapen(size: int) -> TensorProto:
    held = tensor()
    held.dims[1] = size
    return held


def untyped() -> TensorProto:
    held = tensor()
    held.data_type = 99
    return held


def recursive() -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    call = helper.make_node("F", ["a"], ["b"], domain="own")
    made = model(helper.make_node("F", ["y"], ["z"], domain="own"), output="z")
    made.functions.append(helper.make_function("own", "F", ["a"], ["b"], [call], imports))
    made.opset_import.append(imports[1])
    return made


NODE = helper.make_node
REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "above the folder": (
        lambda: model(up=external("../secret.bin")),
        r"'\.\./secret\.bin', which is not beside",
    ),
    "absolute": (lambda: model(up=external(os.path.abspath(os.sep + "secret.bin"))), "which is not beside"),
    "absolute on windows": (lambda: model(up=external("C:\\secret.bin")), "which is not beside"),
    "nowhere": (lambda: model(up=external("")), "which is not beside"),
    "a link": (lambda: model(up=external("link.bin")), "'link.bin', which is not beside"),
    "offset": (
        lambda: model(up=external("data.bin", offset=4)),
        "bytes 4 to 196 of 'data.bin', which has 192",
    ),
    "negative offset": (lambda: model(up=external("data.bin", offset=-4)), "bytes -4 to 188"),
    "no number": (lambda: model(up=external("data.bin", offset="four")), "external data of 'up'.*four"),
    "length": (lambda: model(up=external("data.bin", length=4)), "'up' of shape .6, 8. has 4 bytes, not 192"),
    "shape": (lambda: model(up=misshapen(9)), "'up' of shape .6, 9. has 192 bytes, not 216"),
    "negative shape": (lambda: model(up=misshapen(-8)), "'up' has the shape .6, -8."),
    "type": (lambda: model(up=untyped()), "'up': 99 is not a valid DataType"),
    "cycle": (
        lambda: model(NODE("Add", ["q", "y"], ["p"]), NODE("Neg", ["p"], ["q"]), output="q"),
        r"\(Add\) reads 'q', which nothing makes before it",
    ),
    "undefined": (
        lambda: model(NODE("Neg", ["gone"], ["z"]), output="z"),
        "reads 'gone', which nothing makes",
    ),
    "no output": (lambda: model(output="gone"), "nothing makes the output 'gone'"),
    "two of a name": (lambda: model(NODE("Neg", ["x"], ["y"])), "'y' is redeclared"),
    "two weights": (lambda: model(more=(tensor(),)), "two initializers 'up'"),
    "recursive": (recursive, "functions of the model cannot be inlined"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_contradicts_itself_is_refused(name, tmp_path):
    build, message = REFUSED[name]
    (tmp_path / "secret.bin").write_bytes(bytes(UP.nbytes))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "data.bin").write_bytes(bytes(UP.nbytes))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "model.onnx").write_bytes(build().SerializeToString())
    with pytest.raises(TraceError, match=message):
        trace_onnx(folder / "model.onnx")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_none(kept, tmp_path):
    content = model().SerializeToString()
    (tmp_path / "model.onnx").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(TraceError, match="is not an ONNX model"):
        trace_onnx(tmp_path / "model.onnx")


def conditional(depth: int) -> onnx.NodeProto:
    graph = helper.make_graph([NODE("Neg", ["y"], ["inner"])], "g", [], [value("inner", None, None)])
    for number in range(depth):
        outer = NODE("If", ["flag"], [f"o{number}"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([outer], "g", [], [value(f"o{number}", None, None)])
    return NODE("If", ["flag"], ["z"], then_branch=graph, else_branch=graph)


def named(symbol: str) -> onnx.ModelProto:
    made = model()
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = symbol
    return made


OPAQUE: dict[str, Callable[[], onnx.ModelProto]] = {
    "unknown domain": lambda: model(NODE("Foo", ["y"], ["z"], domain="evil"), output="z"),
    "attribute of another type": lambda: model(NODE("Transpose", ["y"], ["z"], perm="abc"), output="z"),
    "no such axis": lambda: model(NODE("Softmax", ["y"], ["z"], axis=99), output="z"),
    "too few operands": lambda: model(NODE("MatMul", ["y"], ["z"]), output="z"),
    "enormous": lambda: model(
        NODE("ConstantOfShape", ["s"], ["z"]), more=(tensor("s", np.array([10**9, 10**9])),), output="z"
    ),
    "subgraphs": lambda: model(conditional(4), more=(tensor("flag", np.array(True)),), output="z"),
    "code as a symbol": lambda: named("__import__('os').abort()"),
    "endless symbol": lambda: named("+".join(f"s{number}" for number in range(3000))),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_only_one_operator_does_not_understand_stays_its_own_matter(name, tmp_path):
    (tmp_path / "model.onnx").write_bytes(OPAQUE[name]().SerializeToString())
    groups = node_groups(trace_onnx(tmp_path / "model.onnx"))
    assert 8 in [group.size for group in groups.values() if group.prunable]


def test_a_chain_of_thousands_of_nodes_is_walked_without_recursion(tmp_path):
    names = ["y", *(f"c{number}" for number in range(1200))]
    scaled = [NODE("Neg", [one], [other]) for one, other in pairwise(names)]
    table = [NODE("Neg", ["t" if n == 0 else f"t{n - 1}"], [f"t{n}"]) for n in range(1200)]
    end = NODE("MatMul", ["t1199", "y3"], ["z"])
    turned = NODE("Transpose", [names[-1]], ["y3"], perm=[1, 0])
    made = model(*scaled, *table, turned, end, more=(tensor("t", np.ones((4, 3), np.float32)),), output="z")
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    assert len(trace_onnx(tmp_path / "model.onnx").operators) == 2404
