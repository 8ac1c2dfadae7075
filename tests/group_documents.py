"""Documents of node groups as ``groups.json`` holds them, built by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def group(
    name: str,
    kind: str,
    size: int,
    block: int | None,
    members: Sequence[tuple[str, int]],
    reason: str | None = None,
    each: int = 12,
) -> dict[str, Any]:
    """A row of groups.json whose members are of the group's own size."""
    return {
        "name": name,
        "kind": kind,
        "size": size,
        "minimum": 1,
        "block": block,
        "permutable": reason is None,
        "prunable": reason is None,
        "reason": reason,
        "parameters_per_unit": each,
        "operators": [{"name": "mul", "target": "aten.mul.Tensor", "module": name.rpartition(":")[0]}],
        "members": [
            {
                "parameter": parameter,
                "axis": axis,
                "size": size,
                "per_unit": 1,
                "side": ("produces", "consumes")[axis % 2],
                "role": "parameter",
                "pieces": [{"start": 0, "length": 1, "count": 1, "stride": 0}],
            }
            for parameter, axis in members
        ],
    }


def document_of(rows: Sequence[dict[str, Any]], model: str = "tiny") -> dict[str, Any]:
    """A groups.json of these rows; its parameters stand in the order of first appearance."""
    shapes: dict[str, dict[int, int]] = {}
    for row in rows:
        for member in row["members"]:
            shapes.setdefault(member["parameter"], {})[member["axis"]] = member["size"]
    parameters = [
        {
            "name": name,
            "shape": [sizes.get(axis, 1) for axis in range(max(sizes) + 1)],
            "role": "parameter",
            "layout": [[] for _ in range(max(sizes) + 1)],
        }
        for name, sizes in shapes.items()
    ]
    return {
        "schema": "graphprune.groups/1",
        "model": model,
        "elements": {"total": 1000, "prunable": 250},
        "parameters": parameters,
        "groups": list(rows),
    }


def make_groups(layers: int = 30) -> list[dict[str, Any]]:
    hidden, head_dim, rows = [("model.embed_tokens.weight", 1)], [("model.rotary_emb.inv_freq", 0)], []
    for layer in range(layers):
        at = f"model.layers.{layer}"
        q, k, v, o = (f"{at}.self_attn.{name}_proj.weight" for name in "qkvo")
        gate, up, down = (f"{at}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        hidden += [(f"{at}.input_layernorm.weight", 0), (q, 1), (k, 1), (v, 1), (o, 0)]
        hidden += [(f"{at}.post_attention_layernorm.weight", 0), (gate, 1), (up, 1), (down, 0)]
        head_dim += [(q, 0), (k, 0)]
        rows += [
            group(
                f"{at}.self_attn:attention_heads",
                "attention_heads",
                3,
                layer,
                [(q, 0), (k, 0), (v, 0), (o, 1)],
                None,
                294912,
            ),
            group(
                f"{at}.self_attn:query_heads",
                "query_heads",
                3,
                layer,
                [(q, 0), (o, 1)],
                "kept by the recipe",
                73728,
            ),
            group(f"{at}.self_attn:head_dim", "head_dim", 64, layer, [(v, 0), (o, 1)], None, 6912),
            group(
                f"{at}.mlp:ffn",
                "ffn",
                1536,
                layer,
                [(gate, 0), (up, 0), (down, 1)],
                None,
                1728,
            ),
        ]
    reason = "rotary pairs are coupled in all layers; kept by the recipe"
    return [
        group("model:hidden", "hidden", 576, None, hidden, "kept by the recipe", 233472),
        group("model.layers:head_dim", "head_dim", 64, None, head_dim, reason, 61440),
        *rows,
    ]
