"""How fused attention and rotary embedding are told of heads and widths that are gone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphprune.coupling.layout import Layout
from graphprune.coupling.selection import Indices
from graphprune.shrink.onnx_resize import OnnxSizes
from graphprune.shrink.onnx_resizers import resizer, set_integer


@resizer("onnx.Attention")
def attention(sizes: OnnxSizes, node: ir.Node) -> None:
    """Count the heads that are left, and keep the scale."""
    query, key = (sizes.axes(node.inputs[place], reader=node) for place in (0, 1))
    count = node.attributes.get_int("q_num_heads", 0)
    _keep_scale(sizes, node, query[-1], query[-1].size // count if len(query) == 3 else query[-1].size)
    _set_heads(sizes, node, "q_num_heads", query[-1])
    _set_heads(sizes, node, "kv_num_heads", key[-1])


@resizer("com.microsoft.GroupQueryAttention")
def group_query_attention(sizes: OnnxSizes, node: ir.Node) -> None:
    """Count the heads that are left, and keep the scale; query, key and value may be packed into one operand."""
    counts = [node.attributes.get_int(name, 1) for name in ("num_heads", "kv_num_heads", "kv_num_heads")]
    operands = [sizes.axes(value)[-1] for value in node.inputs[:3] if value is not None]
    if not sizes.touched(operands):
        return
    if len(operands) == 1:
        width = operands[0].size // sum(counts)
        heads = np.bincount(sizes.kept(operands[0]) // width, minlength=sum(counts))
        left = np.split(heads, np.cumsum(counts)[:-1])
    else:
        width = operands[0].size // counts[0]
        left = [_heads(sizes, axis, count) for axis, count in zip(operands, counts, strict=True)]
    widths = {int(one) for heads in left for one in heads if one}
    step = 16 if node.attributes.get_int("do_rotary", 0) else 8
    if len(widths) > 1 or max(widths) % step:
        raise sizes.refused(
            node,
            f"its heads would be {' and '.join(map(str, sorted(widths)))} wide, and onnxruntime takes one "
            f"width, a multiple of {step}",
        )
    set_integer(node, "num_heads", int(np.count_nonzero(left[0])))
    set_integer(node, "kv_num_heads", int(np.count_nonzero(left[1])))
    _keep_scale(sizes, node, operands[0], width)


@resizer("com.microsoft.MultiHeadAttention")
def multi_head_attention(sizes: OnnxSizes, node: ir.Node) -> None:
    """Count the heads that are left, and keep the scale; operands may be packed as (…, heads, parts, width)."""
    query = sizes.axes(node.inputs[0], reader=node)
    count = node.attributes.get_int("num_heads", 1)
    if len(query) == 5:
        _keep_scale(sizes, node, query[-1], query[-1].size)
        set_integer(node, "num_heads", sizes.size(query[2]))
    else:
        _keep_scale(sizes, node, query[-1], query[-1].size // count)
        _set_heads(sizes, node, "num_heads", query[-1])


@resizer("com.microsoft.Attention")
def packed_attention(sizes: OnnxSizes, node: ir.Node) -> None:
    """Count the heads that are left, say how wide query, key and value are, and keep the scale."""
    projected, count = sizes.axes(node.inputs[1])[1], node.attributes.get_int("num_heads", 1)
    widths = node.attributes.get_ints("qkv_hidden_sizes", None) or [projected.size // 3] * 3
    kept, ends = sizes.kept(projected), np.cumsum(widths)
    left = [
        int(((kept >= end - width) & (kept < end)).sum()) for width, end in zip(widths, ends, strict=True)
    ]
    _keep_scale(sizes, node, projected, widths[0] // count)
    heads = np.unique(kept[kept < ends[0]] // (widths[0] // count))
    set_integer(node, "num_heads", len(heads))
    node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", left)


@resizer("onnx.RotaryEmbedding", "com.microsoft.RotaryEmbedding")
def rotary_embedding(sizes: OnnxSizes, node: ir.Node) -> None:
    """Count the heads that are left, and the numbers of each that are rotated."""
    cos = 1 if node.domain in ("", "ai.onnx") else 2
    axes = sizes.axes(node.inputs[0], reader=node)
    if len(axes) == 3:
        _set_heads(sizes, node, "num_heads", axes[-1])
    if node.attributes.get_int("rotary_embedding_dim", 0):
        set_integer(node, "rotary_embedding_dim", 2 * sizes.shape_now(node.inputs[cos])[-1])


def _set_heads(sizes: OnnxSizes, node: ir.Node, name: str, axis: Layout) -> None:
    """Set the attribute that counts the heads of an axis heads × width, if it is there."""
    count = node.attributes.get_int(name, 0)
    if count:
        set_integer(node, name, int(np.count_nonzero(_heads(sizes, axis, count))))


def _heads(sizes: OnnxSizes, axis: Layout, count: int) -> Indices:
    """Return how many numbers are left of each head of an axis heads × width."""
    return np.bincount(sizes.kept(axis) // (axis.size // count), minlength=count)


def _keep_scale(sizes: OnnxSizes, node: ir.Node, axis: Layout, width: int) -> None:
    """Write the scale down, before the width that it defaults to shrinks."""
    if sizes.touches(axis) and not node.attributes.get_float("scale", 0.0):
        node.attributes["scale"] = ir.AttrFloat32("scale", width**-0.5)
