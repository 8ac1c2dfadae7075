"""What groups.json says is what the model's groups are."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Traced, traced

from graphprune.report.group_document import group_document, pieces


def owned(member: dict[str, Any], unit: int) -> list[int]:
    """The indices of a unit, told from the pieces as the page tells them."""
    return sorted(
        piece["start"] + repeat * piece["stride"] + unit * piece["length"] + offset
        for piece in member["pieces"]
        for repeat in range(piece["count"])
        for offset in range(piece["length"])
    )


def fused() -> Traced:
    """Fused projections: axes that are concatenations and products at once."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = Phi3Config(
        vocab_size=61, num_hidden_layers=2, max_position_embeddings=32, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    return traced(Phi3ForCausalLM(config).eval())


@pytest.mark.parametrize("case", ["llama", "adapted", "fused"])
def test_pieces_are_the_indices_that_units_own(case: str, request: pytest.FixtureRequest) -> None:
    groups = (fused() if case == "fused" else request.getfixturevalue(case)).groups
    rows = group_document(groups, "tiny")["groups"]
    checked = 0
    for row, group in zip(rows, groups.values(), strict=True):
        for entry, member in zip(row["members"], group.members, strict=True):
            for unit in {0, 1, group.size // 2, group.size - 1}:
                assert owned(entry, unit) == group.indices(member, unit).tolist()
                checked += 1
    assert checked > 50


@given(outer=st.integers(1, 5), size=st.integers(2, 6), inner=st.integers(1, 4), before=st.integers(0, 3))
def test_pieces_of_a_product_behind_a_segment(outer: int, size: int, inner: int, before: int) -> None:
    block = np.repeat(np.arange(size), inner)
    owner = np.concatenate([np.full(before, -1), np.tile(block, outer), np.tile(block, 1)])
    told = {"pieces": pieces(owner)}
    for unit in range(size):
        assert owned(told, unit) == np.flatnonzero(owner == unit).tolist()
    assert len(told["pieces"]) == 1  # all of one length and evenly apart: one progression


def test_rows_are_those_of_the_groups(llama: Traced) -> None:
    document = group_document(llama.groups, "tiny")
    for row, told in zip(llama.groups.rows(), document["groups"], strict=True):
        for ours, theirs in zip(row.pop("members"), told["members"], strict=True):
            assert ours.items() <= theirs.items()
        assert row.items() <= told.items()
    assert json.loads(json.dumps(document)) == document


def centred() -> Traced:
    """A residual width that stays, so that parameters lie in prunable units in part."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 32}
    torch.manual_seed(0)
    return traced(GPT2LMHeadModel(GPT2Config(vocab_size=61, bos_token_id=1, eos_token_id=2, **sizes)).eval())


def test_prunable_elements_are_counted_once(llama: Traced, adapted: Traced) -> None:
    for case in (llama, adapted, centred()):
        elements = group_document(case.groups, "tiny")["elements"]
        covered = {
            name: np.zeros(value.shape, dtype=bool)
            for name, value in case.groups.graph.weights.items()
            if value.role == "parameter"
        }
        for group in case.groups.values():
            for member in group.members:
                if group.prunable and member.role == "parameter":
                    for unit in range(group.size):
                        index = [slice(None)] * len(member.shape)
                        index[member.axis] = group.indices(member, unit)
                        covered[member.parameter][tuple(index)] = True
        assert elements["prunable"] == sum(int(mask.sum()) for mask in covered.values())
        assert elements["total"] == sum(parameter.numel() for parameter in case.model.parameters())


def test_parameters_stand_in_the_order_in_which_they_are_read(llama: Traced) -> None:
    names = [row["name"] for row in group_document(llama.groups, "tiny")["parameters"]]
    assert set(names) == set(llama.groups.graph.weights)
    order = [
        "embed_tokens",
        "layers.0.input_layernorm",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.o_proj",
    ]
    order += ["layers.0.mlp.down_proj", "layers.1.input_layernorm", "model.norm"]
    places = [next(i for i, name in enumerate(names) if part in name) for part in order]
    assert places == sorted(places)


def test_layouts_multiply_to_the_size_of_the_axis(llama: Traced) -> None:
    for case in (llama, fused()):
        for row in group_document(case.groups, "tiny")["parameters"]:
            if case.groups.axes(row["name"]) is None:  # no operator reads it
                assert row["layout"] == []
                continue
            for size, layout in zip(row["shape"], row["layout"], strict=True):
                text = "".join(str(token[0]) if isinstance(token, list) else token for token in layout)
                assert eval(text.replace("×", "*").replace(",", "")) == size
    row = next(
        r for r in group_document(llama.groups, "t")["parameters"] if "0.self_attn.q_proj" in r["name"]
    )
    assert [token[1] for token in row["layout"][0] if isinstance(token, list)][:2] == [
        "attention_heads",
        "query_heads",
    ]
    assert math.prod(row["shape"]) == 32 * 32


def test_operators_that_couple_are_named(llama: Traced) -> None:
    rows = {row["name"]: row for row in group_document(llama.groups, "tiny")["groups"]}
    ffn = {(op["target"], op["module"]) for op in rows["model.layers.1.mlp:ffn"]["operators"]}
    assert {
        ("aten.mul.Tensor", "model.layers.1.mlp"),
        ("aten.linear.default", "model.layers.1.mlp.down_proj"),
    } <= ffn
    assert not any("layers.0" in module for _, module in ffn)
    assert rows["model.embed_tokens:vocabulary"]["operators"] == []
