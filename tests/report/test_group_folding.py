"""Folding loses nothing: every group and member can be told from the folded form."""

from __future__ import annotations

from typing import Any

from group_documents import group, make_groups
from hypothesis import given
from hypothesis import strategies as st

from graphprune.report.folding import filled, fold, fold_members, numbers_in_words, stack_of


def test_blocks_are_folded_and_counted() -> None:
    families = {family.name: family for family in fold(make_groups(30))}
    assert {name: len(family.rows) for name, family in families.items()} == {
        "model:hidden": 1,
        "model.layers:head_dim": 1,
        "model.layers.*.self_attn:attention_heads": 30,
        "model.layers.*.self_attn:query_heads": 30,
        "model.layers.*.self_attn:head_dim": 30,
        "model.layers.*.mlp:ffn": 30,
    }
    ffn = families["model.layers.*.mlp:ffn"]
    assert (ffn.stack, ffn.where) == ("model.layers.*", "mlp")
    assert ffn.places == tuple((i,) for i in range(30))
    assert families["model:hidden"].stack == ""


def test_every_name_and_member_can_be_told_from_the_folded_form() -> None:
    rows = make_groups(5)
    told: dict[str, list[tuple[str, int]]] = {}
    for family in fold(rows):
        for place in family.places:
            told[filled(family.name, place)] = [
                (filled(filled(family.pattern_of(members.parameter), place), own), members.first["axis"])
                for members in fold_members(family.first)
                for own in members.places
            ]
    expected = {row["name"]: sorted((m["parameter"], m["axis"]) for m in row["members"]) for row in rows}
    assert {name: sorted(members) for name, members in told.items()} == expected


def test_a_group_that_differs_stands_alone() -> None:
    for change in (
        {"size": 7},
        {"prunable": False, "reason": "kept"},
        {"kind": "other"},
        {"parameters_per_unit": 3},
    ):
        rows = make_groups(4)
        ffn = [row for row in rows if row["kind"] == "ffn"]
        ffn[2].update(change)
        found = [family for family in fold(rows) if family.first in ffn]
        assert sorted(len(family.rows) for family in found) == [1, 3]
        odd = next(family for family in found if len(family.rows) == 1)
        assert (odd.name, odd.stack, odd.where) == ("model.layers.2.mlp:ffn", "model.layers.*", "2.mlp")


def test_a_member_more_is_a_difference() -> None:
    rows = make_groups(3)
    rows[-1]["members"].append(rows[-1]["members"][0] | {"axis": 1})
    assert sorted(len(f.rows) for f in fold(rows) if f.first["kind"] == "ffn") == [1, 2]


def test_reasons_that_differ_in_a_number_are_folded_and_all_kept() -> None:
    rows = [group(f"l.{i}.a:ffn", "ffn", 8, i, [(f"l.{i}.a.w", 0)], f"mul_{i} forbids it") for i in range(3)]
    (family,) = fold(rows)
    assert family.reasons == ("mul_0 forbids it", "mul_1 forbids it", "mul_2 forbids it")


def test_experts_are_folded_over_layers_and_experts() -> None:
    rows = [
        group(
            f"l.{i}.experts.{j}:ffn",
            "ffn",
            8,
            i,
            [(f"l.{i}.experts.{j}.up", 0), (f"l.{i}.experts.{j}.down", 1)],
        )
        for i in range(3)
        for j in range(4)
    ]
    (family,) = fold(rows)
    assert family.name == "l.*.experts.*:ffn"
    assert family.places == tuple((i, j) for i in range(3) for j in range(4))


def test_numbers_that_do_not_differ_stay() -> None:
    rows = [group(f"b.{i}.layer.1:ffn", "ffn", 8, i, [(f"b.{i}.layer.1.up", 0)]) for i in range(3)]
    (family,) = fold(rows)
    assert family.name == "b.*.layer.1:ffn"


def test_encoder_and_decoder_stay_apart() -> None:
    rows = [
        group(f"{s}.{i}:ffn", "ffn", 8, i, [(f"{s}.{i}.up", 0)])
        for s in ("encoder", "decoder")
        for i in (0, 1)
    ]
    assert [family.stack for family in fold(rows)] == ["encoder.*", "decoder.*"]


def test_stack_of() -> None:
    assert stack_of("model.layers.3.mlp.up.weight") == "model.layers.*"
    assert stack_of("model.norm.weight") == ""


@given(st.lists(st.integers(0, 40), min_size=1))
def test_numbers_in_words_name_each_number_once(numbers: list[int]) -> None:
    told: list[int] = []
    for part in numbers_in_words(numbers).split(", "):
        low, _, high = part.partition("–")
        told += range(int(low), int(high or low) + 1)
    assert told == sorted(set(numbers))


@given(
    names=st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]), st.integers(0, 3), st.sampled_from(["x", "y"]), st.integers(0, 3)
        ),
        min_size=1,
        unique=True,
    )
)
def test_any_names_can_be_told(names: list[tuple[str, int, str, int]]) -> None:
    rows: list[dict[str, Any]] = [
        group(f"{a}.{i}.{x}:ffn", "ffn", 8, i, [(f"{a}.{i}.{x}.{j}.w", 0)]) for a, i, x, j in names
    ]
    for number, row in enumerate(rows):
        row["name"] += f"#{number}"
    told = [filled(family.name, place) for family in fold(rows) for place in family.places]
    assert sorted(told) == sorted(row["name"] for row in rows)
